"""Weights of the images of a set: the share of the class's real images in the cluster that each image was made from (DDOQ)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from safetensors.torch import load
from torch import Tensor

from ims3_ray.config import RunConfig
from ims3_ray.engine.per_class import map_classes
from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.sets import add_to_class, commit_set
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.modes import FindModes


@dataclass(eq=False)
class Weigh(Stage):
    """Adds ``weights`` float32 [K] to each class's shard, with a mean of 1; the images stay the same."""

    name, makes_set, of_arm = "weigh", True, True

    @classmethod
    def plan(cls, planner: Planner, label: str, title: str, config: RunConfig, start: Stage) -> Weigh:
        """Plan to weigh the set ``start``, whose images were sampled from or towards the modes of their class. Raises
        :class:`UserError` if they were not."""
        steering = config.sampling.steering
        if steering is None or steering.source != FindModes.name:
            raise UserError(
                f"weights: clusters of '{title}' takes samples that belong to clusters of real images; set "
                "sampling.prototypes.strength or sampling.mode_guidance.strength for the arm, or leave weights out"
            )
        inputs: dict[str, Stage] = {"set": start, "modes": FindModes.plan(planner, config)}
        return planner.add(
            cls(
                f"weigh ({title})", {"weights": "clusters"}, inputs, units=planner.class_units(), images=start.images,
                label=label, config=config, has_logits=start.has_logits, stored=pixel_bytes(start.images, config),
            )
        )  # fmt: skip

    def run(self, context: Context) -> None:
        began, storage = time.monotonic(), context.storage
        shared = TaskInputs(*(stage.artifact(storage) for stage in (self.inputs["set"], self.inputs["modes"], self)))
        entries = map_classes(context, self.title, weigh_classes, shared, list(self.units))
        commit_set(shared.weighed, dict(zip(self.units, entries, strict=True)), time.monotonic() - began)


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to weigh the images of some classes."""

    start: Artifact
    modes: Artifact
    weighed: Artifact


def weigh_classes(task: TaskInputs, units: Sequence[str]) -> list[dict[str, Any]]:
    """Write the shards of some classes again, with weights. Image i of the candidates belongs to mode i mod K."""

    def weights_of(unit: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Among duplicates a cluster may be empty. Its image counts as one, since weights are above 0.
        counts = load(task.modes.read(f"{unit}.safetensors"))["counts"].float().clamp(min=1)
        weights = counts[tensors["indices"] % len(counts)]
        return {"weights": weights / weights.mean()}

    return [add_to_class(task.start, task.weighed, unit, partial(weights_of, unit)) for unit in units]
