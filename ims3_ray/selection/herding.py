"""Herding (Welling 2009): images whose mean follows the mean of the real ones, each added where it closes the gap best."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, Selector


class Herding(Selector):
    needs = frozenset({"features", "references"})

    def images(self, images: ClassImages, k: int) -> Tensor:
        """Step n adds ``argmin_x ‖(n+1)·μ − Σ_{s∈S} φ(s) − φ(x)‖`` over the images that are left."""
        features_ND, mean_D = images.features_ND, images.references_MD.mean(dim=0)
        chosen: list[int] = []
        owed_D = torch.zeros_like(mean_D)
        left = torch.ones(images.count, dtype=torch.bool)
        for _ in range(k):
            owed_D = owed_D + mean_D
            distance_N = (owed_D - features_ND).norm(dim=1).where(left, torch.inf)
            chosen.append(int(distance_N.argmin()))
            left[chosen[-1]] = False
            owed_D = owed_D - features_ND[chosen[-1]]
        return torch.tensor(chosen)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """Distance between the means."""
        return (images.features_ND[sets_SK].mean(dim=1) - images.references_MD.mean(dim=0)).norm(dim=1)
