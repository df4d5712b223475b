"""``log(1 − σ)`` between centroids, and the two tables over all pairs of candidates that Eq. 10 needs.

Shape letters: C classes, G candidate subgroups per class, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1024
"""Candidates along each side of a block of pairs that is computed at a time; its values stay in the processor's cache."""

PAIRS = 2**14
"""Number of close pairs whose differences are computed at a time."""

CLOSE = 1e-6
"""Below this value 1 − σ is computed from the difference of the vectors, as 1 minus a rounded cosine has too few digits."""


def log_distance(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    """``log(1 − σ)`` between rows of float64 unit vectors, [N, M].

    1 − σ is clamped to a positive value: a candidate that equals its reference would otherwise score −∞ whatever its other
    terms are.
    """
    distance = torch.addmm(u_ND.new_ones(1), u_ND, v_MD.T, alpha=-1)
    if distance.numel() and distance.min() < CLOSE:
        for pairs in (distance < CLOSE).nonzero().split(PAIRS):
            rows, columns = pairs.unbind(dim=1)
            distance[rows, columns] = (u_ND[rows] - v_MD[columns]).square().sum(dim=1) / 2
    return distance.clamp_(min=torch.finfo(torch.float64).eps).log_()


def pool_tables(c_CGD: Tensor, pairs_CGCG: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two values for each candidate: the mean of ``log(1 − σ)`` over all candidates of the other classes, and the mean over the
    other classes of the largest value for any candidate of that class. float64 [C, G] each; zero for C = 1.

    Each pair of blocks of classes is multiplied once and used for both blocks: (CG)²·D/2 multiply-adds, memory for one block.
    ``pairs_CGCG``, if given, is filled with the values of all pairs, and with zero for pairs within a class.
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
            if rows == columns:  # pairs within a class do not count
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
