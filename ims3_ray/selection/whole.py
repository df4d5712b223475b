"""All images of a class: the whole training split, which shows what a set could be worth at most."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, ClassSelector


class Whole(ClassSelector):
    """Takes every image, whatever K is. It is for real images alone."""

    name = "all"
    whole = True

    def images(self, images: ClassImages, k: int) -> Tensor:
        return torch.arange(images.count)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        raise NotImplementedError("all images are one set, so there are no sets to compare")
