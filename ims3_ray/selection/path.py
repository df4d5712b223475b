"""Every selection that Eq. 10 yields for some ratio of weights α : β.

Shape letters: C classes, G candidate subgroups per class, D features, M selections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ims3_ray.selection.subgroups import scored


@dataclass(frozen=True)
class SelectionPath:
    """Selection m is optimal where the share ``β / (α + β)`` lies between ``shares[m]`` and ``shares[m + 1]``."""

    shares: Tensor
    """float64 [M + 1], increasing from 0 (proximity alone) to 1 (repulsion from the other classes alone)."""
    groups: Tensor
    """Chosen subgroups, int64 [M, C]. Consecutive selections differ in at least one class."""

    def __len__(self) -> int:
        return len(self.groups)

    def at(self, alpha: float, beta: float) -> Tensor:
        """The selection for these weights, [C]; on the border of two selections both are optimal."""
        share = torch.tensor(beta / (alpha + beta), dtype=torch.float64)
        return self.groups[min(int(torch.searchsorted(self.shares[1:], share)), len(self) - 1)]


def path(candidates_CGD: Tensor, references_CD: Tensor) -> SelectionPath:
    """All selections of ``coupling="pool"``, found exactly: with the share w = β / (α + β) a candidate's score is the line
    (1 − w)·proximity − w·repulsion, and a class selects along the lower envelope of its G lines, which has at most G − 1
    breakpoints.

    A sweep over α and β has no more than these outcomes: the number of breakpoints + 1 ≤ C(G − 1) + 1. Raises what
    :func:`ims3_ray.selection.select_subgroups` raises.
    """
    proximity_CG, repulsion_CG, _ = scored(candidates_CGD, references_CD)
    breaks: list[tuple[float, int, int]] = []
    first = []
    for i, (near, far) in enumerate(zip(proximity_CG, repulsion_CG, strict=True)):
        envelope = _lower_envelope(near, near + far)
        first.append(envelope[0][1])
        breaks += [(share, i, group) for share, group in envelope[1:]]
    groups = torch.tensor(first)
    shares, rows = [0.0], []
    for share, i, group in sorted(breaks):
        if share > shares[-1]:
            rows.append(groups.clone())
            shares.append(share)
        groups[i] = group
    return SelectionPath(torch.tensor([*shares, 1.0], dtype=torch.float64), torch.stack([*rows, groups]))


def _lower_envelope(start_G: Tensor, fall_G: Tensor) -> list[tuple[float, int]]:
    """(share from which it is lowest, index) of each line ``start − share·fall`` that is lowest somewhere in [0, 1)."""
    group = min(range(len(start_G)), key=lambda g: (start_G[g].item(), -fall_G[g].item(), g))
    found = [(0.0, group)]
    while True:
        faster = fall_G > fall_G[group]
        meets = torch.where(faster, (start_G - start_G[group]) / (fall_G - fall_G[group]), torch.inf)
        share = meets.min().item()
        if share >= 1:
            return found
        crossing = (meets == share).nonzero().flatten()
        group = int(crossing[fall_G[crossing].argmax()])
        found.append((share, group))
