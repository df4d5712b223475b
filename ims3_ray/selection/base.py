"""What every selector of images is: one class at a time, K images freely or one whole subgroup.

Shape letters: N images of a class, M real images of it, K images to choose, S sets of images, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

Per = Literal["image", "group"]
Need = Literal["features", "references", "confidence"]


@dataclass(frozen=True)
class ClassImages:
    """What a selector may look at. Features are ℓ2-normalised φ in float64; what a selector does not need may be missing."""

    count: int
    rng: Generator
    """Seeded for this class."""
    features: Tensor | None = None
    """[N, D]"""
    references: Tensor | None = None
    """Of the class's real images, [M, D]."""
    log_probability: Tensor | None = None
    """Of the class itself by φ's own classifier, float64 [N]."""
    recognised: Tensor | None = None
    """Whether that classifier gives the class the highest score, bool [N]."""

    @property
    def features_ND(self) -> Tensor:
        assert self.features is not None
        return self.features

    @property
    def references_MD(self) -> Tensor:
        assert self.references is not None
        return self.references


class Selector(ABC):
    """A way to choose K of N images of a class. Ties go to the lowest index."""

    needs: frozenset[Need] = frozenset()
    draws = False
    """Whether it draws at random."""

    @abstractmethod
    def images(self, images: ClassImages, k: int) -> Tensor:
        """Any K of the images, int64 [K], in the order of choice."""

    @abstractmethod
    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """Of sets of K images each, float64 [S]; the lowest is chosen."""

    def choose(self, images: ClassImages, k: int, per: Per) -> Tensor:
        """``per="group"``: the best of the subgroups gK … (g+1)K−1. Raises ``ValueError`` for fewer than K images."""
        if images.count < k:
            raise ValueError(f"{k} images are to be chosen of {images.count}")
        if per == "image":
            return self.images(images, k)
        groups_GK = torch.arange(images.count // k * k).reshape(-1, k)
        return groups_GK[self.cost(images, groups_GK).argmin()]


def lowest(cost_N: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` lowest values, the lowest first."""
    return cost_N.argsort(stable=True)[:k]
