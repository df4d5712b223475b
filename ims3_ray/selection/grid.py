"""Many selections by Eq. 10 from the same candidates; computations that they share are done once.

Shape letters: C classes, G candidate subgroups per class, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ims3_ray.selection.subgroups import Coupling, scored, select_subgroups


@dataclass(frozen=True)
class Weighing:
    """The parameters of one selection."""

    alpha: float
    beta: float
    groups: int
    """G: only the first G candidates of each class take part."""
    coupling: Coupling = "pool"

    @property
    def share(self) -> float:
        """``β / (α + β)``, on which alone the selection depends: α : β = 0.1 : 0.2 and 0.3 : 0.6 have the same share."""
        return round(self.beta / (self.alpha + self.beta), 12)


@dataclass(frozen=True)
class Weighed:
    """A selection and its terms of Eq. 10, as means over classes."""

    groups: tuple[int, ...]
    proximity: float
    repulsion: float


def select_grid(candidates_CGD: Tensor, references_CD: Tensor, weighings: Sequence[Weighing]) -> list[Weighed]:
    """The selection of each of ``weighings``, as :func:`ims3_ray.selection.select_subgroups` finds it.

    The tables of Eq. 10 are made once for each G, and each ratio α : β is solved once for each G and coupling. Raises what
    that function raises, and ``ValueError`` for more groups than there are candidates.
    """
    found: dict[tuple[int, float, str], Weighed] = {}
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    chosen = []
    for w in weighings:
        if not 1 <= w.groups <= candidates_CGD.shape[1]:
            raise ValueError(f"{w.groups} groups are to be weighed of {candidates_CGD.shape[1]}")
        ratio = (w.groups, w.share, w.coupling)
        if ratio not in found:
            candidates = candidates_CGD[:, : w.groups]
            if w.coupling == "pool":
                if w.groups not in tables:
                    tables[w.groups] = scored(candidates, references_CD)[:2]
                proximity, repulsion = tables[w.groups]
                groups = (w.alpha * proximity - w.beta * repulsion).argmin(dim=1)
            else:
                one = select_subgroups(candidates, references_CD, alpha=w.alpha, beta=w.beta, coupling=w.coupling)
                proximity, repulsion, groups = one.proximity_CG, one.repulsion_CG, one.groups
            means = [table.gather(1, groups[:, None]).mean().item() for table in (proximity, repulsion)]
            found[ratio] = Weighed(tuple(groups.tolist()), *means)
        chosen.append(found[ratio])
    return chosen


def terms_of(candidates_CGD: Tensor, references_CD: Tensor, choices: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Mean proximity and repulsion of each choice of groups, always by Eq. 10 over all candidates of the other classes."""
    proximity, repulsion, _ = scored(candidates_CGD, references_CD)
    return [
        (proximity.gather(1, groups).mean().item(), repulsion.gather(1, groups).mean().item())
        for groups in (torch.tensor(choice)[:, None] for choice in choices)
    ]


def most_selections(weighings: Sequence[Weighing], classes: int) -> int:
    """Upper bound on the number of distinct selections: each G and coupling has at most one for each ratio α : β and, where
    the coupling is ``pool``, at most C(G − 1) + 1 (:func:`ims3_ray.selection.path`)."""
    ratios: dict[tuple[int, str], set[float]] = {}
    for w in weighings:
        ratios.setdefault((w.groups, w.coupling), set()).add(w.share)
    return sum(
        min(len(shares), classes * (groups - 1) + 1) if coupling == "pool" else len(shares)
        for (groups, coupling), shares in ratios.items()
    )
