"""Images of a pool as they lie in its shards: raw pixels, PNG in Parquet, or latents that are decoded when they are read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from ims3_ray.artifacts import Artifact, Storage
from ims3_ray.data.hub import encode_png, image_table, parquet_bytes
from ims3_ray.data.transforms import to_pil, to_uint8
from ims3_ray.models.autoencoder import load_autoencoder
from ims3_ray.stages.base import Stage, pack_tensors, parse_unit
from ims3_ray.stages.weights import Weights

DECODED_AT_ONCE = 8
"""Latents per call of the autoencoder, whose activations are many times those of the generator. Fixed, and counted from the
start of a unit: an image that is decoded again is the same to the last bit."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Produced:
    """The images of a unit."""

    pixels: Tensor
    """uint8 [n, C, H, W], on the device that made them."""
    names: list[str]
    """By which a person finds each again."""
    broken: list[str] = field(default_factory=list)
    """Names of images that could not be decoded, and why. They are not among the pixels."""
    latents: Tensor | None = None
    """float16, of which the pixels were decoded."""
    batch: int | None = None
    """Images that were computed at a time, where memory did not suffice for the whole unit."""


class Decoder:
    """The autoencoder's second half on a device: latents [n, …] to uint8 pixels."""

    def __init__(self, weights: Path, device: str, precision: str) -> None:
        self.device, self.dtype = device, DTYPES[precision]
        self.model = load_autoencoder(weights).to(device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, self.dtype, memory_format=torch.channels_last)
        return torch.cat([to_uint8(self.model.decode(part).float()) for part in z.split(DECODED_AT_ONCE)]).contiguous()


@dataclass(frozen=True)
class ImageStore:
    """The shards of a stage that makes images, one per unit."""

    artifact: Artifact
    form: Literal["pixels", "png", "latents"]
    autoencoder: Weights | None = None
    precision: str = "fp32"

    @classmethod
    def of(cls, stage: Stage, storage: Storage) -> ImageStore:
        if stage.kind == "encode":
            return cls(stage.artifact(storage), "pixels")
        precision = stage.run.sampling.precision
        return cls(stage.artifact(storage), stage.params["store"], stage.weights.get("autoencoder"), precision)

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
        """What :meth:`read` needs where latents were stored."""
        return Decoder(self.autoencoder.path(), device, self.precision) if self.form == "latents" and self.autoencoder else None

    @property
    def suffix(self) -> str:
        return "parquet" if self.form == "png" else "safetensors"

    def read(self, unit: str, decoder: Decoder | None = None) -> Tensor:
        """uint8 pixels of a unit."""
        return self.unpack(self.artifact.read(f"{unit}.{self.suffix}"), decoder)

    def unpack(self, shard: bytes, decoder: Decoder | None = None, within: Sequence[int] | None = None) -> Tensor:
        """uint8 pixels of a shard, or of its images at the offsets ``within``."""
        if self.form == "png":
            rows = pq.read_table(io.BytesIO(shard), columns=["image"]).column("image")
            chosen = range(len(rows)) if within is None else within
            return torch.stack([_pixels(rows[offset].as_py()["bytes"]) for offset in chosen])
        tensors = load(shard)
        if decoder is None:
            return tensors["pixels"] if within is None else tensors["pixels"][list(within)]
        chunks = tensors["latents"].split(DECODED_AT_ONCE)
        chosen = range(len(tensors["latents"])) if within is None else within
        decoded = {number: decoder(chunks[number]) for number in sorted({offset // DECODED_AT_ONCE for offset in chosen})}
        return torch.stack([decoded[offset // DECODED_AT_ONCE][offset % DECODED_AT_ONCE] for offset in chosen]).cpu()


def first_index(units: Sequence[str], images: Mapping[str, int]) -> dict[str, int]:
    """Index within its class of the first image of each unit of a class, given in order of their numbers."""
    first, found = 0, {}
    for unit in units:
        found[unit] = first
        first += images[unit]
    return found


def _pixels(png: bytes) -> Tensor:
    array = np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)))
    return torch.from_numpy((array[None] if array.ndim == 2 else array.transpose(2, 0, 1)).copy())
