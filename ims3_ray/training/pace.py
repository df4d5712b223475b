"""Learning-rate schedules that also decide when a training ends: after a number of steps, or after a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

LOOK_EVERY = 10
"""Largest number of steps between two readings of the clock."""


class Pace(Protocol):
    """A learning-rate schedule: a linear warm-up, a constant part and a linear cool-down to zero.

    ``warmup`` and ``cooldown`` are shares of the training, so that a short training reaches its full learning rate, too.
    """

    def factor(self, step: int) -> float | None:
        """Factor of the learning rate in ``step`` (counted from 0), between 0 and 1; None once the training is over."""


@dataclass(frozen=True)
class BySteps:
    """A fixed number of steps."""

    steps: int
    warmup: float
    """Share of the steps, at the start, over which the learning rate rises."""
    cooldown: float
    """Share of the steps, at the end, over which the learning rate falls."""

    def factor(self, step: int) -> float | None:
        if step >= self.steps:
            return None
        rising, falling = (max(1.0, share * self.steps) for share in (self.warmup, self.cooldown))
        return min(1.0, (step + 1) / rising, (self.steps - step) / falling)


@dataclass
class ByClock:
    """As many steps as fit into a given time, for a machine whose speed is not known beforehand.

    ``clock`` is read every few steps, and in between the time is taken to go on at the rate of the steps so far. If the
    readings are the same in several processes, so are the learning rates and the last step.
    """

    seconds: float
    warmup: float
    """Share of the time, at the start, over which the learning rate rises."""
    cooldown: float
    """Share of the time, at the end, over which the learning rate falls."""
    spent: float = 0.0
    """Seconds of the time that an interrupted training has used already."""
    clock: Callable[[], float] = time.monotonic
    _first: tuple[float, int] | None = field(default=None, init=False)
    _last: tuple[float, int] = field(default=(0.0, 0), init=False)

    def factor(self, step: int) -> float | None:
        done = self._elapsed(step) / self.seconds
        if done >= 1:
            return None
        return min(1.0, done / max(self.warmup, 1e-9), (1 - done) / max(self.cooldown, 1e-9))

    def _elapsed(self, step: int) -> float:
        """Seconds of the time that are used when ``step`` begins."""
        if self._first is None:
            self._first = self._last = self.clock() - self.spent, step
            return self.spent
        began, first = self._first
        then, read = self._last
        if step - read >= min(LOOK_EVERY, max(1, (read - first) // LOOK_EVERY)):
            self._last = then, read = self.clock(), step
        per_step = (then - began - self.spent) / max(1, read - first)
        return then - began + (step - read) * per_step
