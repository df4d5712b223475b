"""The hardware on which a process computes, as recorded with its shards."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def hardware(device: str) -> dict[str, str]:
    """Name of the ``device``, version of its ``driver`` (empty for CPUs), and version and build of ``torch``."""
    if device == "cpu":
        return {"device": _processor(), "driver": "", "torch": torch.__version__}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):  # another vendor's device, or a container without the tool
        found = []
    return {"device": torch.cuda.get_device_name(device), "driver": found[0] if found else "", "torch": torch.__version__}


def kind(described: dict[str, Any]) -> str:
    """The part of the description that determines the last bits of an image: device and PyTorch. The driver is not part of it,
    since kernels come with PyTorch."""
    return f"{described['device']} with torch {described['torch']}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
