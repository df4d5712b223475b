"""What an actor of the pool computes from a unit's images: features of φ, moments of latents, sums over inverted images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.data.hub import parquet_bytes
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.inverted_gaussian import invert_to_start
from ims3_ray.diffusion.sampling import guided
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.autoencoder import load_autoencoder
from ims3_ray.models.encoder import load_encoder
from ims3_ray.models.generator import load_generator
from ims3_ray.stages.base import Stage, pack_tensors, parse_unit
from ims3_ray.stages.images import Produced
from ims3_ray.stages.weights import Weights


@dataclass(frozen=True)
class Derived:
    """A unit's shard: the suffix of its name and its content."""

    suffix: str
    data: bytes


class Features:
    """φ of each image, float32 [n, D], as safetensors; beside it what φ's own classifier says of the class that the image is
    of, where that is asked for: ``log_probability`` float32 [n] and ``recognised`` bool [n]."""

    batch = 250

    def __init__(self, weights: Path, device: str, heads: Mapping[str, int] | None = None) -> None:
        self.encoder, self.device, self.heads = load_encoder(weights).to(device), device, heads
        """``heads``: label of a unit's class, as text, to the index of φ's classifier."""

    @torch.inference_mode()
    def __call__(self, unit: str, produced: Produced) -> Derived:
        """Raises ``ValueError`` naming the first image of which φ gives values that are not finite."""
        parts = [seen for part in _batches(produced.pixels, self.batch, self.device) for seen in self._look(part)]
        found = [features.float().cpu() for features, _ in parts]
        features = torch.cat(found) if found else torch.zeros(0, self.encoder.dim)
        if (bad := (~features.isfinite().all(dim=1)).nonzero()).numel():
            raise ValueError(f"φ gives values that are not finite for {produced.names[int(bad[0])]}")
        tensors = {"features": features}
        if self.heads is not None:
            index = self.heads[str(parse_unit(unit)[0])]
            scores = [logits.float().cpu() for _, logits in parts] or [torch.zeros(0, index + 1)]
            log_probability = torch.cat(scores).log_softmax(dim=1)
            tensors["log_probability"] = log_probability[:, index]
            tensors["recognised"] = log_probability.argmax(dim=1) == index
        return Derived("safetensors", pack_tensors(**tensors))

    def _look(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features and class scores, in smaller batches where memory does not suffice: φ's are independent of one another."""
        try:
            return [self.encoder.look(to_signed(pixels))]
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        torch.cuda.empty_cache()
        self.batch = -(-len(pixels) // 2)
        return [seen for part in pixels.split(self.batch) for seen in self._look(part)]


class Latents:
    """Mean and log-variance of each image's latents, float16 [n, flips, C, h, w], as Parquet; the second flip is mirrored.

    With the moments cached no epoch encodes again, and each draws its own sample as if it did.
    """

    batch = 8

    def __init__(self, weights: Path, device: str, flips: int) -> None:
        self.autoencoder, self.device, self.flips = load_autoencoder(weights).to(device), device, flips

    @torch.inference_mode()
    def __call__(self, unit: str, produced: Produced) -> Derived:
        parts: dict[str, list[Tensor]] = {"mean": [], "log_variance": []}
        for part in _batches(produced.pixels, self.batch, self.device):
            signed = to_signed(part)
            moments = [self.autoencoder.moments(x) for x in (signed, signed.flip(-1))[: self.flips]]
            for name, tensors in zip(parts, zip(*moments, strict=True), strict=True):
                parts[name].append(torch.stack(tensors, dim=1).half().cpu())
        columns = {name: _column(torch.cat(found)) for name, found in parts.items() if found}
        return Derived("parquet", parquet_bytes(pa.table(columns)))


class Inverted:
    """Sums over a unit's real images, inverted by the generator to where samples shall start (D3HR): ``total`` and ``squares``
    float64 [C, h, w], ``count`` int64, as safetensors."""

    batch = 50

    def __init__(self, weights: Mapping[str, Weights], device: str, params: Mapping[str, Any]) -> None:
        self.params, self.device, self.schedule = params, device, NoiseSchedule()
        dtype = torch.bfloat16 if params["precision"] == "bf16" else torch.float32
        self.model = load_generator(weights["generator"].path()).to(device, dtype)
        self.autoencoder = load_autoencoder(weights["autoencoder"].path()).to(device) if "autoencoder" in weights else None

    @torch.inference_mode()
    def __call__(self, unit: str, produced: Produced) -> Derived:
        p, model = self.params, self.model
        label = torch.tensor([p["labels"][str(parse_unit(unit)[0])]], device=self.device)
        shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
        total, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for part in _batches(produced.pixels, self.batch, self.device):
            z = self._invert(to_signed(part), label).double().cpu()
            total, squares = total + z.sum(dim=0), squares + z.square().sum(dim=0)
        count = torch.tensor(len(produced.pixels))
        return Derived("safetensors", pack_tensors(total=total, squares=squares, count=count))

    def _invert(self, signed: Tensor, label: Tensor) -> Tensor:
        """In smaller batches where memory does not suffice: images are inverted independently of one another."""
        p, model = self.params, self.model
        try:
            z0 = signed
            if self.autoencoder is not None:
                z0 = torch.cat([self.autoencoder.moments(part)[0] for part in signed.split(Latents.batch)])
            predict = guided(
                model, label.expand(len(z0)), model.config.null_label, p["cfg_scale"], p["cfg_channels"],
                cfg_interval=tuple(p["cfg_interval"]),
            )  # fmt: skip
            return invert_to_start(predict, z0, self.schedule, p["steps"], p["until"])
        except torch.OutOfMemoryError:
            if len(signed) == 1:
                raise
        torch.cuda.empty_cache()
        self.batch = -(-len(signed) // 2)
        return torch.cat([self._invert(part, label) for part in signed.split(self.batch)])


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


Derive = Callable[[str, Produced], Derived]


def derive_of(stage: Stage) -> Callable[[str], Derive]:
    """What an actor builds for itself when it starts, on its device, to derive ``stage`` from images."""
    if stage.kind == "inverted":
        return partial(_inverted, stage.weights, stage.params)
    if stage.kind == "latents":
        return partial(_latents, stage.weights["autoencoder"], stage.params["flips"])
    return partial(_features, stage.weights["encoder"], stage.params.get("heads"))


def _latents(weights: Weights, flips: int, device: str) -> Latents:
    return Latents(weights.path(), device, flips)


def _inverted(weights: Mapping[str, Weights], params: Mapping[str, Any], device: str) -> Inverted:
    return Inverted(weights, device, params)


def _features(weights: Weights, heads: Mapping[str, int] | None, device: str) -> Features:
    return Features(weights.path(), device, heads)
