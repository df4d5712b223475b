"""Measures how fast a device multiplies matrices; achieved rates are given as a share of this."""

from __future__ import annotations

import time
from functools import cache

import torch

LARGE = {"cpu": 2048, "cuda": 8192}
"""Largest matrix side that is measured, by device."""
SMALL = 256
"""Matrix side at which measuring begins on a CPU."""
LONG_S = 0.02
"""Seconds that one product must take: sides are doubled until it does, since some CPUs compute some types a hundred times
slower."""


@cache
def matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """As :func:`measured_rate`, taken once per process."""
    return measured_rate(device, dtype)


def measured_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s (2 per multiply-add) at which ``device`` multiplies large square matrices, with the threads it is given.

    It is the best of three measurements: other load on the machine can only make them slower.
    """
    device = torch.device(device)
    largest = LARGE["cuda" if device.type == "cuda" else "cpu"]
    size, repeats = (largest, 20) if device.type == "cuda" else (SMALL, 2)
    while _seconds(device, dtype, size, 1) < LONG_S and size < largest:
        size *= 2
    return 2.0 * size**3 * repeats / min(_seconds(device, dtype, size, repeats) for _ in range(3))


def _seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Seconds that ``repeats`` products of ``size`` × ``size`` matrices take."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = a @ b
    product[0, 0].item()  # waits for the device
    began = time.perf_counter()
    for _ in range(repeats):
        product = a @ b
    product[0, 0].item()
    return time.perf_counter() - began
