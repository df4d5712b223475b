"""K images chosen at random: the usual baseline for real images."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, ClassSelector


class RandomK(ClassSelector):
    name = "random"
    draws = True

    def images(self, images: ClassImages, k: int) -> Tensor:
        return torch.randperm(images.count, generator=images.rng)[:k]

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        return torch.rand(len(sets_SK), generator=images.rng, dtype=torch.float64)
