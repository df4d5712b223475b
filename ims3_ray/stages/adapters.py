"""What fine-tuning leaves per class group, and the generator with the adapter of a class's group merged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from ims3_ray.artifacts import Artifact, Storage
from ims3_ray.models.difffit import merge_adapter
from ims3_ray.models.dit import DiT
from ims3_ray.models.generator import load_generator
from ims3_ray.stages.base import Stage, commit_units
from ims3_ray.tracking import slug


def group_unit(group: int) -> str:
    """Name of a class group in the stage's manifest."""
    return f"group-{group}"


def group_checkpoints(group: int) -> str:
    """Folder of the artifact in which a class group's checkpoints lie until it is committed."""
    return f"train-{group}"


def series(stage: Stage, group: int, several: bool) -> str:
    """What goes before the names of a group's losses, where there are several groups or fine-tunings."""
    name = slug(stage.title) if several else ""
    return "".join(f"{part}/" for part in (name, group_unit(group) if len(stage.units) > 1 else "") if part)


@dataclass(frozen=True)
class Adapters:
    """The committed groups of a fine-tuning: ``adapter-G.safetensors`` and ``losses-G.json`` each."""

    artifact: Artifact
    groups: list[list[int]]
    """Labels of each group's classes."""

    @classmethod
    def of(cls, finetune: Stage, storage: Storage) -> Adapters:
        return cls(finetune.artifact(storage), finetune.params["groups"])

    def group_of(self, label: int) -> int:
        return next(number for number, labels in enumerate(self.groups) if label in labels)

    def losses(self, group: int) -> list[dict[str, float]]:
        """The rows of all steps."""
        rows: list[dict[str, float]] = json.loads(self.artifact.read(f"losses-{group}.json"))
        return rows

    def commit(self, group: int, outcome: dict[str, Any], images: int, seconds: float) -> None:
        """Write what :func:`ims3_ray.stages.finetune.finetune_loop` returned; then its checkpoints are not needed."""
        digest = self.artifact.write(f"adapter-{group}.safetensors", outcome["adapter"])
        self.artifact.write(f"losses-{group}.json", json.dumps(outcome["history"]).encode())
        commit_units(self.artifact, {group_unit(group): {"sha256": digest, "images": images}}, seconds)
        self.artifact.storage.delete(f"{self.artifact.folder}/{group_checkpoints(group)}")

    def merge(self, group: int, model: DiT) -> None:
        """Merge a group's adapter into the pretrained ``model``."""
        merge_adapter(model, load(self.artifact.read(f"adapter-{group}.safetensors")))


class GroupModels:
    """The pretrained generator, or the fine-tuned one of a class's group. Holds one at a time: classes come in order."""

    def __init__(
        self, weights: Path, adapters: Adapters | None, device: str, dtype: torch.dtype = torch.float32, compiled: bool = False
    ) -> None:
        self.weights, self.adapters, self.device = weights, adapters, device
        self.dtype, self.compiled = dtype, compiled
        self.held: tuple[int | None, DiT] | None = None

    def of_class(self, label: int) -> DiT:
        group = self.adapters.group_of(label) if self.adapters else None
        if self.held is None or self.held[0] != group:
            self.held = None  # its memory goes before the next one comes
            model = load_generator(self.weights)
            if self.adapters and group is not None:
                self.adapters.merge(group, model)
            model.to(self.device, self.dtype)
            if self.compiled:
                for block in model.blocks:
                    block.compile(dynamic=False)
            self.held = (group, model)
        return self.held[1]
