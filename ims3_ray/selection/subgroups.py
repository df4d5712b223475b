"""Selective Subgroup Sampling: the choice of one candidate subgroup per class by Eq. 10.

Shape letters: C classes, G candidate subgroups per class, D features.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.selection.base import SubgroupSelection
from ims3_ray.selection.coupled import buffer_for_pairs, descend
from ims3_ray.selection.distances import log_distance, pool_tables

Coupling = Literal["pool", "selected", "released"]


def centroid(features_ND: Tensor) -> Tensor:
    """Eq. 8 and 9: the ℓ2-normalised mean of ℓ2-normalised features, float64 [D]."""
    return normalize(normalize(features_ND.double(), dim=-1).mean(dim=0), dim=-1)


def select_subgroups(
    candidates_CGD: Tensor, references_CD: Tensor, *, alpha: float, beta: float, coupling: Coupling = "pool"
) -> SubgroupSelection:
    """Minimise Eq. 10 over one subgroup per class.

    ``coupling="pool"`` is Eq. 10 as printed. Its second sum runs over all candidates of the other classes, so the objective
    separates and the exact optimum is one argmin per class (ties: lowest index). ``coupling="selected"`` sums over the
    selected subgroups of the other classes, normalised by C−1. It is solved by coordinate descent from the separable optimum
    and random starts; ``gap`` bounds how much better the optimum can be. ``coupling="released"`` is the same with the weights
    of the authors' code, which counts each pair of classes once and does not normalise, so that β weighs (C−1)/2 times as
    much. Inputs need not be normalised. Raises ``ValueError`` for shapes that do not match, values that are not finite, or
    weights that are negative or both zero.
    """
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise ValueError(f"alpha and beta must be >= 0 and not both 0, not {alpha} and {beta}")
    if coupling not in get_args(Coupling):
        raise ValueError(f"coupling must be one of {', '.join(get_args(Coupling))}, not {coupling!r}")
    coupled = coupling != "pool" and len(candidates_CGD) > 1 and beta > 0
    C, G = candidates_CGD.shape[:2]
    if coupled and coupling == "released":
        beta *= (C - 1) / 2
    pairs = buffer_for_pairs(C, G, candidates_CGD.device) if coupled else None
    proximity, repulsion, farthest = scored(candidates_CGD, references_CD, pairs)
    score = alpha * proximity - beta * repulsion
    groups = score.argmin(dim=1)
    best = score.gather(1, groups[:, None]).sum().item()
    if not coupled:
        return SubgroupSelection(groups, best, best, proximity, repulsion, score)
    total = alpha + beta  # scaled to sum to 1: the descent's tolerance is absolute, and only the ratio may matter
    c = normalize(candidates_CGD.double(), dim=-1)
    groups, repulsion = descend(c, pairs, alpha / total * proximity, beta / total, groups)
    score = alpha * proximity - beta * repulsion
    objective = score.gather(1, groups[:, None]).sum().item()
    # Each class is given its best subgroup and, of each other class, the farthest candidate: no choice can score below this.
    bound = (alpha * proximity - beta * farthest).min(dim=1).values.sum().item()
    return SubgroupSelection(groups, objective, bound, proximity, repulsion, score)


def scored(candidates_CGD: Tensor, references_CD: Tensor, pairs_CGCG: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of Eq. 10, float64 [C, G] each: proximity to the reference, repulsion from all candidates of the other
    classes, and repulsion from the farthest candidate of each. ``pairs_CGCG`` is as in :func:`pool_tables`. Raises
    ``ValueError`` for shapes that do not match, for values that are not finite and for zero vectors.
    """
    _check(candidates_CGD, references_CD)
    c, r = normalize(candidates_CGD.double(), dim=-1), normalize(references_CD.double(), dim=-1)
    proximity = torch.cat([log_distance(c[i], r[i : i + 1]).T for i in range(len(c))])
    return proximity, *pool_tables(c, pairs_CGCG)


def _check(candidates: Tensor, references: Tensor) -> None:
    if candidates.dim() != 3 or references.dim() != 2 or 0 in candidates.shape:
        raise ValueError(f"need candidates [C, G, D] and references [C, D], not {[*candidates.shape]}, {[*references.shape]}")
    if (candidates.shape[0], candidates.shape[2]) != tuple(references.shape):
        raise ValueError(f"candidates {[*candidates.shape]} and references {[*references.shape]} differ in C or D")
    for name, tensor in (("candidates", candidates), ("references", references)):
        norm = tensor.double().norm(dim=-1)
        if (bad := (~norm.isfinite()).nonzero()).numel():
            raise ValueError(f"{name} hold values that are not finite (at {bad[0].tolist()})")
        if (bad := (norm == 0).nonzero()).numel():
            raise ValueError(f"{name} hold a zero vector, which has no direction (at {bad[0].tolist()})")
