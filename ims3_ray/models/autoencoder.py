"""The autoencoder in whose latent space a generator works: diffusers' AutoencoderKL with the scaling of its config."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ims3_ray.data.transforms import to_signed
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.files import local_copy
from ims3_ray.io.hub import fetch, is_hub_id
from ims3_ray.models.checkpoints import json_metadata, load_into, read_json, read_metadata, weights_path

CLASS = "AutoencoderKL"
KIND = "autoencoder"
"""What this project's weights files call it. In the metadata of a generator that was trained on latents, it is the hash of the
file of their autoencoder."""
AT_ONCE = 8
"""Number of images or latents per call of an autoencoder, whose activations are many times as large as those of a generator. It
is fixed, and the calls start at the first image of a unit, so that encoding or decoding an image again gives the same bits."""
SCALE = 0.18215
"""Scaling factor of Stable Diffusion's latents."""
OWN_AUTOENCODER = "autoencoder.safetensors"
"""Name of a weights file of this project in a folder or on the hub. Such a file holds the config in its metadata."""
NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class Autoencoder(nn.Module):
    """Maps images in [−1, 1] to the moments of their latents, and latents back to images."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_config(config)
        self.scale = float(self.vae.config.scaling_factor)
        """Factor by which latents are multiplied, so that their variance is about one (0.18215 for Stable Diffusion's)."""
        self.shift = float(self.vae.config.get("shift_factor") or 0.0)
        """Value that is subtracted from latents before they are multiplied (0.0609 for Stable Diffusion 3's, 0 for most)."""
        if any(self.vae.config.get(name) is not None for name in ("latents_mean", "latents_std")):
            raise UserError(
                "the autoencoder normalises each channel of its latents (latents_mean, latents_std), as no generator here "
                "expects; choose the one that the generator was trained with"
            )

    @property
    def version(self) -> dict[str, float]:
        """What the key of an artifact holds of the autoencoder beside the hash of its weights: a shift, and a scale other than
        Stable Diffusion's."""
        shift = {"shift": self.shift} if self.shift else {}
        return {**shift, **({"scale": self.scale} if self.scale != SCALE else {})}

    @property
    def image_channels(self) -> int:
        return int(self.vae.config.in_channels)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def moments(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the scaled latents of images in [−1, 1], [B, latent_channels, H/factor, W/factor] each."""
        posterior = self.vae.encode(x_BCHW).latent_dist
        return (posterior.mean - self.shift) * self.scale, posterior.logvar + 2 * math.log(self.scale)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """The images, not clamped, of scaled latents."""
        return self.vae.decode(z_BCHW / self.scale + self.shift).sample


def autoencoder_path(reference: str) -> Path:
    """The weights file of an autoencoder: this project's own file, or the folder of a diffusers autoencoder, a pipeline's
    folder, or a hub id (downloaded to the hub's cache)."""
    folder = local_copy(reference)
    if not folder.exists() and is_hub_id(reference):
        folder = fetch(reference, ["config.json", *NAMES, "vae/*", OWN_AUTOENCODER], "autoencoder")
    if folder.name in NAMES and folder.is_file():  # diffusers' own file, whose config is beside it
        folder = folder.parent
    if not folder.is_dir():
        path = weights_path(reference)
        read_metadata(path, KIND)
        return path
    if (folder / OWN_AUTOENCODER).is_file():
        return folder / OWN_AUTOENCODER
    for inner in (folder, folder / "vae"):
        if (inner / "config.json").is_file() and read_json(inner / "config.json").get("_class_name") == CLASS:
            for name in NAMES:
                if (inner / name).is_file():
                    return inner / name
    raise UserError(
        f"autoencoder '{reference}' is a folder without {OWN_AUTOENCODER} and no diffusers {CLASS}, which has config.json and "
        f"{NAMES[0]}; or give a hub id such as stabilityai/sd-vae-ft-ema"
    )


def trained_on(generator: Path) -> str | None:
    """The hash of the file of the autoencoder on whose latents a generator was trained; None if its file does not say so."""
    return read_metadata(generator).get(KIND) if generator.suffix == ".safetensors" else None


def empty_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder in ``path`` on the meta device: tensors have shapes only, and no weights are read."""
    with torch.device("meta"):
        return _with_config(path)


def _with_config(path: Path) -> Autoencoder:
    """An autoencoder of the config of a weights file, which is in its metadata or beside it. Raises :class:`UserError` for a
    config that describes none."""
    config = json_metadata(path, "config", KIND) if _is_own(path) else read_json(path.with_name("config.json"))
    try:
        return Autoencoder(config)
    except UserError:
        raise
    except Exception as error:  # diffusers checks nothing: wrong values fail wherever they are used
        raise UserError(
            f"autoencoder '{path}' has a config that cannot be used ({first_line(error)}); fetch it again"
        ) from error


def _is_own(path: Path) -> bool:
    return path.name not in NAMES


def load_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder with its weights, frozen, in evaluation mode. Raises :class:`UserError` if the weights do not fit."""
    from diffusers import AutoencoderKL

    model = _with_config(path)
    if _is_own(path):
        load_into(model.vae, path)
        return model.eval().requires_grad_(False)
    try:
        model.vae, loaded = AutoencoderKL.from_pretrained(
            path.parent, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"autoencoder '{path}' does not load ({first_line(error)}); fetch it again") from error
    if missing := loaded["missing_keys"]:
        raise UserError(f"autoencoder '{path}' lacks {len(missing)} tensors, among them {min(missing)}; fetch it again")
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def encoded(autoencoder: Autoencoder, batches: Iterable[Tensor], flip: bool) -> dict[str, Tensor]:
    """``mean`` and ``log_variance`` of the latents of uint8 images, in half precision on the CPU, [n, flips, C, h, w]; with
    ``flip``, the second of two flips is that of the mirrored images. Both are empty if there are no images."""
    parts = {"mean": list[Tensor](), "log_variance": list[Tensor]()}
    for batch in batches:
        signed = to_signed(batch)
        moments = [autoencoder.moments(x) for x in ((signed, signed.flip(-1)) if flip else (signed,))]
        for found, flips in zip(parts.values(), zip(*moments, strict=True), strict=True):
            found.append(torch.stack(flips, dim=1).half().cpu())
    return {name: torch.cat(found) for name, found in parts.items() if found}


def encoding_flops(autoencoder: Autoencoder, size: int) -> float:
    """Floating-point operations of encoding one image of ``size`` × ``size`` pixels, counted on a model without weights."""
    with FlopCounterMode(display=False) as counter:
        autoencoder.moments(torch.zeros(1, autoencoder.image_channels, size, size, device="meta"))
    return float(counter.get_total_flops())


def decoding_flops(autoencoder: Autoencoder, size: int) -> float:
    """Floating-point operations of decoding one image from latents of ``size`` × ``size``, counted on a model without
    weights."""
    with FlopCounterMode(display=False) as counter:
        autoencoder.decode(torch.zeros(1, autoencoder.latent_channels, size, size, device="meta"))
    return float(counter.get_total_flops())
