"""Moment matching, the criterion of D3HR's group sampling: the set whose mean, standard deviation and skewness are closest to
those of the real images. D3HR compares latents that are inverted to noise; this selector, like all others, compares features
of φ."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.component import Section
from ims3_ray.selection.base import ClassImages, ClassSelector

CHUNK_VALUES = 2**24
"""The most feature values that are gathered at a time."""


class MomentMatching(ClassSelector):
    name = "moments"
    needs = frozenset({"features", "references"})
    draws = True

    class Config(Section):
        """Selection by moment matching."""

        draws: int = Field(default=10_000, ge=1)
        """Number of random sets of which the best is chosen; not used where a whole subgroup is chosen."""
        skewness: float = Field(default=0.1, ge=0)
        """Weight of the skewness; mean and standard deviation have weight 1."""

    def images(self, images: ClassImages, k: int) -> Tensor:
        sets_SK = torch.stack([torch.randperm(images.count, generator=images.rng)[:k] for _ in range(self.config.draws)])
        return sets_SK[self.cost(images, sets_SK).argmin()]

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """``‖μ_S − μ‖ + ‖σ_S − σ‖ + w·‖γ_S − γ‖``, where each moment is taken over the images, feature by feature."""
        real = moments(images.references_MD)
        at_once = max(1, CHUNK_VALUES // (sets_SK.shape[1] * images.features_ND.shape[1]))
        costs = []
        for part in sets_SK.split(at_once):
            mean, std, skewness = (
                (mine - its).norm(dim=1) for mine, its in zip(moments(images.features_ND[part]), real, strict=True)
            )
            costs.append(mean + std + self.config.skewness * skewness)
        return torch.cat(costs)


def moments(features_SKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and skewness over the second last dimension; a feature that does not vary has skewness 0."""
    mean = features_SKD.mean(dim=-2)
    centred = features_SKD - mean.unsqueeze(-2)
    std = centred.square().mean(dim=-2).sqrt()
    varies = std > 1e-12
    skewness = centred.pow(3).mean(dim=-2) / std.pow(3).where(varies, torch.ones_like(std))
    return mean, std, skewness.where(varies, torch.zeros_like(skewness))
