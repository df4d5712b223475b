"""What an actor of the pool computes from a unit's images: features of φ, or moments of latents."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.data.hub import parquet_bytes
from ims3_ray.data.transforms import to_signed
from ims3_ray.models.autoencoder import load_autoencoder
from ims3_ray.models.encoder import load_encoder
from ims3_ray.stages.base import pack_tensors

Derive = Callable[[Tensor], tuple[str, bytes]]
"""uint8 pixels [n, C, H, W] → (suffix, content) of the unit's shard."""


class Features:
    """φ of each image, float32 [n, D], as safetensors."""

    batch = 250

    def __init__(self, weights: Path, device: str) -> None:
        self.encoder, self.device = load_encoder(weights).to(device), device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[str, bytes]:
        parts = [self.encoder(to_signed(part)).float().cpu() for part in _batches(pixels, self.batch, self.device)]
        features = torch.cat(parts) if parts else torch.zeros(0, self.encoder.dim)
        return "safetensors", pack_tensors(features=features)


class Latents:
    """Mean and log-variance of each image's latents, float16 [n, flips, C, h, w], as Parquet; the second flip is mirrored.

    With the moments cached no epoch encodes again, and each draws its own sample as if it did.
    """

    batch = 8

    def __init__(self, weights: Path, device: str, flips: int) -> None:
        self.autoencoder, self.device, self.flips = load_autoencoder(weights).to(device), device, flips

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> tuple[str, bytes]:
        parts: dict[str, list[Tensor]] = {"mean": [], "log_variance": []}
        for part in _batches(pixels, self.batch, self.device):
            signed = to_signed(part)
            moments = [self.autoencoder.moments(x) for x in (signed, signed.flip(-1))[: self.flips]]
            for name, tensors in zip(parts, zip(*moments, strict=True), strict=True):
                parts[name].append(torch.stack(tensors, dim=1).half().cpu())
        columns = {name: _column(torch.cat(found)) for name, found in parts.items() if found}
        return "parquet", parquet_bytes(pa.table(columns))


def read_latents(artifact: Artifact, units: list[str]) -> dict[str, Tensor]:
    """``mean`` and ``log_variance``, float16 [n, flips, C, h, w], of a class's units in order of their numbers."""
    found: dict[str, list[Tensor]] = {"mean": [], "log_variance": []}
    for unit in units:
        table = pq.read_table(io.BytesIO(artifact.read(f"{unit}.parquet")))
        for name in found.keys() & set(table.column_names):
            column = table[name].combine_chunks()
            found[name].append(torch.from_numpy(np.array(column.to_numpy_ndarray())))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _batches(pixels: Tensor, size: int, device: str) -> list[Tensor]:
    """``pixels`` in batches whose shapes depend on their number alone, so that a unit done again gives the same bytes."""
    return [part.to(device) for part in pixels.split(size)] if len(pixels) else []


def _column(tensor: Tensor) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(tensor.numpy())
