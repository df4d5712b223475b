"""The scores of DD-Ranking (arXiv:2505.13300): what a method is worth beside the whole data and beside random real images, so
that neither labels nor augmentation count as its merit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ims3_ray.config import ArmConfig, CompareConfig

WEIGHT = 0.5
"""Weight of the improvement over random against that of the hard label recovery, as on DD-Ranking's leaderboard."""


def label_robust_score(recovery: float, improvement: float, weight: float = WEIGHT) -> float:
    """DD-Ranking's LRS, between 0 and 1: (e^a − e^−1) / (e − e^−1) with a = w · IOR − (1 − w) · HLR.

    ``recovery`` is HLR, the accuracy of the whole data minus that of the set, both with hard labels; ``improvement`` is IOR,
    the accuracy of the set minus that of random real images, both by the same protocol. Both are shares, not per cent.
    """
    combined = weight * improvement - (1 - weight) * recovery
    return (math.exp(combined) - math.exp(-1)) / (math.e - math.exp(-1))


def rank(config: CompareConfig, tables: Sequence[Mapping[str, Any]]) -> None:
    """Add to each line of the tables its ``ranking``: ``hlr`` and ``ior`` in points and ``lrs`` in per cent; None for the whole
    data, for random real images, and where the comparison has no arm of either or no hard labels for the student."""
    whole = next((name for name, arm in config.arms.items() if _is_real(arm) and arm.select == "all"), None)
    random = next((name for name, arm in config.arms.items() if _is_real(arm) and arm.select == "random"), None)
    rows = config.evaluation.rows
    hard = {student: row for row, (name, student) in reversed(rows.items()) if _is_hard(config, name)}
    accuracies = {
        (table["images_per_class"], table["row"], line["arm"]): line["last"]["mean"]
        for table in tables
        for line in table["lines"]
    }
    for table in tables:
        k, row = table["images_per_class"], table["row"]
        with_hard = (row if _is_hard(config, rows[row][0]) else hard.get(rows[row][1])) if row in rows else None
        for line in table["lines"]:
            line["ranking"] = None
            if None not in (whole, random, with_hard) and line["arm"] not in (whole, random):
                recovery = accuracies[k, with_hard, whole] - accuracies[k, with_hard, line["arm"]]
                improvement = line["last"]["mean"] - accuracies[k, row, random]
                score = 100 * label_robust_score(recovery / 100, improvement / 100)
                line["ranking"] = {"hlr": recovery, "ior": improvement, "lrs": score}


def _is_real(arm: ArmConfig) -> bool:
    """Whether a set is of unchanged training images with hard labels."""
    return arm.images == "real" and arm.synthesise is None and arm.labels == "hard" and arm.weights == "equal"


def _is_hard(config: CompareConfig, protocol: str) -> bool:
    return config.evaluation.protocols[protocol].labels == "hard"


def ranking_note(tables: Sequence[Mapping[str, Any]]) -> str:
    """What the columns of DD-Ranking mean; empty if no line has them."""
    if not any(line["ranking"] for table in tables for line in table["lines"]):
        return ""
    return (
        "By DD-Ranking: HLR is what the method's set lacks to the whole training data with hard labels, in points (lower is "
        "better); IOR is what it adds to random real images by the same protocol, in points (higher is better); LRS, the label "
        f"robust score, combines both with weight {WEIGHT} (100: the best that is possible)."
    )
