"""Learning-rate schedules that also decide when a training ends: after a number of steps, or after a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Pace(Protocol):
    """A learning-rate schedule: a linear warm-up, a constant part and a linear cool-down to zero."""

    def factor(self, step: int) -> float | None:
        """Factor of the learning rate in ``step`` (counted from 0), between 0 and 1; None once the training is over."""


@dataclass(frozen=True)
class BySteps:
    """A fixed number of steps. Raising the number changes no step before the cool-down."""

    steps: int
    warmup: int
    """Number of steps at the start over which the learning rate rises."""
    cooldown: int
    """Number of steps at the end over which the learning rate falls."""

    def factor(self, step: int) -> float | None:
        if step >= self.steps:
            return None
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1, self.cooldown))


@dataclass
class ByClock:
    """As many steps as fit into a given time, for a machine whose speed is not known beforehand.

    The clock starts with the first call of :meth:`factor`. The learning rate rises over ``warmup`` steps, counted from
    that call, and falls over the last share ``cooldown`` of the time. For one process only: the clocks of several would
    disagree.
    """

    seconds: float
    warmup: int
    cooldown: float
    clock: Callable[[], float] = time.monotonic
    _began: tuple[float, int] | None = field(default=None, init=False)

    def factor(self, step: int) -> float | None:
        if self._began is None:
            self._began = self.clock(), step
        start, first = self._began
        left = 1 - (self.clock() - start) / self.seconds
        if left <= 0:
            return None
        return min(1.0, (step - first + 1) / max(1, self.warmup), left / max(self.cooldown, 1e-9))
