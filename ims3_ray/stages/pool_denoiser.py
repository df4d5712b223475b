"""The generator of a pool of candidates, as synthesis methods use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.config import SamplingConfig
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.engine.images import DTYPES, Decoder
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.models.autoencoder import AT_ONCE, load_autoencoder
from ims3_ray.stages.adapters import Adapters, GroupModels, Pretrained
from ims3_ray.synthesis.base import Given


@dataclass(frozen=True)
class PoolModels:
    """What a task needs to build the :class:`PoolDenoiser` of the pool from which a set was selected."""

    pretrained: Pretrained
    autoencoder: Weights | None
    adapters: Adapters | None
    pool: Artifact | None
    """Artifact with the latents of all candidates; None if they are not stored."""
    sampling: SamplingConfig
    labels: tuple[int, ...]
    first: tuple[Mapping[str, int], ...]
    """For each class: unit → index within the class of the unit's first image."""


class PoolDenoiser:
    """The :class:`ims3_ray.synthesis.base.Denoiser` of a pool: its generator, with the latents of its images."""

    def __init__(self, source: PoolModels, device: str) -> None:
        dtype = DTYPES[source.sampling.precision]
        self.source, self.device = source, device
        self.models = GroupModels(source.pretrained, source.adapters, device, dtype)
        vae = source.autoencoder
        self.decoder = Decoder(vae.path(), device, source.sampling.precision) if vae is not None else None
        self.schedule = self.models.generator.schedule

    def label(self, position: int) -> int:
        return self.source.labels[position]

    def predictor(self, position: int, count: int) -> Predictor:
        label = self.label(position)
        self.models.of_class(label).requires_grad_(False)
        return self.models.predictor(label, count)

    def latents(self, given: Given) -> Tensor:
        s = self.source
        if s.autoencoder is None:
            return to_signed(given.pixels)
        if s.pool is None:
            with torch.inference_mode():
                encode = load_autoencoder(s.autoencoder.path()).to(self.device).moments
                parts = given.pixels.split(AT_ONCE)
                return torch.cat([encode(to_signed(part.to(self.device)))[0].cpu() for part in parts]).clone()
        found, stored = [], dict[str, Tensor]()
        for position, index in zip(given.classes.tolist(), given.indices.tolist(), strict=True):
            unit, start = max(
                ((unit, start) for unit, start in s.first[position].items() if start <= index), key=lambda pair: pair[1]
            )
            if unit not in stored:
                stored[unit] = load(s.pool.read(f"{unit}.safetensors"))["latents"]
            found.append(stored[unit][index - start])
        return torch.stack(found).float()

    def decode(self, latents: Tensor) -> Tensor:
        return to_uint8(latents).cpu() if self.decoder is None else self.decoder(latents).cpu()
