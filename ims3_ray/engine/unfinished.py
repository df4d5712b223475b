"""Units that a task has begun: the saved state of each, and how much of it is finished."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import as_json
from ims3_ray.progress import LOG_EVERY_S, Progress

DIGEST_BYTES = hashlib.sha256().digest_size
"""Number of bytes of the hash in front of a saved state."""


@dataclass(frozen=True)
class Unfinished:
    """A unit of an artifact whose computation saves its state, so that another task can continue it."""

    artifact: Artifact
    unit: str

    @property
    def _state(self) -> str:
        return f"{self.unit}.state"

    @property
    def _progress(self) -> str:
        return f"{self.unit}.progress.json"

    def state(self) -> bytes | None:
        """The last saved state; None if there is none. A state that is damaged is deleted and counts as none."""
        if self._state not in self.artifact.shards():
            return None
        stored = self.artifact.read(self._state)
        digest, state = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if hashlib.sha256(state).digest() == digest:
            return state
        print(f"note: the saved state of {self.unit} in {self.artifact.address} is damaged; it begins anew", flush=True)
        self.forget()
        return None

    def save(self, state: bytes, done: float = 0.0, /) -> None:
        """Store a state (see :class:`ims3_ray.saving.Save`) after its hash."""
        self.artifact.write(self._state, hashlib.sha256(state).digest() + state)
        self.artifact.write(self._progress, as_json({"done": done}, f"the progress of {self.unit}"))

    def done(self) -> float:
        """The share of the unit that was finished when its state was last saved, in [0, 1]; 0 if none was."""
        found = self.artifact.storage.read_json(f"{self.artifact.folder}/shards/{self._progress}") or {}
        return float(found.get("done", 0.0))

    def forget(self) -> None:
        """Delete what is saved, since the unit is finished."""
        for name in {self._state, self._progress} & self.artifact.shards():
            self.artifact.forget(name)


class Shares:
    """Shows the progress of a stage by its finished units and the shares of those that have begun. ``weight`` says how much of
    the progress's total a unit is."""

    def __init__(self, progress: Progress, weight: Callable[[Unfinished], float] = lambda unit: 1.0) -> None:
        self.progress, self.weight, self.finished = progress, weight, 0.0
        self._looked, self._begun = time.monotonic(), dict[Unfinished, float]()

    def finish(self, units: Iterable[Unfinished]) -> None:
        """Count units that have just been finished."""
        for unit in units:
            self.finished += self.weight(unit)
            self._begun.pop(unit, None)
        self.progress.at(self.finished + sum(self._begun.values()))

    def look(self, begun: Iterable[Unfinished]) -> None:
        """Look up the shares of the units that have begun, if the last time is :data:`LOG_EVERY_S` seconds ago."""
        if time.monotonic() - self._looked >= LOG_EVERY_S:
            found = {unit: unit.done() * self.weight(unit) for unit in begun}
            if sum(found.values()) != sum(self._begun.values()):
                self.progress.at(self.finished + sum(found.values()))
            self._looked, self._begun = time.monotonic(), found
