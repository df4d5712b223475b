"""Confidence of a classifier, the selection of CaO2: images that φ's own classifier recognises, the surest first
(CaO2 at 10 images per class) or the least sure first (at 50)."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, Selector, lowest


class Confidence(Selector):
    """Images that the classifier takes for another class come last, the likeliest first."""

    needs = frozenset({"confidence"})

    def __init__(self, least: bool = False) -> None:
        self.least = least

    def images(self, images: ClassImages, k: int) -> Tensor:
        return lowest(self._rank(images), k)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """The mean place of its images in the order in which they would be chosen one by one."""
        place_N = self._rank(images).argsort(stable=True).argsort().double()
        return place_N[sets_SK].mean(dim=1)

    def _rank(self, images: ClassImages) -> Tensor:
        assert images.log_probability is not None
        assert images.recognised is not None
        surest = -images.log_probability.double()
        sought = -surest if self.least else surest
        mistaken = ~images.recognised
        behind = surest - surest.min() + sought.max() + 1
        return torch.where(mistaken, behind, sought)
