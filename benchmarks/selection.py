"""Seconds and peak memory of solving Eq. 10, as JSON: exactly (`pool`), and in its coupled form (`selected`).

    python benchmarks/selection.py                        C in 10, 100, 1000, G in 5, 10, 100; about 5 minutes on two cores
    python benchmarks/selection.py classes=[1000] groups=[10]

Centroids are random vectors of D features around a centre for each class. `seconds` does not include making them. `share` is
the rate of (CG)²·D multiply-adds, one dot product for each ordered pair, divided by the rate at which this machine multiplies
float64 matrices; it may exceed 1, since each unordered pair is computed only once. `gap` is the difference between objective
and lower bound. `path` is the number of distinct selections over all ratios α : β. Each case runs in a process of its own.

Needs torch, pydantic and pyyaml, and no Ray.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import sys
import time
from typing import Any, Literal

import torch
from pydantic import Field

from ims3_ray.cli import main
from ims3_ray.cluster.hardware import hardware
from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.config import Section
from ims3_ray.selection import path, select_subgroups

MOST_FOR_PATH = 10_000
"""The path is measured too for up to this number of candidates, with the coupling `pool` only."""


class BenchmarkConfig(Section):
    classes: tuple[int, ...] = (10, 100, 1000)
    groups: tuple[int, ...] = (5, 10, 100)
    couplings: tuple[Literal["pool", "selected"], ...] = ("pool", "selected")
    features: int = Field(default=512, ge=2)
    """D, the number of features of a centroid."""
    alpha: float = Field(default=0.4, ge=0)
    beta: float = Field(default=0.9, ge=0)


def measure(config: BenchmarkConfig, C: int, G: int, coupling: Literal["pool", "selected"]) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    references = torch.rand(C, config.features, generator=rng, dtype=torch.float64)
    candidates = references[:, None] + 0.3 * torch.randn(C, G, config.features, generator=rng, dtype=torch.float64)
    began = time.perf_counter()
    selection = select_subgroups(candidates, references, alpha=config.alpha, beta=config.beta, coupling=coupling)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row = {"C": C, "G": G, "coupling": coupling, "seconds": round(seconds, 3), "peak_gb": round(peak, 2)}
    row["share"] = round(2 * (C * G) ** 2 * config.features / seconds / matmul_rate(dtype=torch.float64), 2)
    row |= {"objective": selection.objective, "gap": selection.gap}
    if coupling == "pool" and C * G <= MOST_FOR_PATH:
        began = time.perf_counter()
        row["path"] = len(path(candidates, references))
        row["path_seconds"] = round(time.perf_counter() - began, 3)
    return row


def benchmark(config: BenchmarkConfig) -> None:
    rows = []
    for case in itertools.product(config.classes, config.groups, config.couplings):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            rows.append(process.apply(measure, (config, *case)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine: dict[str, Any] = {**hardware("cpu"), "threads": torch.get_num_threads()}
    print(json.dumps({"machine": machine, "features": config.features, "cases": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
