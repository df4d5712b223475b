"""What a plan consists of: stages in the order in which they run, and the sets of images that they score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ims3_ray.config import WorkConfig
from ims3_ray.data.classes import ClassTable
from ims3_ray.engine.stage import Stage
from ims3_ray.io.storage import Storage

Config = TypeVar("Config", bound=WorkConfig)


@dataclass(frozen=True)
class Scored:
    """A set of images and the stages that score it."""

    title: str
    ipc: int
    """Images per class; 0 for an existing set that is only scored."""
    images: Stage
    rows: dict[str, Stage]
    """Row of the table → the stage that trains its students."""
    arm: str = ""
    draw: int = 0
    whole: bool = False
    """Whether the set is the whole training split, which is the measure of all others."""


@dataclass
class Plan(Generic[Config]):
    """The stages in the order in which they run; stages that sets share appear once."""

    config: Config
    classes: ClassTable
    stages: list[Stage]
    sets: dict[str, Scored] = field(default_factory=dict)
    export: Stage | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Split of the data → hash of its images."""

    @property
    def weights(self) -> dict[str, str]:
        """Model and reference of all weights that the stages use → their digest."""
        return {f"{name} {one.reference}": one.digest for stage in self.stages for name, one in stage.weights.items()}

    def keys(self, storage: Storage) -> list[str | None]:
        """The keys of the stages, in their order; None for a stage of which an input is not made yet."""
        return [stage.key(storage) for stage in self.stages]

    def first_keys(self, storage: Storage) -> list[str | None]:
        """The keys of those stages that have one from the beginning: nothing before them is identified by its content."""
        return [stage.key(storage) for stage in self.stages if _is_keyed(stage)]

    def needed(self) -> dict[str, float]:
        """The largest amount of each resource that any stage takes at a time."""
        found: dict[str, float] = {}
        for stage in self.stages:
            for kind, amount in stage.worker(self.config).reserved.items():
                found[kind] = max(amount, found.get(kind, 0.0))
        return found


def _is_keyed(stage: Stage) -> bool:
    """Whether the key of ``stage`` is known before anything is made."""
    return all(not other.makes_set and _is_keyed(other) for other in stage.inputs.values())
