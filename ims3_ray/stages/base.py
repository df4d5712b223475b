"""What a stage is, and what it is given to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load, save
from torch import Tensor

from ims3_ray.artifacts import Artifact, Storage, key_of
from ims3_ray.config import (
    EncoderTraining,
    FinetuneConfig,
    InstabilityConfig,
    ProtocolConfig,
    RefineConfig,
    RunConfig,
    SamplingConfig,
    WorkConfig,
)
from ims3_ray.data.classes import ClassTable
from ims3_ray.models.encoder import EncoderConfig
from ims3_ray.stages.weights import Weights
from ims3_ray.tracking import Untracked

READERS = 16
"""Shards that a process reads at a time."""

VERSION = {
    "encode": 1,
    "embed": 2,
    "latents": 2,
    "inverted": 1,
    "modes": 1,
    "teacher": 1,
    "finetune": 2,
    "instability": 1,
    "generate": 2,
    "select": 2,
    "refine": 1,
    "given": 1,
    "held_out": 1,
    "export": 1,
    "evaluate": 3,
}
"""Raised when a stage's output changes for the same input: old artifacts are then no longer taken for new ones.

A default of :data:`SETTINGS` that changes is such a change, since keys hold what differs from the defaults alone.
"""

SETTINGS: dict[str, type[BaseModel]] = {
    "embed": EncoderConfig,
    "teacher": EncoderTraining,
    "finetune": FinetuneConfig,
    "instability": InstabilityConfig,
    "generate": SamplingConfig,
    "refine": RefineConfig,
    "evaluate": ProtocolConfig,
}
"""The settings of a kind of stage of which its key holds what differs from the defaults. ``tests/unit/defaults.json`` has the
defaults by version."""


SETS = ("select", "refine", "given")
"""Stages of which the output is a set of images to train on: later stages know it by its content."""


@dataclass(eq=False)
class Stage:
    """A node of the plan. ``units`` are the pieces its manifest must list for it to be done."""

    kind: str
    title: str
    params: Mapping[str, Any]
    """What of the config it depends on; part of the key."""
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    """Where its images lie; their hash, not their path, is in ``params``."""
    units: tuple[str, ...] = ("result",)
    images: int = 0
    flops: float = 0.0
    stored: float = 0.0
    """Bytes that it writes, about; what is small beside images is left out."""
    label: str = ""
    """The arm or split it belongs to, where a kind occurs more than once."""
    weights: Mapping[str, Weights] = field(default_factory=dict)
    """``generator``, ``encoder``, ``autoencoder``: those it needs; ``params`` hold their hashes."""
    config: RunConfig | None = None
    """As the arm has it that the stage was made for; none where nothing is distilled."""

    @property
    def run(self) -> RunConfig:
        """The config of a stage that is part of a distillation."""
        assert self.config is not None
        return self.config

    def key(self, storage: Storage) -> str | None:
        """Hash of params and inputs; None while an input that is known by its content is not there yet."""
        inputs = {name: stage.identity(storage) for name, stage in self.inputs.items()}
        known = {name: key for name, key in inputs.items() if key is not None}
        return key_of(self.kind, VERSION[self.kind], self.params, known) if len(known) == len(inputs) else None

    def identity(self, storage: Storage) -> str | None:
        """How a later stage's key names this one: a set of images by these, all else by key."""
        key = self.key(storage)
        if self.kind not in SETS or key is None:
            return key
        manifest = Artifact(storage, self.kind, key).manifest()
        return manifest["content"] if manifest else None

    def artifact(self, storage: Storage) -> Artifact:
        key = self.key(storage)
        assert key is not None, f"{self.title} was asked for before its inputs were made"
        return Artifact(storage, self.kind, key)

    def manifest(self, storage: Storage) -> dict[str, Any] | None:
        return self.artifact(storage).manifest() if self.key(storage) else None

    def missing(self, storage: Storage) -> list[str]:
        """Units not committed yet."""
        have = (self.manifest(storage) or {}).get("units", {})
        return [unit for unit in self.units if unit not in have]


@dataclass
class Context:
    """What every stage is given."""

    config: WorkConfig
    storage: Storage
    classes: ClassTable
    tracker: Untracked
    spent: dict[Stage, float] = field(default_factory=dict)
    """Seconds of workers that stages have taken."""

    def spend(self, stage: Stage, seconds: float, workers: float = 1) -> None:
        self.spent[stage] = self.spent.get(stage, 0.0) + seconds * workers


def commit_units(
    artifact: Artifact, units: Mapping[str, Any], seconds: float, failed: Mapping[str, str] | None = None, **extra: Any
) -> None:
    """Add ``units`` to the artifact's manifest (it may be extended later) with the seconds they took; ``failed`` are those that
    could not be made, with their errors, until they are."""
    before = artifact.manifest() or {"units": {}, "seconds": 0.0}
    total = float(before["seconds"]) + seconds
    made = {**before["units"], **units}
    errors = {unit: why for unit, why in {**before.get("failed", {}), **(failed or {})}.items() if unit not in made}
    artifact.commit({**before, **extra, "units": made, "failed": errors, "seconds": total, "stage": artifact.stage})


def unit_name(label: int, number: int) -> str:
    """Unit ``number`` of the class with that label (of the generator for candidates, of the source for real images)."""
    return f"c{label:04d}-u{number:05d}"


def parse_unit(unit: str) -> tuple[int, int]:
    label, number = unit.split("-")
    return int(label[1:]), int(number[1:])


def units_of(label: int, count: int, unit_size: int) -> list[str]:
    """Names of the units that hold images 0 … count−1 of a class."""
    return [unit_name(label, number) for number in range(-(-count // unit_size))]


def pack_tensors(**tensors: Tensor) -> bytes:
    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})


def read_many(artifact: Artifact, units: Sequence[str], suffix: str) -> Iterator[tuple[str, bytes]]:
    """(unit, its shard) of many units: object storage answers slowly and takes many questions at a time."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(units), 4 * READERS):  # what is read ahead stays small
            part = units[start : start + 4 * READERS]
            yield from zip(part, readers.map(lambda unit: artifact.read(f"{unit}.{suffix}"), part), strict=True)


def read_class(artifact: Artifact, units: Sequence[str], name: str) -> Tensor:
    """Tensor ``name`` of a class's units, joined in order of their numbers."""
    return torch.cat([load(shard)[name] for _, shard in read_many(artifact, units, "safetensors")])


def by_class(units: Sequence[str]) -> dict[int, list[str]]:
    """Label → its units, in their order."""
    found: dict[int, list[str]] = {}
    for unit in units:
        found.setdefault(parse_unit(unit)[0], []).append(unit)
    return found
