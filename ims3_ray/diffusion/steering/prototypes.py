"""Starts of sampling at prototypes, D4M (Su et al. 2024, arXiv 2407.15138) with a class-conditional generator: each sample
begins at the centre of a cluster of the class's real latents, which is noised part of the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field

from ims3_ray.component import Section
from ims3_ray.diffusion.steering.base import REMEMBERED, Shards, Steering


class Prototypes(Steering):
    """Starts sample i of a class at the centre of cluster i mod K of its real images (k-means with k = K)."""

    name, source, option, switch = "prototypes", "modes", "around", "strength"

    class Config(Section):
        """Start of sampling (D4M): centre i mod K of the class's real images (k-means with k = K) for candidate i, noised."""

        strength: float = Field(default=0.0, ge=0, le=1)
        """Share of the sampling steps for which the centre is noised and then sampled; D4M uses 0.7, and 0 starts from pure
        noise."""

    def __init__(self, config: Config, k: int, seed: int, steps: int, shards: Shards, device: str) -> None:
        super().__init__(config, k, seed, steps, shards, device)
        self._modes_of = lru_cache(REMEMBERED)(lambda label: torch.cat([shard["modes"] for shard in shards(label)]))

    @classmethod
    def share(cls, config: Config) -> float:
        return config.strength

    @classmethod
    def title(cls, config: Config, k: int) -> str:
        return f"from {k} prototypes"

    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        centres = self._modes_of(label)[[index % self.k for index in indices]]
        return {"around": centres, "first": max(0, int(self.steps * self.config.strength) - 1)}
