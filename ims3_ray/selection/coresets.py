"""Choosing K of N images without an objective: the baselines that S3 is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ims3_ray.seeds import generator_for


def random_subset(count: int, k: int, seed: int, label: int) -> Tensor:
    """``k`` of ``count`` indices at random, int64 [k]; depends on (seed, label) alone."""
    return torch.randperm(count, generator=generator_for(seed, "random-subset", label))[:k]
