"""Latents of the training images, encoded once for all epochs, for generators that work on latents."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ims3_ray.config import RunConfig
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.engine.images import Derive, Derived, ImageStore, Produced, batches
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.pool import DerivedStage
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import parquet_bytes
from ims3_ray.io.storage import Storage
from ims3_ray.models.autoencoder import AT_ONCE, encoded, encoding_flops, load_autoencoder
from ims3_ray.models.checkpoints import first_not_finite
from ims3_ray.stages.encode import Encode


@dataclass(eq=False)
class EncodeLatents(DerivedStage):
    """Encodes real images into latents: one shard per unit of images, made by :class:`Latents`."""

    name, version = "latents", 2

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> EncodeLatents | None:
        """Plan the stage; returns None for a generator that works on pixels."""
        models = planner.models(config)
        if models.autoencoder is None or models.autoencoder_weights is None:
            return None
        images = Encode.plan(planner, "train", models.data_at_its_size)
        flips = 2 if config.finetune.flip else 1
        flops = images.images * flips * encoding_flops(models.autoencoder, models.image_size)
        return planner.add(
            cls(
                "encode latents",
                {"autoencoder": models.autoencoder_weights.digest, "flips": flips, **models.autoencoder.version},
                {"images": images},
                units=images.units, images=images.images, flops=flops, weights={"autoencoder": models.autoencoder_weights},
                stored=2 * flips * images.images * models.latent_bytes,
            )
        )  # fmt: skip

    def derive(self, storage: Storage) -> Callable[[str], Derive]:
        return partial(_latents, self.weights["autoencoder"], self.params["flips"])


class Latents:
    """Computes mean and log-variance of each image's latents, float16 [n, flips, C, h, w], as Parquet; the second flip is
    mirrored.

    Since the moments are stored, no epoch encodes the images again, and each epoch still draws its own sample.
    """

    def __init__(self, weights: Path, device: str, flips: int) -> None:
        self.autoencoder, self.device, self.flips = load_autoencoder(weights).to(device), device, flips

    def __call__(self, unit: str, produced: Produced) -> Derived:
        found = encoded(self.autoencoder, batches(produced.pixels, AT_ONCE, self.device), self.flips == 2)
        if bad := first_not_finite(found):
            raise ValueError(f"the autoencoder gives a {bad.replace('_', ' ')} that is not finite in half precision")
        return Derived("parquet", parquet_bytes(pa.table({name: _column(values) for name, values in found.items()})))


def read_latents(artifact: Artifact, units: list[str]) -> dict[str, Tensor]:
    """``mean`` and ``log_variance``, float16 [n, flips, C, h, w], of a class's units in order of their numbers."""
    found: dict[str, list[Tensor]] = {"mean": [], "log_variance": []}
    for unit in units:
        table = pq.read_table(io.BytesIO(artifact.read(f"{unit}.parquet")))
        for name in found.keys() & set(table.column_names):
            column = table[name].combine_chunks()
            found[name].append(torch.from_numpy(np.array(column.to_numpy_ndarray())))
    return {name: torch.cat(parts) for name, parts in found.items()}


def read_images(
    pixels: ImageStore, latents: Artifact | None, classes: list[tuple[int, list[str]]], flip: bool,
    captions: list[str] | None = None,
) -> CleanImages:  # fmt: skip
    """The images of some classes, each given as (label of the generator, units), from their latents if there are any, with
    their ``captions`` in the same order."""
    if latents is None:
        parts = [{"pixels": pixels.read_units(units)} for _, units in classes]
    else:
        parts = [read_latents(latents, units) for _, units in classes]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [len(next(iter(part.values()))) for part in parts]
    labels = torch.cat([torch.full((n,), label) for (label, _), n in zip(classes, counts, strict=True)])
    return CleanImages(tensors, labels, flip, captions)


def _column(tensor: Tensor) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(tensor.numpy())


def _latents(weights: Weights, flips: int, device: str) -> Latents:
    return Latents(weights.path(), device, flips)
