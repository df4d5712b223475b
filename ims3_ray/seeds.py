"""The only source of seeds: a seed depends on the purpose and address of a random choice, never on when or where it is made."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def seed_for(run_seed: int, purpose: str, *address: int) -> int:
    """63-bit seed for ``purpose`` (such as "image") at ``address`` (such as class, index) of a run."""
    entropy = [run_seed, zlib.crc32(purpose.encode()), len(address), *address]  # SeedSequence ignores trailing zeros
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(run_seed: int, purpose: str, *address: int) -> torch.Generator:
    """CPU generator seeded by :func:`seed_for`; noise drawn on the CPU is the same on every device."""
    return torch.Generator().manual_seed(seed_for(run_seed, purpose, *address))
