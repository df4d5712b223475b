"""``log(1 − σ)`` between centroids, and the two tables that Eq. 10 needs of all pairs of candidates.

Shape letters: C classes, G candidate subgroups per class, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1024
"""Candidates along each side of the block of pairs that is looked at at a time: its values stay in the processor's cache."""

PAIRS = 2**14
"""Close pairs whose difference is taken at a time."""

CLOSE = 1e-6
"""Below this 1 − σ is taken from the difference of the vectors, because 1 minus a rounded cosine has lost its digits."""


def log_distance(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    """``log(1 − σ)`` between rows of unit vectors in float64, [N, M].

    Clamped above log 0: a candidate that equals its reference would score −∞ and hide all others.
    """
    distance = torch.addmm(u_ND.new_ones(1), u_ND, v_MD.T, alpha=-1)
    if distance.numel() and distance.min() < CLOSE:
        for pairs in (distance < CLOSE).nonzero().split(PAIRS):
            rows, columns = pairs.unbind(dim=1)
            distance[rows, columns] = (u_ND[rows] - v_MD[columns]).square().sum(dim=1) / 2
    return distance.clamp_(min=torch.finfo(torch.float64).eps).log_()


def pool_tables(c_CGD: Tensor, pairs_CGCG: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each candidate: ``mean log(1 − σ)`` to all candidates of the other classes, and the mean over the other classes of its
    largest one. float64 [C, G] each; zero for C = 1, where there is no rival.

    Each pair of blocks of classes is multiplied once and serves both sides: (CG)²·D/2 multiply-adds, memory for one block.
    ``pairs_CGCG`` is filled with all of them, and with zero within a class, where the caller has room.
    """
    C, G, _ = c_CGD.shape
    total, farthest = (c_CGD.new_zeros(C, G, dtype=torch.float64) for _ in range(2))
    size = max(1, TILE // G)
    blocks = [slice(start, min(start + size, C)) for start in range(0, C, size)]
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            of_rows, of_columns = c_CGD[rows], c_CGD[columns]
            pairs = log_distance(of_rows.flatten(0, 1), of_columns.flatten(0, 1))
            pairs = pairs.reshape(len(of_rows), G, len(of_columns), G)
            if rows == columns:  # a class is no rival of its own
                own = torch.arange(len(of_rows), device=pairs.device)
                pairs[own, :, own, :] = 0
            total[rows] += pairs.sum(dim=(2, 3))
            farthest[rows] += pairs.amax(dim=3).sum(dim=2)
            if rows != columns:
                total[columns] += pairs.sum(dim=(0, 1))
                farthest[columns] += pairs.amax(dim=1).sum(dim=0)
            if pairs_CGCG is not None:
                pairs_CGCG[rows, :, columns] = pairs
                pairs_CGCG[columns, :, rows] = pairs.permute(2, 3, 0, 1)
    rivals = max(1, C - 1)
    return total / (rivals * G), farthest / rivals
