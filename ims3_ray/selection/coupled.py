"""The coupled form of Eq. 10, in which the selected subgroups repel each other: coordinate descent from several starts.

Shape letters: C classes, G candidate subgroups per class, D features, S starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.selection.distances import log_distance

TABLE_VALUES = 2**27
"""The most pairs of candidates that are kept in a table, which then takes 1 GiB."""

START_PAIRS = 3e7
"""Budget of pairs that sets the number of random starts: a start takes C²G pairs, and there are between 1 and
:data:`MOST_STARTS` starts. With many classes each pair has little weight, the objective is nearly separable and one start
suffices; with few classes starts cost almost nothing."""

MOST_STARTS = 32


class _Rivals:
    """Sums of ``log(1 − σ)`` between a class's candidates and the selected subgroups of the other classes."""

    def __init__(self, c_CGD: Tensor, groups_SC: Tensor) -> None:
        self.c = c_CGD
        self.chosen_SCD = c_CGD[torch.arange(len(c_CGD), device=c_CGD.device), groups_SC]

    def sum(self, i: int) -> Tensor:
        """The sum for each candidate of class i in each start, [S, G]."""
        pairs = torch.stack([log_distance(self.c[i], chosen_CD) for chosen_CD in self.chosen_SCD])
        pairs[:, :, i] = 0
        return pairs.sum(dim=2)

    def move(self, i: int, starts: Tensor, old: Tensor, new: Tensor) -> None:
        """In the given ``starts``, class i now selects subgroup ``new`` instead of ``old``."""
        self.chosen_SCD[starts, i] = self.c[i, new]


class _TabledRivals:
    """As :class:`_Rivals`, but from a table of all pairs: the sums are stored and updated with every move."""

    def __init__(self, pairs_CGCG: Tensor, groups_SC: Tensor) -> None:
        self.pairs = pairs_CGCG
        classes = torch.arange(len(pairs_CGCG), device=pairs_CGCG.device)
        self.sums_SCG = torch.stack([pairs_CGCG[classes, groups].sum(dim=0) for groups in groups_SC])

    def sum(self, i: int) -> Tensor:
        return self.sums_SCG[:, i]

    def move(self, i: int, starts: Tensor, old: Tensor, new: Tensor) -> None:
        self.sums_SCG[starts] += self.pairs[i, new] - self.pairs[i, old]


def buffer_for_pairs(C: int, G: int, device: torch.device) -> Tensor | None:
    """An empty table for all pairs of candidates, float64 [C, G, C, G]; None where there are too many pairs."""
    return torch.empty(C, G, C, G, dtype=torch.float64, device=device) if (C * G) ** 2 <= TABLE_VALUES else None


def descend(
    c_CGD: Tensor, pairs_CGCG: Tensor | None, attraction_CG: Tensor, beta: float, separable: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimise ``Σ_i [attraction_i − β/(C−1) Σ_{j≠i} log(1 − σ(c_i, c_j))]`` over one subgroup per class, C > 1.

    Coordinate descent from the ``separable`` optimum and from random starts: one class after another takes its best subgroup
    while the other classes keep theirs, until no class changes. Each result is a local optimum. Returned are the groups [C]
    of the best one and the mean ``log(1 − σ)`` between every candidate and these groups, [C, G].
    """
    C, G, _ = c_CGD.shape
    random_starts = int(min(MOST_STARTS, max(1, START_PAIRS // (C * C * G))))
    drawn = torch.randint(G, (random_starts, C), generator=torch.Generator().manual_seed(0)).to(c_CGD.device)
    groups_SC = torch.cat([separable[None], drawn])
    rivals = _Rivals(c_CGD, groups_SC) if pairs_CGCG is None else _TabledRivals(pairs_CGCG, groups_SC)
    starts = torch.arange(len(groups_SC), device=groups_SC.device)
    # A pair is part of both classes' sums, so a move of class i changes the objective by twice its own repulsion.
    weight = beta / (C - 1)
    moved = True
    while moved:
        moved = False
        for i in range(C):
            cost_SG = attraction_CG[i] - 2 * weight * rivals.sum(i)
            low, best = cost_SG.min(dim=1)
            now = groups_SC[:, i]
            better = low < cost_SG[starts, now] - 1e-12
            if better.any():
                which, old, new = starts[better], now[better], best[better]
                rivals.move(i, which, old, new)
                groups_SC[which, i] = new
                moved = True
    repulsion_SCG = torch.stack([rivals.sum(i) for i in range(C)], dim=1) / (C - 1)
    score = (attraction_CG - beta * repulsion_SCG).gather(2, groups_SC[:, :, None]).sum(dim=(1, 2))
    winner = int(score.argmin())
    return groups_SC[winner], repulsion_SCG[winner]
