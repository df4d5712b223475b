"""The first K images: generated images are independent draws, so this is the baseline without selection."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, ClassSelector


class FirstK(ClassSelector):
    name = "first"

    def images(self, images: ClassImages, k: int) -> Tensor:
        return torch.arange(k)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        return sets_SK[:, 0].double()
