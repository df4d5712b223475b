"""How fast a device multiplies matrices: what achieved rates are a share of."""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s (2 per multiply-add) at which ``device`` multiplies large square matrices, with the threads it is given.

    The best of three measurements, once a process: whatever else the machine does makes them slower only.
    """
    device = torch.device(device)
    size, repeats = (8192, 20) if device.type == "cuda" else (2048, 2)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            product = a @ b
        product[0, 0].item()  # waits for the device
        return time.perf_counter() - began

    seconds(1)
    return 2.0 * size**3 * repeats / min(seconds(repeats) for _ in range(3))
