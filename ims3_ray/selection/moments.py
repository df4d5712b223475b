"""Moment matching, the criterion of D3HR's group sampling: the set whose mean, standard deviation and skewness
are those of the real images. D3HR looks at latents that are inverted to noise; here it is features of φ, as for all
selectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, Selector

DRAWS = 10_000
"""Random sets of which the best is taken where any K images may be chosen."""

CHUNK_VALUES = 2**24
"""Features that are gathered at a time."""

SKEWNESS_WEIGHT = 0.1


class MomentMatching(Selector):
    needs = frozenset({"features", "references"})
    draws = True

    def images(self, images: ClassImages, k: int) -> Tensor:
        sets_SK = torch.stack([torch.randperm(images.count, generator=images.rng)[:k] for _ in range(DRAWS)])
        return sets_SK[self.cost(images, sets_SK).argmin()]

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """``‖μ_S − μ‖ + ‖σ_S − σ‖ + 0.1·‖γ_S − γ‖``, each moment over the images, feature by feature."""
        real = moments(images.references_MD)
        at_once = max(1, CHUNK_VALUES // (sets_SK.shape[1] * images.features_ND.shape[1]))
        costs = []
        for part in sets_SK.split(at_once):
            mean, std, skewness = (
                (mine - its).norm(dim=1) for mine, its in zip(moments(images.features_ND[part]), real, strict=True)
            )
            costs.append(mean + std + SKEWNESS_WEIGHT * skewness)
        return torch.cat(costs)


def moments(features_SKD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and skewness over the last dimension but one; a feature that does not vary has skewness 0."""
    mean = features_SKD.mean(dim=-2)
    centred = features_SKD - mean.unsqueeze(-2)
    std = centred.square().mean(dim=-2).sqrt()
    varies = std > 1e-12
    skewness = centred.pow(3).mean(dim=-2) / std.pow(3).where(varies, torch.ones_like(std))
    return mean, std, skewness.where(varies, torch.zeros_like(skewness))
