"""Starts of sampling at prototypes, D4M (Su et al. 2024, arXiv 2407.15138) with a class-conditional generator: each sample
begins at the centre of a cluster of the class's real latents, which is noised part of the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ims3_ray.component import Section
from ims3_ray.diffusion.steering.mode_guidance import ByModes


class Prototypes(ByModes):
    """Starts sample i of a class at the centre of cluster i mod K of its real images (k-means with k = K)."""

    name, option, switch = "prototypes", "around", "strength"

    class Config(Section):
        """Start of sampling (D4M): centre i mod K of the class's real images (k-means with k = K) for candidate i, noised."""

        strength: float = Field(default=0.0, ge=0, le=1)
        """Share of the sampling steps for which the centre is noised and then sampled; D4M uses 0.7, and 0 starts from pure
        noise."""

    @classmethod
    def share(cls, config: Config) -> float:
        return config.strength

    @classmethod
    def title(cls, config: Config, k: int) -> str:
        return f"from {k} prototypes"

    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        return {"around": self.modes(label, indices), "first": max(0, int(self.steps * self.config.strength) - 1)}
