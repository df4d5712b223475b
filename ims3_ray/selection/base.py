"""The interfaces of selectors: those that treat one class at a time, and those that compare the subgroups of all classes.

Shape letters: N images of a class, M real images of it, K images to choose, S sets of images, D features, C classes, G
candidate subgroups of a class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from ims3_ray.component import Component, Registry, Section, check_known

Per = Literal["image", "group"]
Need = Literal["features", "references", "confidence"]


@dataclass(frozen=True)
class ClassImages:
    """The input of a selector. Features are ℓ2-normalised outputs of φ in float64; fields that it does not need may be None."""

    count: int
    """Number N of images to choose from."""
    rng: Generator
    """Random generator, seeded for this class."""
    features: Tensor | None = None
    """Features of the images, [N, D]."""
    references: Tensor | None = None
    """Features of the class's real images, [M, D]."""
    log_probability: Tensor | None = None
    """Log-probability that φ's own classifier gives to the class, float64 [N]."""
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


class Selector(Component):
    """A way to choose K images of each class. An arm names it by ``select``; its settings are ``selection.NAME``."""

    registry = Registry["type[Selector]"]("selector", "ims3_ray.selection")
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the selector needs: features of the images, features of the real images, confidences of φ's own classifier."""
    draws: ClassVar[bool] = False
    """Whether the selector draws at random."""
    whole: ClassVar[bool] = False
    """Whether the selector takes all images of the training split, instead of K of each class."""

    def __init_subclass__(cls) -> None:
        check_known(cls, "needs", Need)
        super().__init_subclass__()

    def __init__(self, config: Section | None = None) -> None:
        self.config: Any = config or self.Config()


class ClassSelector(Selector, ABC):
    """Chooses K of the N images of a class, independently of the other classes. Ties go to the lowest index."""

    @abstractmethod
    def images(self, images: ClassImages, k: int) -> Tensor:
        """Choose K images one by one, without regard to subgroups: their indices, int64 [K], in the order of choice."""

    @abstractmethod
    def cost(self, images: ClassImages, sets_SK: Tensor) -> Tensor:
        """The cost of each of S sets of K images, float64 [S]; the set of lowest cost is chosen."""

    def choose(self, images: ClassImages, k: int, per: Per) -> Tensor:
        """Indices of K images: those of :meth:`images`, or for ``per="group"`` the best of the subgroups gK … (g+1)K−1.

        Raises ``ValueError`` for fewer than K images.
        """
        if images.count < k:
            raise ValueError(f"{k} images are to be chosen of {images.count}")
        if per == "image":
            return self.images(images, k)
        groups_GK = torch.arange(images.count // k * k).reshape(-1, k)
        return groups_GK[self.cost(images, groups_GK).argmin()]


class SubgroupSelector(Selector, ABC):
    """Chooses one subgroup of each class from the centroids of the subgroups of all classes."""

    needs = frozenset({"features", "references"})

    @abstractmethod
    def select(self, candidates_CGD: Tensor, references_CD: Tensor) -> SubgroupSelection:
        """The choice, given ℓ2-normalised float64 centroids of the candidate subgroups and of each class's real images.

        Raises ``ValueError`` for vectors that have no direction.
        """


@dataclass(frozen=True)
class SubgroupSelection:
    """The chosen subgroups, and the terms of the objective for every candidate."""

    groups: Tensor
    """Index of the chosen subgroup of each class, int64 [C]."""
    objective: float
    """Value of the objective for the choice; it is minimised."""
    lower_bound: float
    """A lower bound on the objective of any choice. It equals ``objective`` where the optimum is exact."""
    proximity_CG: Tensor
    """Proximity of each candidate to its class's reference, float64; for Eq. 10 ``log(1 − σ(c_ig, r_i))``: low means close."""
    repulsion_CG: Tensor
    """Distance of each candidate from the other classes, float64; for Eq. 10 a mean of ``log(1 − σ(c_ig, c_jh))``: high means
    far."""
    score_CG: Tensor
    """Contribution of each candidate to the objective; for Eq. 10 ``α·proximity − β·repulsion``."""

    @property
    def gap(self) -> float:
        """Difference between the objective and its lower bound; zero for a proven optimum."""
        return self.objective - self.lower_bound


def lowest(cost_N: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` lowest values, the lowest first."""
    return cost_N.argsort(stable=True)[:k]
