"""What a plan is: stages in the order in which they run, and the sets of images that they score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ims3_ray.config import WorkConfig
from ims3_ray.data.classes import ClassTable
from ims3_ray.stages.base import Stage

Config = TypeVar("Config", bound=WorkConfig)

DERIVED = ("embed", "latents", "inverted")
"""Stages that run together with the images they look at."""

ORDER = (
    "encode", *DERIVED, "held_out", "given", "modes", "teacher", "finetune", "instability", "generate", "select", "refine",
    "export", "evaluate",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A set of images and what scores it."""

    title: str
    ipc: int
    """Images per class; 0 for a set made by somebody else."""
    images: Stage
    rows: dict[str, Stage]
    """Row of the table → the training of its students."""
    arm: str = ""
    draw: int = 0


@dataclass
class Plan(Generic[Config]):
    """The stages in the order in which they run; stages that sets share appear once."""

    config: Config
    classes: ClassTable
    stages: list[Stage]
    sets: dict[str, Scored] = field(default_factory=dict)
    export: Stage | None = None

    def needed(self) -> dict[str, float]:
        """The largest share of the cluster that a stage takes at a time."""
        a, e = self.config.actors, self.config.evaluation
        cpus, gpus = [a.count * a.cpus, e.cpus_per_task], [a.count * a.gpus, e.gpus_per_task]
        trainers = [stage.run.finetune.trainer for stage in self.stages if stage.kind == "finetune"]
        trainers += [e.teacher.trainer for stage in self.stages if stage.kind == "teacher"]
        for t in trainers:
            cpus.append(t.num_workers * t.cpus_per_worker)
            gpus.append(t.num_workers * t.gpus_per_worker)
        return {k: v for k, v in {"CPU": max(cpus), "GPU": max(gpus)}.items() if v}


def ordered(stages: Iterable[Stage]) -> list[Stage]:
    """Every stage after its inputs; what is derived from images right after them, since they run together."""
    done: list[Stage] = []
    stages = list(stages)

    def visit(stage: Stage) -> None:
        if stage in done:
            return
        for earlier in stage.inputs.values():
            visit(earlier)
        if stage in done:  # an embedding, come to through the pool it embeds
            return
        done.append(stage)
        for derived in stages:
            if derived.kind in DERIVED and derived.inputs["images"] is stage:
                if derived.kind == "embed":
                    derived.units = stage.units  # the pool may have been asked for more since
                visit(derived)

    for stage in sorted(stages, key=lambda s: ORDER.index(s.kind)):
        visit(stage)
    return done
