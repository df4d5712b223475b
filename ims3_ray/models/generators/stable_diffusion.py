"""Stable Diffusion as a generator: a UNet of latents whose condition is a text, in a folder of a diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ims3_ray.diffusion.prediction import Parametrisation
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError, first_line
from ims3_ray.models.checkpoints import compare_shapes, read_json, read_tensors
from ims3_ray.models.generators.base import Generator
from ims3_ray.models.lora import add_lora, merge_lora
from ims3_ray.models.text import TextEncoder

INDEX = "model_index.json"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
UNET = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TEXT = ("model.safetensors", "pytorch_model.bin")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
REMEMBERED = 256
"""Number of texts whose embeddings are kept."""


class TextUNet(nn.Module):
    """diffusers' UNet2DConditionModel, called as a generator's network: ``(z, t, condition)`` → what it predicts."""

    compute_dtype: torch.dtype | None = None
    """Number format of the arithmetic where the parameters have several formats; None for that of the parameters."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet: Any = UNet2DConditionModel.from_config(dict(config))

    @property
    def recompute(self) -> bool:
        """Whether the backward pass recomputes each block instead of keeping its activations."""
        return bool(self.unet.is_gradient_checkpointing)

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if value:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()  # which diffusers' blocks ask for; there is no dropout
        else:
            self.unet.disable_gradient_checkpointing()

    def forward(self, z_BCHW: Tensor, t_B: Tensor, condition_BLD: Tensor) -> Tensor:
        dtype, each = self.unet.conv_in.weight.dtype, len(z_BCHW) // len(condition_BLD)
        condition = condition_BLD.to(dtype).repeat_interleave(each, dim=0)
        t = t_B.repeat_interleave(len(z_BCHW) // len(t_B))
        mixed = torch.autocast(z_BCHW.device.type, self.compute_dtype) if self.compute_dtype else nullcontext()
        with mixed:
            predicted: Tensor = self.unet(z_BCHW.to(dtype), t, encoder_hidden_states=condition, return_dict=False)[0]
        return predicted


class StableDiffusion(Generator):
    """Stable Diffusion 1 or 2, or a fine-tuned one, as a folder that diffusers has saved: UNet, text encoder, tokenizer,
    scheduler and autoencoder. Its path is that of the folder's ``model_index.json``."""

    name = "stable-diffusion"
    hub_files = (
        INDEX, "unet/config.json", f"unet/{UNET[0]}", f"text_encoder/{TEXT[0]}", "text_encoder/config.json", "tokenizer/*",
        "scheduler/*", "vae/config.json", f"vae/{UNET[0]}",
    )  # fmt: skip
    takes_words = any_size = True
    trainable = ("lora", "all")

    def __init__(
        self, path: Path, class_names: Sequence[str] = (), prompts: Sequence[str] = (), negative: str = ""
    ) -> None:  # fmt: skip
        self.path, self.folder = path, path.parent
        self.class_names, self.prompts, self.negative = tuple(class_names), tuple(prompts), negative
        self.config = read_json(self.folder / "unet" / "config.json")
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.schedule, self.parametrisation = schedule_of(scheduler, path), parametrisation_of(scheduler, path)
        size = self.config.get("sample_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        self.latent, self.learns_variance = (int(self.config.get("in_channels", 4)), height, width), False
        self._embedded = lru_cache(REMEMBERED)(self._embed)

    @property
    def title(self) -> str:
        return self.folder.name

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        index = folder / INDEX
        return index if index.is_file() and read_json(index).get("_class_name") in PIPELINES else None

    @classmethod
    def describe(cls, folder: Path) -> str:
        """The kind of pipeline that a folder holds, in brackets; empty if it holds none."""
        index = folder / INDEX
        return f" ({INDEX}: {read_json(index).get('_class_name')})" if index.is_file() else ""

    @classmethod
    def open(cls, path: Path) -> StableDiffusion:
        if path.name != INDEX or cls.find(path.parent) is None:
            raise UserError(
                f"'{path}' is not the {INDEX} of a diffusers pipeline of Stable Diffusion ({' or '.join(PIPELINES)})"
            )
        config = read_json(path.parent / "unet" / "config.json")
        if config.get("addition_embed_type") or config.get("class_embed_type"):
            raise UserError(
                f"the UNet of '{path.parent}' takes more than a text (as that of SDXL does); use Stable Diffusion 1 or 2"
            )
        if config.get("in_channels", 4) != config.get("out_channels", 4):
            raise UserError(f"the UNet of '{path.parent}' is one for inpainting or depth; use one that takes latents alone")
        return cls(path)

    def told(self, class_names: Sequence[str], prompts: Sequence[str], negative: str) -> StableDiffusion:
        return StableDiffusion(self.path, class_names, prompts, negative)

    def check(self) -> None:
        try:
            with torch.device("meta"):
                wanted = {name: tuple(tensor.shape) for name, tensor in TextUNet(self.config).unet.state_dict().items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = first_line(error)
            raise UserError(f"diffusers cannot build the UNet of '{self.folder}' ({reason}); fetch it again") from error
        found = read_tensors(self._unet_file, meta=True)
        compare_shapes(wanted, {name: tuple(tensor.shape) for name, tensor in found.items()}, self._unet_file)
        self._text  # noqa: B018 - loads it, or says what is missing

    def load(self) -> TextUNet:
        network = TextUNet(self.config)
        network.unet.load_state_dict({name: tensor.float() for name, tensor in read_tensors(self._unet_file).items()})
        return network.eval()

    def labels(self, class_names: Sequence[str]) -> list[int]:
        """Positions among the classes that :meth:`told` has given; the weights know no classes."""
        return [self.class_names.index(name) for name in class_names]

    def condition(self, label: int, words: str | None = None) -> Tensor:
        """The embeddings of the prompt, in as many pieces as it or the negative prompt needs."""
        return self._embedded(self.prompts[label] if words is None else words, self._negative_pieces)

    @cached_property
    def null(self) -> Tensor:  # type: ignore[override]
        return self._embedded(self.negative, 1)

    @property
    def trained_null(self) -> Tensor:
        return self._embedded("", 1, cut=True)

    def trained_condition(self, label: int, words: str | None = None) -> Tensor:
        return self._embedded(self.prompts[label] if words is None else words, 1, cut=True)

    def null_beside(self, condition: Tensor) -> Tensor:
        return self._embedded(self.negative, condition.shape[1] // self._text.length)

    def forward_flops(self) -> float:
        return _forward_flops(json.dumps(self.config, sort_keys=True), self._text_length, self.latent)

    def choose_trained(self, network: nn.Module, parameters: str, scaled_blocks: int, rank: int) -> list[str]:
        if parameters == "lora":
            return add_lora(network, rank)
        return [name for name, _ in network.requires_grad_().named_parameters()]

    def merge(self, network: nn.Module, adapter: Mapping[str, Tensor]) -> None:
        if any(name.endswith("lora_up") for name in adapter):
            merge_lora(network, adapter)
        else:
            network.load_state_dict({**network.state_dict(), **adapter})

    def repeated(self, network: nn.Module) -> Iterable[nn.Module]:
        from diffusers.models.attention import BasicTransformerBlock

        return [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]

    @property
    def parts(self) -> Sequence[Path]:
        tokenizer = (self.folder / "tokenizer" / name for name in TOKENIZER)
        settings = (self.folder / part / "config.json" for part in ("unet", "text_encoder"))
        return (
            self._unet_file, _weights(self.folder / "text_encoder", TEXT), *settings,
            self.folder / "scheduler" / "scheduler_config.json", *(file for file in tokenizer if file.is_file()),
        )  # fmt: skip

    @property
    def brings_autoencoder(self) -> bool:
        return (self.folder / "vae").is_dir()

    @property
    def _unet_file(self) -> Path:
        return _weights(self.folder / "unet", UNET)

    @property
    def _text_length(self) -> int:
        return int(read_json(self.folder / "text_encoder" / "config.json").get("max_position_embeddings", 77))

    @cached_property
    def _text(self) -> TextEncoder:
        return TextEncoder(self.folder)

    @cached_property
    def _negative_pieces(self) -> int:
        return self._text.pieces(self.negative)

    def _embed(self, prompt: str, pieces: int, *, cut: bool = False) -> Tensor:
        return self._text(prompt, pieces, cut=cut)


def schedule_of(scheduler: Mapping[str, Any], path: Path) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler's settings. Raises :class:`UserError` for one that is not of the kind that
    Stable Diffusion was trained with."""
    spaced = scheduler.get("beta_schedule", "linear")
    if spaced not in ("linear", "scaled_linear") or scheduler.get("trained_betas") or scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"the scheduler of '{path.parent}' has the noise schedule '{spaced}' with other settings than Stable Diffusion's; "
            "use a pipeline with a linear or scaled_linear one"
        )
    return NoiseSchedule(
        int(scheduler.get("num_train_timesteps", 1000)), scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02),
        of_roots=spaced == "scaled_linear", offset=int(scheduler.get("steps_offset", 0)),
        ends_clean=bool(scheduler.get("set_alpha_to_one", scheduler.get("_class_name") == "DDIMScheduler")),
    )  # fmt: skip


def parametrisation_of(scheduler: Mapping[str, Any], path: Path) -> Parametrisation:
    """What the network predicts by a diffusers scheduler's settings."""
    predicts = scheduler.get("prediction_type", "epsilon")
    known: dict[str, Parametrisation] = {"epsilon": "epsilon", "v_prediction": "v"}
    if predicts not in known:
        raise UserError(f"the network of '{path.parent}' predicts '{predicts}'; use one that predicts epsilon or v_prediction")
    return known[predicts]


@lru_cache(8)
def _forward_flops(config: str, length: int, latent: tuple[int, int, int]) -> float:
    """Floating-point operations of one forward pass of one sample, counted on a network without weights."""
    plain = json.loads(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        width = plain["cross_attention_dim"]
        TextUNet(plain)(torch.zeros(1, *latent), torch.zeros(1, dtype=torch.long), torch.zeros(1, length, width))
    return float(counter.get_total_flops())


def _weights(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"'{folder}' holds no weights ({' or '.join(names)}); fetch the pipeline again")
