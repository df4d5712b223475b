"""φ, the frozen feature encoder: a fixed resizing and normalisation of the images, followed by a timm network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ims3_ray.data.classes import composed, imagenet_wnids
from ims3_ray.errors import UserError
from ims3_ray.io.files import local_copy
from ims3_ray.io.hub import fetch, is_hub_id
from ims3_ray.models.checkpoints import check_fit, load_into, read_metadata, weights_path
from ims3_ray.models.students import has_batch_norm

TIMM_WEIGHTS = "model.safetensors"
OWN_ENCODER = "encoder.safetensors"
"""Name of the file of this project in a folder or on the hub."""
FETCHING = {"checkpoint_path", "cache_dir", "features_only"}
"""Arguments of ``timm.create_model`` that concern files or another kind of network."""


class EncoderConfig(BaseModel):
    """The settings that are needed to build φ. They are stored in the metadata of its weights file, or read from timm's
    ``config.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    model_args: dict[str, Any] = {}
    channels: int
    num_classes: int
    mean: float | tuple[float, ...]
    """Mean of images in [−1, 1], one value for all channels or one for each; ``std`` has the same form."""
    std: float | tuple[float, ...]
    size: int | None = None
    """Height and width to which images are scaled first, in pixels; None leaves their size unchanged."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    projection: bool = False
    """Whether the features are the output of the head instead of the pooled features. CLIP's image embedding is such a feature;
    its head is not a classifier."""

    @model_validator(mode="after")
    def _nothing_is_fetched(self) -> EncoderConfig:
        """Reject arguments that make timm load weights from another place than the encoder's own file."""
        wrong = [key for key in self.model_args if key.startswith("pretrained") or key in FETCHING]
        if wrong or ":" in self.model:
            raise ValueError(f"{wrong[0] if wrong else self.model} would have timm fetch weights from elsewhere")
        return self


class Encoder(nn.Module):
    """Maps images in [−1, 1], [B, C, H, W], to ℓ2-normalised pooled features φ(x) [B, D] (section 4.2)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        import timm

        self.config = config
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        self.network = timm.create_model(
            config.model, pretrained=False, in_chans=config.channels, num_classes=config.num_classes, **config.model_args
        )

    @property
    def dim(self) -> int:
        return int(self.config.num_classes if self.config.projection else self.network.head_hidden_size)

    def _features(self, x_BCHW: Tensor) -> Tensor:
        c = self.config
        if c.size is not None and x_BCHW.shape[-2:] != (c.size, c.size):
            x_BCHW = F.interpolate(x_BCHW, (c.size, c.size), mode=c.interpolation, antialias=True)
        return self.network.forward_features((x_BCHW - self.get_buffer("mean")) / self.get_buffer("std"))

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Class scores [B, num_classes] of the head that φ was trained with."""
        return self.network.forward_head(self._features(x_BCHW))

    @property
    def head_weight(self) -> Tensor | None:
        """Weights [num_classes, D] of the classifier of :meth:`logits`; None if it is not one linear layer."""
        head = self.network.get_classifier()
        return head.weight.detach() if isinstance(head, nn.Linear) else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.look(x_BCHW)[0]

    def look(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """φ(x) [B, D] and the class scores of :meth:`logits`, from one forward pass."""
        found = self._features(x_BCHW)
        scores = self.network.forward_head(found)
        features = scores if self.config.projection else self.network.forward_head(found, pre_logits=True)
        return F.normalize(features, dim=1), scores


def encoder_path(reference: str) -> Path:
    """The weights file that a reference names: ``embedded:NAME``, a file, a folder as timm saves it, or a hub id (downloaded to
    the hub's cache)."""
    folder = local_copy(reference)
    if not folder.exists() and is_hub_id(reference):
        folder = fetch(reference, ["config.json", TIMM_WEIGHTS, OWN_ENCODER], "encoder")
    if not folder.is_dir():
        return weights_path(reference)
    if (folder / OWN_ENCODER).is_file():
        return folder / OWN_ENCODER
    if not ((folder / TIMM_WEIGHTS).is_file() and (folder / "config.json").is_file()):
        raise UserError(
            f"encoder '{reference}' is a folder without {OWN_ENCODER}, and without timm's config.json and {TIMM_WEIGHTS}"
        )
    return folder / TIMM_WEIGHTS


def _of_timm(path: Path) -> bool:
    return path.name == TIMM_WEIGHTS and (path.parent / "config.json").is_file()


def encoder_config(path: Path) -> EncoderConfig:
    """The settings of the encoder in ``path``."""
    if not _of_timm(path):
        try:
            return EncoderConfig.model_validate_json(read_metadata(path, "encoder")["config"])
        except ValidationError as error:
            raise UserError(f"encoder '{path}' has a shape that cannot be used: {error.errors()[0]['msg']}") from error
    try:
        plain = json.loads((path.parent / "config.json").read_text("utf-8"))
        data = plain["pretrained_cfg"]
        channels, size, _ = data["input_size"]
        # timm normalises images in [0, 1]
        mean, std = tuple(2 * m - 1 for m in data["mean"]), tuple(2 * s for s in data["std"])
        return EncoderConfig(
            model=plain["architecture"], model_args=plain.get("model_args", {}), channels=channels,
            num_classes=plain["num_classes"], mean=mean, std=std, size=size, interpolation=data.get("interpolation", "bicubic"),
            projection=_is_clip_tower(plain["architecture"], data.get("tag", "")),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path.parent}/config.json' is none of timm's ({type(error).__name__}: {error})") from error


def settings_beside(path: Path) -> dict[str, Any]:
    """The settings of the encoder that are not in its weights file but in one beside it, as plain values for keys; empty for a
    file that holds them itself, since its hash covers them."""
    return {"beside": encoder_config(path).model_dump(mode="json", exclude_defaults=True)} if _of_timm(path) else {}


def _is_clip_tower(architecture: str, tag: str) -> bool:
    """Whether the head in timm is CLIP's projection. It is, unless the tower was fine-tuned (``_ft_``) as a classifier."""
    return "clip" in architecture and not {"ft", "in1k", "in12k"} & set(tag.split("_"))


def check_encoder(path: Path) -> None:
    """Raise :class:`UserError` naming what in ``path`` does not fit the model; reads no weights."""
    config = encoder_config(path)
    try:
        check_fit(lambda shape: Encoder(shape).network if _of_timm(path) else Encoder(shape), config, path)
    except (RuntimeError, TypeError) as error:  # timm's errors for an unknown architecture and for unknown arguments
        raise UserError(f"encoder '{path}' is a network that timm does not build ({error})") from error


def load_encoder(path: Path) -> Encoder:
    """φ with the weights of ``path``, frozen and in evaluation mode."""
    encoder = Encoder(encoder_config(path))
    load_into(encoder.network if _of_timm(path) else encoder, path)
    return encoder.eval().requires_grad_(False)


def known_classes(path: Path) -> tuple[str, ...]:
    """The classes of φ's own classifier by index; empty if φ has no classifier or the file does not name the classes."""
    if _of_timm(path):
        shape = encoder_config(path)
        return imagenet_wnids() if shape.num_classes == len(imagenet_wnids()) and not shape.projection else ()
    return tuple(map(composed, filter(None, read_metadata(path, "encoder").get("classes", "").split("\n"))))


def class_positions(path: Path, class_names: Sequence[str], asked_by: str) -> list[int]:
    """Index of each class in φ's own classifier, by name. Raises :class:`UserError` if φ has no classifier or the classifier
    does not know a class."""
    known = known_classes(path)
    if unknown := [name for name in class_names if name not in known]:
        raise UserError(
            f"encoder '{path}' has no classifier that knows '{unknown[0]}', which {asked_by} asks; "
            "choose one that was trained on these classes, or do without"
        )
    return [known.index(name) for name in class_names]


@cache
def embedding_cost(shape: str, size: int) -> tuple[float, int]:
    """Floating-point operations of φ on one image, counted on a model without weights, and the number of its features.

    ``shape`` is an :class:`EncoderConfig` as JSON. Raises :class:`UserError` for a network that timm does not have, that does
    not take these arguments or that does not take images of this size.
    """
    config = EncoderConfig.model_validate_json(shape)
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            encoder = Encoder(config).eval()
            encoder(torch.zeros(1, config.channels, size, size))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        with_arguments = f" with model_args={config.model_args}" if config.model_args else ""
        raise UserError(
            f"network '{config.model}' of timm{with_arguments} cannot be used for {config.channels} × {size} × {size} images "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); name another"
        ) from error
    return float(counter.get_total_flops()), encoder.dim


@cache
def uses_batch_norm(shape: str) -> bool:
    """Whether an encoder with the settings ``shape`` (:class:`EncoderConfig` as JSON) has layers of batch norm."""
    with torch.device("meta"):
        return has_batch_norm(Encoder(EncoderConfig.model_validate_json(shape)))
