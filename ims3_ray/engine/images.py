"""Images of a pool: as actors produce them, and as shards store them (raw pixels, PNG in Parquet, latents)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from ims3_ray.data.transforms import scaled, to_pil, to_uint8
from ims3_ray.engine.shards import pack_tensors, parse_unit, read_class, read_many
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.models.autoencoder import AT_ONCE, load_autoencoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Produced:
    """The images of a unit."""

    pixels: Tensor
    """The images, uint8 [n, C, H, W], on the device that made them."""
    names: list[str]
    """Name of each image, by which a person can find it."""
    broken: list[str] = field(default_factory=list)
    """Names of images that could not be decoded, each with the reason. ``pixels`` does not hold these images."""
    latents: Tensor | None = None
    """The latents from which the pixels were decoded, float16; None if there are none."""
    transparent: int = 0
    """Number of images of which pixels were transparent."""
    batch: int | None = None
    """Number of images computed at a time if memory did not suffice for the whole unit; otherwise None."""


Producer = Callable[[str], Produced]
"""unit → its images: the function with which an actor produces them."""


@dataclass(frozen=True)
class Derived:
    """A shard that is computed from a unit's images: the suffix of its file name, and its content."""

    suffix: str
    data: bytes


Derive = Callable[[str, Produced], Derived]
"""(unit, its images) → the shard that is computed from them."""


class Decoder:
    """The decoding half of the autoencoder on a device. It maps latents [n, …] to uint8 pixels, which are scaled to ``size`` if
    that is given."""

    def __init__(self, weights: Path, device: str, precision: str, size: int | None = None) -> None:
        self.device, self.dtype, self.size = device, DTYPES[precision], size
        self.model = load_autoencoder(weights).to(device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, self.dtype, memory_format=torch.channels_last)
        images = (self.model.decode(part).float() for part in z.split(AT_ONCE))
        return torch.cat([to_uint8(scaled(each, self.size) if self.size else each) for each in images]).contiguous()


class Again(Protocol):
    """Makes the images of units that are not stored."""

    def __call__(self, unit: str) -> Produced: ...

    def at(self, unit: str, offsets: Sequence[int]) -> Tensor:
        """uint8 pixels of the images at ``offsets`` of a unit of which no image is broken."""


@dataclass(frozen=True)
class ImageStore:
    """The images of a stage that makes them, one shard per unit."""

    artifact: Artifact
    form: Literal["pixels", "png", "latents"]
    autoencoder: Weights | None = None
    precision: str = "fp32"
    size: int | None = None
    """Height and width to which decoded latents are scaled; None if they have that of the images."""
    again: Callable[[], Again] | None = None
    """Builds what makes the images again of units that were made but not stored; None if all are stored."""

    def is_stored(self, unit: str) -> bool:
        """Whether a committed unit has a shard."""
        return self.again is None or self.artifact.digest(unit) is not None

    @cached_property
    def _again(self) -> Again:
        assert self.again is not None
        return self.again()

    def write(self, unit: str, produced: Produced, encoders: Executor) -> str:
        """Store a unit; returns the SHA-256 of its shard."""
        if self.form == "latents":
            assert produced.latents is not None
            return self.artifact.write(f"{unit}.{self.suffix}", pack_tensors(latents=produced.latents))
        pixels = produced.pixels.cpu()
        if self.form == "pixels":
            return self.artifact.write(f"{unit}.{self.suffix}", pack_tensors(pixels=pixels))
        encoded = encoders.map(lambda image: encode_png(to_pil(image)), pixels)
        label = parse_unit(unit)[0]
        rows = [(png, f"{name}.png", label) for png, name in zip(encoded, produced.names, strict=True)]
        return self.artifact.write(f"{unit}.{self.suffix}", parquet_bytes(image_table(rows)))

    def decoder(self, device: str) -> Decoder | None:
        """The decoder that :meth:`read` needs if latents are stored; otherwise None."""
        if self.form != "latents" or self.autoencoder is None:
            return None
        return Decoder(self.autoencoder.path(), device, self.precision, self.size)

    @property
    def suffix(self) -> str:
        return "parquet" if self.form == "png" else "safetensors"

    def read(self, unit: str, decoder: Decoder | None = None) -> Tensor:
        """uint8 pixels of a unit."""
        if not self.is_stored(unit):
            return self._again(unit).pixels
        return self.unpack(self.artifact.read(f"{unit}.{self.suffix}"), decoder)

    def read_units(self, units: Sequence[str]) -> Tensor:
        """uint8 pixels of several units, such as those of a class, in order."""
        if self.form == "pixels" and all(map(self.is_stored, units)):
            return read_class(self.artifact, units, "pixels")
        return torch.cat([self.read(unit) for unit in units])

    def read_some(self, within: Mapping[str, Sequence[int]], decoder: Decoder | None = None) -> Tensor:
        """uint8 pixels of the images at some offsets of some units, in order."""
        if all(map(self.is_stored, within)):
            shards = read_many(self.artifact, list(within), self.suffix)
            return torch.cat([self.unpack(shard, decoder, within[unit]) for unit, shard in shards])
        return torch.cat([self._some(unit, offsets) for unit, offsets in within.items()])

    def _some(self, unit: str, offsets: Sequence[int]) -> Tensor:
        if self.is_stored(unit) or self.artifact.units[unit]["broken"]:
            return self.read(unit)[list(offsets)]
        return self._again.at(unit, offsets)

    def unpack(self, shard: bytes, decoder: Decoder | None = None, within: Sequence[int] | None = None) -> Tensor:
        """uint8 pixels of a shard, or of its images at the offsets ``within``."""
        if self.form == "png":
            return torch.stack([_pixels(png) for png in pngs_of(shard, within)])
        tensors = load(shard)
        if decoder is None:
            return tensors["pixels"] if within is None else tensors["pixels"][list(within)]
        chunks = tensors["latents"].split(AT_ONCE)
        chosen = range(len(tensors["latents"])) if within is None else within
        decoded = {number: decoder(chunks[number]) for number in sorted({offset // AT_ONCE for offset in chosen})}
        return torch.stack([decoded[offset // AT_ONCE][offset % AT_ONCE] for offset in chosen]).cpu()


def pngs_of(shard: bytes, within: Sequence[int] | None = None) -> list[bytes]:
    """The PNG images of a shard of the form ``png``, or those at the offsets ``within``."""
    rows = pq.read_table(io.BytesIO(shard), columns=["image"]).column("image")
    return [rows[offset].as_py()["bytes"] for offset in (range(len(rows)) if within is None else within)]


def _pixels(png: bytes) -> Tensor:
    array = np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)))
    return torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())


class Stored:
    """A producer that reads units which were stored before, so that another φ or an autoencoder can process them."""

    def __init__(self, store: ImageStore, device: str) -> None:
        self.store, self.decoder = store, store.decoder(device)
        self.on_host = self.decoder is None

    def __call__(self, unit: str) -> Produced:
        pixels = self.store.read(unit, self.decoder)
        return Produced(pixels, [f"image {offset} of unit {unit}" for offset in range(len(pixels))])


def batches(pixels: Tensor, size: int, device: str) -> list[Tensor]:
    """Split ``pixels`` into batches on ``device``. Their shapes depend on the number of images alone, so that computing a unit
    again gives the same bytes."""
    return [part.to(device) for part in pixels.split(size)] if len(pixels) else []
