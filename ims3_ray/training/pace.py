"""How a learning rate rises and falls over a training, and when the training ends: by steps or by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Pace(Protocol):
    """The shape is a linear warm-up, a constant part and a linear cool-down to zero."""

    def factor(self, step: int) -> float | None:
        """What the learning rate is multiplied by in ``step`` (counted from 0), in 0 … 1; None once the training is over."""


@dataclass(frozen=True)
class BySteps:
    """A fixed number of steps. A training can be lengthened without a change of its start."""

    steps: int
    warmup: int
    """Steps over which the rate rises."""
    cooldown: int
    """Last steps over which it falls."""

    def factor(self, step: int) -> float | None:
        if step >= self.steps:
            return None
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1, self.cooldown))


@dataclass
class ByClock:
    """As many steps as a time allows, for a machine whose speed is not known beforehand.

    The clock starts with the first call of :meth:`factor`. The rate rises over ``warmup`` steps, counted from that call, and
    falls over the last ``cooldown`` (a share) of the time. One process only: the clocks of several would disagree.
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
