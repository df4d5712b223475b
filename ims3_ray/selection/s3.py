"""Selective Subgroup Sampling (S3, section 4.2) as a selector: it chooses one subgroup of each class by Eq. 10."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from ims3_ray.component import Section
from ims3_ray.selection.base import SubgroupSelection, SubgroupSelector
from ims3_ray.selection.subgroups import Coupling, select_subgroups


class S3Config(Section):
    """Selective Subgroup Sampling (section 4.2, Eq. 10)."""

    alpha: float = Field(default=0.4, ge=0)
    """Weight α of proximity to the class's own real centroid (Eq. 10). Only the ratio α : β matters."""
    beta: float = Field(default=0.9, ge=0)
    """Weight β of distance from the candidates of the other classes (Eq. 10)."""
    coupling: Coupling = "pool"
    """`pool`: repulsion from all candidates of the other classes, Eq. 10 as printed. `selected`: from their selected groups.
    `released`: the same with the weights of the authors' code, in which β weighs (C−1)/2 times as much for C classes."""
    choose: Literal["best", "worst"] = "best"
    """`worst` chooses the subgroup of highest instead of lowest objective, which shows how much the choice matters. The
    reported lower bound stays that of the best choice."""

    @model_validator(mode="after")
    def _possible(self) -> S3Config:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0, so every subgroup scores the same; raise one of them")
        if self.choose == "worst" and self.coupling != "pool":
            raise ValueError(f"choose: worst is for coupling: pool, not for {self.coupling}")
        return self


class S3(SubgroupSelector):
    """Chooses by Eq. 10 subgroups close to the real centroid of their class and far from candidates of the other classes."""

    name = "s3"
    Config = S3Config

    def select(self, candidates_CGD: Tensor, references_CD: Tensor) -> SubgroupSelection:
        c = self.config
        found = select_subgroups(candidates_CGD, references_CD, alpha=c.alpha, beta=c.beta, coupling=c.coupling)
        if c.choose == "best":
            return found
        worst = found.score_CG.max(dim=1)
        return replace(found, groups=worst.indices, objective=worst.values.sum().item())
