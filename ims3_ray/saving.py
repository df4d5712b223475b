"""States of unfinished computations, from which they continue after an interruption."""

from __future__ import annotations

import io
import time
from typing import Any, Protocol

import torch

SAVE_EVERY_S = 60.0
"""Least number of seconds between two saved states of a computation."""


class Save(Protocol):
    """Stores the state of a computation, in place of the one before."""

    def __call__(self, state: bytes, done: float = 0.0, /) -> object:
        """``done`` is the share of the computation that is finished, in [0, 1]; progress is reported by it."""


class Saver:
    """Saves the state of a computation from time to time; never if ``save`` is None."""

    def __init__(self, save: Save | None) -> None:
        self.save, self.last = save, time.monotonic()

    def __call__(self, done: float, **values: Any) -> None:
        """Save tensors and numbers, from which :func:`unpack_state` makes the same again, if the last save is long ago."""
        if self.save is not None and time.monotonic() - self.last >= SAVE_EVERY_S:
            buffer = io.BytesIO()
            torch.save(values, buffer)
            self.save(buffer.getvalue(), done)
            self.last = time.monotonic()


def unpack_state(state: bytes, device: str) -> dict[str, Any]:
    """The tensors and numbers of a saved state, with tensors on the device."""
    found: dict[str, Any] = torch.load(io.BytesIO(state), map_location=device, weights_only=True)
    return found
