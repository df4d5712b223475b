"""Which number format a device computes in, where a config leaves it open (``precision: auto``)."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def computes_bf16(device_type: str) -> bool:
    """Whether the devices of this type ("cuda" or "cpu") compute in bfloat16 natively. A GPU does if there is none here to
    ask."""
    if device_type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def precision_on(precision: Literal["auto", "fp32", "bf16"], device_type: str) -> Precision:
    """The number format that ``precision`` means on a device of this type."""
    if precision != "auto":
        return precision
    return "bf16" if computes_bf16(device_type) else "fp32"
