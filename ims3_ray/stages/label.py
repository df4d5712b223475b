"""Soft labels that are stored with a set: the teacher's logits of each image."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ims3_ray.cluster.joining import own_device
from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.engine.per_class import map_classes
from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.sets import add_to_class, commit_set
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.method_inputs import teacher_flops
from ims3_ray.stages.teacher import load_teacher, plan_teacher, teacher_of

AT_ONCE = 100
"""Images per call of the teacher."""


@dataclass(eq=False)
class Label(Stage):
    """Adds ``logits`` float16 [K, num_classes] to each class's shard; the images stay the same."""

    name, makes_set, of_arm = "label", True, True

    @classmethod
    def plan(cls, planner: Planner, label: str, title: str, config: RunConfig, start: Stage) -> Label:
        """Plan to label the set ``start`` by the teacher of the evaluation."""
        teacher = plan_teacher(planner)
        params = {"labels": "soft", "classes": list(planner.classes.names), **teacher.params}
        return planner.add(
            cls(
                f"label ({title})", params, {"set": start, **teacher.inputs}, units=planner.class_units(),
                images=start.images, flops=start.images * teacher_flops(planner, config.data.size), label=label,
                weights=teacher.weights, config=config, has_logits=True, stored=pixel_bytes(start.images, config),
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    def run(self, context: Context) -> None:
        began, storage, actors = time.monotonic(), context.storage, context.config.actors
        shared = TaskInputs(
            self.inputs["set"].artifact(storage), self.artifact(storage), teacher_of(self, context), context.classes.names,
            actors.threads,
        )  # fmt: skip
        entries = map_classes(context, self.title, label_classes, shared, list(self.units), on_pool=True)
        context.spend(self, time.monotonic() - began)
        commit_set(shared.labelled, dict(zip(self.units, entries, strict=True)), time.monotonic() - began)


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to label a set."""

    start: Artifact
    labelled: Artifact
    teacher: Weights | Artifact
    class_names: tuple[str, ...]
    threads: int


@torch.inference_mode()
def label_classes(task: TaskInputs, units: Sequence[str]) -> list[dict[str, Any]]:
    """Write the shards of some classes again, with the teacher's logits."""
    torch.set_num_threads(task.threads)
    device = own_device()
    teacher = load_teacher(task.teacher, task.class_names, device)

    def logits_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = tensors["pixels"].split(AT_ONCE)
        return {"logits": torch.cat([teacher(part.to(device).float() / 255).half().cpu() for part in parts])}

    return [add_to_class(task.start, task.labelled, unit, logits_of) for unit in units]
