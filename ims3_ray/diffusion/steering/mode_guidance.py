"""Mode guidance, MGD3 (Chan-Santiago et al. 2025, arXiv 2505.18963): each sample of a class is guided towards one of the modes
of the class's real images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.component import Section
from ims3_ray.diffusion.samplers.base import Drift
from ims3_ray.diffusion.steering.base import REMEMBERED, Shards, Steering


def find_modes(latents_NCHW: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centres of k-means clusters of a class's latents, float32 [K, C, H, W], and their numbers of latents, int64 [K]; the
    largest clusters first.

    Raises ``ValueError`` for fewer latents than modes.
    """
    from sklearn.cluster import KMeans

    if len(latents_NCHW) < k:
        raise ValueError(f"{k} modes are to be found of {len(latents_NCHW)} images")
    found = KMeans(n_clusters=k, n_init=10, random_state=seed % 2**32).fit(latents_NCHW.flatten(1).numpy())
    sizes = torch.from_numpy(found.labels_).long().bincount(minlength=k)
    order = sizes.argsort(descending=True, stable=True)
    centres = torch.from_numpy(found.cluster_centers_).float()[order]
    return centres.reshape(k, *latents_NCHW.shape[1:]), sizes[order]


def toward_modes(modes_BCHW: Tensor, strength: float, until: float) -> Drift:
    """``−λ·(ẑ_0 − m)`` for each sample's own mode m, in units of σ_t; None in the last share ``until`` of the steps."""

    def drift(z0_BCHW: Tensor, noise_left: float) -> Tensor | None:
        return -strength * (z0_BCHW - modes_BCHW) if noise_left > until else None

    return drift


class ByModes(Steering):
    """Base of steerings in which sample i of a class belongs to mode i mod K."""

    source = "modes"

    def __init__(self, config: Any, k: int, seed: int, steps: int, shards: Shards, device: str) -> None:
        super().__init__(config, k, seed, steps, shards, device)
        self._modes_of = lru_cache(REMEMBERED)(lambda label: torch.cat([shard["modes"] for shard in shards(label)]))

    def modes(self, label: int, indices: Sequence[int]) -> Tensor:
        """The mode of each sample of a class, float32 [B, C, H, W]."""
        return self._modes_of(label)[[index % self.k for index in indices]]


class ModeGuidance(ByModes):
    """Guides sample i of a class towards mode i mod K."""

    name, option, switch = "mode_guidance", "drift", "strength"

    class Config(Section):
        """Mode guidance (MGD3) of candidate i of a class to mode i mod K of its real images (k-means with k = K)."""

        strength: float = Field(default=0.0, ge=0)
        """Strength λ of the guidance; MGD3 uses 0.1, and 0 turns it off."""
        until: float = Field(default=0.5, ge=0, le=1)
        """Share of the steps, at the end of sampling, that are not guided."""

    @classmethod
    def title(cls, config: Config, k: int) -> str:
        return f"guided to {k} modes"

    def options(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        modes = self.modes(label, indices).to(self.device)
        return {"drift": toward_modes(modes, self.config.strength, self.config.until)}
