"""What a synthesis method needs beside the set that it starts from: how it is planned, and how a task reads it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.config import DataConfig, RunConfig
from ims3_ray.data.sources import Source
from ims3_ray.data.transforms import opaque
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.sets import RealSplit
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.models.encoder import embedding_cost
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.select import Select
from ims3_ray.stages.statistics import Statistics, read_statistics
from ims3_ray.stages.teacher import load_teacher, plan_teacher, teacher_of, teacher_shape
from ims3_ray.synthesis.base import Costs, Need


@dataclass(frozen=True)
class Needed:
    """What a stage adds to its plan for the needs of a method."""

    inputs: dict[str, Stage] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    data_source: Source | None = None
    """The real images, where the method reads their files."""
    forward: dict[Need, float] = field(default_factory=dict)
    """Floating-point operations of a forward pass of one image through each network."""


def plan_needs(planner: Planner, needs: Collection[Need], config: RunConfig, start: Stage | None = None) -> Needed:
    """Plan what a method needs. ``start`` is the set that it starts from, which ``generator`` needs."""
    found = Needed(data_source=planner.data.train if "originals" in needs else None)
    if "real" in needs:
        found.inputs["real"] = Encode.plan(planner, "train", config.data)
    if "originals" in needs:
        found.params.update(
            originals=planner.data.params("train"), split=config.data.train_split, **config.data.background_params
        )
    if "statistics" in needs:
        found.inputs["statistics"] = Statistics.plan(planner)
    if "generator" in needs:
        models, pool = planner.models(config), cast(Select, start).pool
        generator = models.by_label("the synthesis by a generator (CaO2)")
        found.params.update(
            generator=models.generator_weights.digest, labels=list(models.labels), precision=config.sampling.precision,
            **plugins.hashes(type(generator)),
        )  # fmt: skip
        found.inputs.update({name: stage for name, stage in pool.inputs.items() if name in ("finetune", "adopt")})
        if models.autoencoder is not None:
            found.inputs["images"] = pool  # for the latents of its images, if these are stored
        found.weights.update(pool.weights)
        found.forward["generator"] = generator.forward_flops()
    if "teacher" in needs:
        teacher = plan_teacher(planner)
        found.inputs.update(teacher.inputs)
        found.weights.update(teacher.weights)
        found.params.update(teacher.params)
        found.forward["teacher"] = teacher_flops(planner, config.data.size)
    return found


def costs_of(planner: Planner, config: RunConfig, needed: Needed) -> Costs:
    """The numbers on which the cost of a method depends."""
    data, teacher = config.data, teacher_shape(planner) if "teacher" in needed.forward else None
    k = config.selection.images_per_class
    return Costs(needed.forward, planner.classes.counts, k, data.size, data.channels, teacher)


def teacher_flops(planner: Planner, size: int) -> float:
    """Floating-point operations of a forward pass of the teacher on one image of ``size`` pixels."""
    return embedding_cost(teacher_shape(planner).model_dump_json(), size)[0]


@dataclass(frozen=True)
class MethodInputs:
    """References to what a method needs, which travel to its tasks."""

    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    counts: tuple[int, ...]
    """Number of real training images of each class."""
    seed: int
    threads: int
    real: RealSplit | None = None
    originals: tuple[DataConfig, Source, tuple[int, ...]] | None = None
    """The data, its training split, and the split's label of each class."""
    statistics: Artifact | None = None
    teacher: Weights | Artifact | None = None

    @classmethod
    def of(cls, stage: Stage, needs: Collection[Need], context: Context) -> MethodInputs:
        """The references of a stage that was planned with :func:`plan_needs`. Its inputs are made."""
        config, storage, data = stage.run_config, context.storage, stage.run_config.data
        real, statistics = stage.inputs.get("real"), stage.inputs.get("statistics")
        return cls(
            context.classes.names, (data.channels, data.size, data.size), tuple(context.classes.counts), config.seed,
            context.config.actors.threads,
            real=RealSplit.of(cast(Encode, real), storage) if real and "real" in needs else None,
            originals=(data, stage.opened, context.classes.source_labels) if "originals" in needs else None,
            statistics=statistics.artifact(storage) if statistics else None,
            teacher=teacher_of(stage, context) if "teacher" in needs else None,
        )  # fmt: skip

    def on(self, device: str) -> dict[str, Any]:
        """Read on a device; the members of :class:`ims3_ray.synthesis.base.Inputs`, by name."""
        torch.set_num_threads(self.threads)
        mean_std = read_statistics(self.statistics)
        return {
            "num_classes": len(self.class_names), "seed": self.seed, "device": device, "size": self.shape[1],
            "channels": self.shape[0], "counts": self.counts,
            "real": _no_real_images if self.real is None else self.real.read_class,
            "originals": SourceOriginals(*self.originals) if self.originals is not None else None,
            "statistics": None if mean_std is None else tuple(tensor.to(device) for tensor in mean_std),
            "teacher": load_teacher(self.teacher, self.class_names, device) if self.teacher is not None else None,
        }  # fmt: skip


def _no_real_images(position: int) -> Tensor:
    raise ValueError("this method does not say that it needs real images; add 'real' to its needs")


class SourceOriginals:
    """The :class:`ims3_ray.synthesis.base.Originals` of a data source."""

    def __init__(self, data: DataConfig, source: Source, labels: tuple[int, ...]) -> None:
        self.data, self.source = data, source
        self.indices = [np.flatnonzero(self.source.labels == label) for label in labels]

    def count(self, position: int) -> int:
        return len(self.indices[position])

    def image(self, position: int, index: int) -> Image.Image:
        return opaque(self.source.image(int(self.indices[position][index])), self.data.channels, self.data.colour)
