"""Herding (Welling 2009): each image is chosen to bring the mean of the chosen images closest to that of the real images."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, ClassSelector


class Herding(ClassSelector):
    name = "herding"
    needs = frozenset({"features", "references"})

    def images(self, images: ClassImages, k: int) -> Tensor:
        """Step n = 0, 1, … adds ``argmin_x ‖(n+1)·μ − Σ_{s∈S} φ(s) − φ(x)‖`` over the images not yet chosen."""
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
        """The distance between the mean of a set and the mean of the real images."""
        return (images.features_ND[sets_SK].mean(dim=1) - images.references_MD.mean(dim=0)).norm(dim=1)
