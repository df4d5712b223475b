"""The moving average of what is trained, with and without warm-up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ims3_ray.models.ema import Ema


def averaged(decay: float, warmup: bool, updates: int) -> float:
    """The average of a value that is 0 at the start and 1 ever after."""
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema([("p", parameter)], decay, warmup)
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(updates):
        ema.update([("p", parameter)])
    return ema.average["p"].item()


def test_without_warmup_it_is_the_plain_average():
    assert averaged(0.9999, False, 8000) == pytest.approx(1 - 0.9999**8000, rel=1e-3)  # 55 % of the way


def test_with_warmup_the_start_is_forgotten_soon():
    kept = 1.0
    for n in range(1, 31):
        kept *= min(0.9999, (1 + n) / (10 + n))
    assert averaged(0.9999, True, 30) == pytest.approx(1 - kept, rel=1e-4)
    assert kept < 1e-4
