"""Selection by the confidence of a classifier, as in CaO2: images that φ's own classifier classifies correctly, the most
confident first (CaO2 at 10 images per class) or the least confident first (at 50)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ims3_ray.selection.base import ClassImages, ClassSelector, lowest


class Confidence(ClassSelector):
    """Most confident images first. Misclassified images come last, also by the probability of their own class."""

    name = "confidence"
    needs = frozenset({"confidence"})
    least: ClassVar[bool] = False
    """Whether the least confident of the correctly classified images come first."""

    def images(self, images: ClassImages, k: int) -> Tensor:
        return lowest(self._rank(images), k)

    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """The mean rank of a set's images in the order in which they would be chosen one by one."""
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


class LeastConfidence(Confidence):
    """As :class:`Confidence`, with the least confident of the correctly classified images first."""

    name = "least_confidence"
    least = True
