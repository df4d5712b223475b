"""Selective Subgroup Sampling: one candidate subgroup per class by Eq. 10.

Shape letters: C classes, G candidate subgroups per class, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Coupling = Literal["pool", "selected"]


@dataclass(frozen=True)
class SubgroupSelection:
    """The chosen subgroups and what the objective says of every candidate."""

    groups: Tensor
    """Index of the chosen subgroup of each class, int64 [C]."""
    objective: float
    """Eq. 10 at the choice (minimised)."""
    lower_bound: float
    """No choice scores below this. Equals ``objective`` for ``coupling="pool"``, whose optimum is exact."""
    proximity_CG: Tensor
    """``log(1 − σ(c_ig, r_i))`` of each candidate, float64; low is close to the real centroid."""
    repulsion_CG: Tensor
    """Mean ``log(1 − σ(c_ig, c_jh))`` over the rivals j ≠ i that the coupling names, float64; high is far from them."""
    score_CG: Tensor
    """``α·proximity − β·repulsion``: the candidate's part of the objective."""


def centroid(features_ND: Tensor) -> Tensor:
    """Eq. 8 and 9: the ℓ2-normalised mean of ℓ2-normalised features, float64 [D]."""
    unit = torch.nn.functional.normalize(features_ND.double(), dim=-1)
    return torch.nn.functional.normalize(unit.mean(dim=0), dim=-1)


def select_subgroups(
    candidates_CGD: Tensor, references_CD: Tensor, *, alpha: float, beta: float, coupling: Coupling = "pool"
) -> SubgroupSelection:
    """Minimise Eq. 10 over one subgroup per class.

    ``coupling="pool"`` is Eq. 10 as printed. Its second sum runs over all candidates of the other classes, so the
    objective separates and the exact optimum is one argmin per class (ties: lowest index). ``coupling="selected"``
    sums over the selected subgroups of the other classes, normalised by C−1: coordinate descent from the
    separable optimum; ``lower_bound`` gives the gap. Inputs need not be normalised. Raises ``ValueError`` for
    shapes that do not match, values that are not finite, or weights that are negative or both zero.
    """
    _check(candidates_CGD, references_CD, alpha, beta)
    if coupling not in ("pool", "selected"):
        raise ValueError(f"coupling must be 'pool' or 'selected', not {coupling!r}")
    c = torch.nn.functional.normalize(candidates_CGD.double(), dim=-1)
    r = torch.nn.functional.normalize(references_CD.double(), dim=-1)
    proximity = _log_distance(c, r[:, None]).squeeze(-1)
    pairs = _pool_repulsion(c)
    score = alpha * proximity - beta * pairs
    groups = score.argmin(dim=1)
    if coupling == "pool" or len(c) == 1 or beta == 0:
        best = score.gather(1, groups[:, None]).sum().item()
        return SubgroupSelection(groups, best, best, proximity, pairs, score)
    groups, repulsion = _descend(c, alpha * proximity, beta, groups)
    score = alpha * proximity - beta * repulsion
    objective = score.gather(1, groups[:, None]).sum().item()
    return SubgroupSelection(groups, objective, _bound(c, alpha * proximity, beta), proximity, repulsion, score)


def _check(candidates: Tensor, references: Tensor, alpha: float, beta: float) -> None:
    if candidates.dim() != 3 or references.dim() != 2 or 0 in candidates.shape:
        raise ValueError(f"need candidates [C, G, D] and references [C, D], not {[*candidates.shape]}, {[*references.shape]}")
    if (candidates.shape[0], candidates.shape[2]) != tuple(references.shape):
        raise ValueError(f"candidates {[*candidates.shape]} and references {[*references.shape]} differ in C or D")
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise ValueError(f"alpha and beta must be >= 0 and not both 0, not {alpha} and {beta}")
    for name, tensor in (("candidates", candidates), ("references", references)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} hold values that are not finite")
        if (tensor.double().norm(dim=-1) == 0).any():
            raise ValueError(f"{name} hold a zero vector, which has no direction")


def _log_distance(u: Tensor, v: Tensor) -> Tensor:
    """``log(1 − σ)`` between rows of unit vectors, [.., N, D] and [.., M, D] to [.., N, M].

    1 − σ is taken as ½‖u − v‖², which keeps its digits where the cosine rounds to 1, and clamped above zero because a
    candidate that equals its reference would score −∞ and hide all others.
    """
    squared = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (squared / 2).clamp(min=torch.finfo(torch.float64).eps).log()


def _pool_repulsion(c_CGD: Tensor) -> Tensor:
    """Mean of ``log(1 − σ)`` from each candidate to all G candidates of each other class, [C, G].

    One class against all at a time: G·CG values are held, not (CG)². For C = 1 there is no rival and it is zero.
    """
    C, G, _ = c_CGD.shape
    if C == 1:
        return torch.zeros(C, G, dtype=c_CGD.dtype)
    every = c_CGD.flatten(0, 1)
    rows = []
    for i in range(C):
        distance = _log_distance(c_CGD[i], every).reshape(G, C, G)
        distance[:, i] = 0
        rows.append(distance.sum(dim=(1, 2)) / ((C - 1) * G))
    return torch.stack(rows)


def _descend(c_CGD: Tensor, attraction_CG: Tensor, beta: float, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinate descent on the coupled objective; returns the groups and the repulsion table at the end.

    A pair appears in both classes' sums, so moving class i changes the objective by twice its own repulsion.
    """
    C = len(c_CGD)
    groups = groups.clone()
    rows = torch.arange(C)

    def repulsion(i: int) -> Tensor:
        distance = _log_distance(c_CGD[i], c_CGD[rows, groups])
        distance[:, i] = 0
        return distance.sum(dim=1) / (C - 1)

    changed = True
    while changed:
        changed = False
        for i in range(C):
            cost = attraction_CG[i] - 2 * beta * repulsion(i)
            best = int(cost.argmin())
            if cost[best] < cost[groups[i]] - 1e-12:
                groups[i], changed = best, True
    return groups, torch.stack([repulsion(i) for i in range(C)])


def _bound(c_CGD: Tensor, attraction_CG: Tensor, beta: float) -> float:
    """``Σ_i min_g [α a_ig − β/(C−1) Σ_j max_h log(1 − σ(c_ig, c_jh))]``: every class granted its best rivals."""
    C, G, _ = c_CGD.shape
    every = c_CGD.flatten(0, 1)
    total = 0.0
    for i in range(C):
        farthest = _log_distance(c_CGD[i], every).reshape(G, C, G).amax(dim=2)
        farthest[:, i] = 0
        total += (attraction_CG[i] - beta * farthest.sum(dim=1) / (C - 1)).min().item()
    return total
