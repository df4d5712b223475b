"""What the workers of a training tell the driver while Ray Train runs: losses and speed, and sheets of samples.

Its imports are few, since the actor has a process of its own, which would take two seconds of a core to import PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from ims3_ray.training.finetuning import Row

RESUMED = "resumed"
"""Key that marks the row of losses after which an interrupted training goes on."""


class Board:
    """An actor to which rank 0 of each training posts, and from which the driver reads."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, Row]] = {}
        self.sheets: dict[int, bytes] = {}

    def post(self, training: int, rows: Sequence[Row]) -> None:
        """Add rows of a training; a row of the same step is replaced."""
        self.rows.setdefault(training, {}).update({int(row["step"]): row for row in rows})

    def read(self, training: int, after: int) -> list[Row]:
        """The rows of steps later than ``after``."""
        rows = self.rows.get(training, {})
        return [rows[step] for step in sorted(rows) if step > after]

    def show(self, training: int, sheet: bytes) -> None:
        """Post a sheet of samples (PNG), which replaces an earlier one that was not taken."""
        self.sheets[training] = sheet

    def take(self, training: int) -> bytes | None:
        """The sheet that was posted last, unless it was taken before."""
        return self.sheets.pop(training, None)


def new_board() -> Any:
    """A handle of a :class:`Board` on the driver's node, for the arguments of the workers."""
    from ims3_ray.cluster.joining import here

    return ray.remote(num_cpus=0, scheduling_strategy=here())(Board).remote()
