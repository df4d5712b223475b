"""What each set covers of the real images of its classes, in φ's space: :mod:`ims3_ray.selection.coverage`."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from pydantic import Field
from safetensors.torch import load

from ims3_ray.cluster.joining import own_device
from ims3_ray.component import Section
from ims3_ray.config import RunConfig, WorkConfig, differing
from ims3_ray.engine.per_class import Work, each_unit_of
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import commit_units, note, pack_tensors, read_class
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import embedding_cost
from ims3_ray.selection.coverage import NEIGHBOURS, coverage, frechet, nearest
from ims3_ray.stages.embed import Embed, Phi, open_phi
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.features import Features

MEASURED = ("precision", "recall", "density", "coverage", "frechet", "novelty")
"""Names of the values of a class."""


@dataclass(eq=False)
class MeasureCoverage(Stage):
    """Compares each class of a set with the real training images of the class.

    A unit is a class. Its entry holds :data:`MEASURED`: the four values of
    :class:`~ims3_ray.selection.coverage.Coverage`, the Fréchet distance, and ``novelty``, the median over images of the
    distance to the nearest real image divided by that to the second nearest. Values that need more images than a class has are
    null. Its shard holds the tensors of :class:`~ims3_ray.selection.coverage.Nearest` among the real images of the class.
    """

    name, of_arm = "coverage", True

    class Config(Section):
        """Which neighbour says how far a ball reaches."""

        neighbours: int = Field(default=NEIGHBOURS, ge=1)
        """k: the radius of an image's ball is the distance to its k-th nearest neighbour."""

    settings = Config
    titles: tuple[str, ...] = ()
    """The sets that are these images: two arms may choose the same."""

    @classmethod
    def plan_beside(
        cls, planner: Planner, config: RunConfig, settings: MeasureCoverage.Config, sets: Mapping[str, Stage]
    ) -> None:
        """Plan the measurement of every set, with the φ of the run."""
        real = Embed.plan(planner, Encode.plan(planner, "train", config.data), config)
        phi = Phi.of(planner, config)
        flops, _ = embedding_cost(phi.shape.model_dump_json(), config.data.size)
        for title, images in sets.items():
            stage = planner.add(
                cls(
                    f"coverage ({title})", {"coverage": differing(settings), **phi.params},
                    {"set": images, "real": real, **phi.inputs}, units=planner.class_units(), images=images.images,
                    flops=images.images * flops, weights=phi.weights, config=config, label=title,
                )
            )  # fmt: skip
            stage.titles = (*stage.titles, title)

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    @property
    def batch(self) -> Hashable:
        return "coverage"

    def run(self, context: Context) -> None:
        self.run_all(context, [self])

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[MeasureCoverage]) -> None:
        """Measure all sets side by side."""
        works = [stage._work(context) for stage in stages]
        gpus, title = context.config.actors.gpus, stages[0].title if len(stages) == 1 else "coverage"
        for work, entries, seconds in each_unit_of(context, title, works, measure_classes, gpus=gpus, what="classes"):
            commit_units(work.shared.made, entries, seconds)

    def _work(self, context: Context) -> Work:
        storage, missing = context.storage, set(self.missing(context.storage))
        images, real = self.inputs["set"], cast(Embed, self.inputs["real"])
        trained = self.inputs.get("phi")
        shared = TaskInputs(
            images.artifact(storage), real.artifact(storage), self.artifact(storage),
            trained.artifact(storage) if trained is not None else self.weights["encoder"],
            self.params["coverage"].get("neighbours", NEIGHBOURS),
        )  # fmt: skip
        rows = {
            unit: (images.units_of_class(position)[0], real.units_of_class(position))
            for position, unit in enumerate(self.units)
            if unit in missing
        }
        return Work(self, shared, rows, flops_per_unit=self.flops / len(self.units))

    def results(self, storage: Storage) -> dict[str, Any]:
        """Set → the mean of each value over classes, and under ``by_class`` its values for the classes, in order."""
        units = (self.manifest(storage) or {})["units"]
        by_class = {name: [units[unit][name] for unit in self.units] for name in MEASURED}
        means = {name: None if None in values else statistics.fmean(values) for name, values in by_class.items()}
        return {"coverage": {title: {**means, "by_class": by_class} for title in self.titles}}


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to measure some classes of a set."""

    images: Artifact
    real: Artifact
    """Features of the real images."""
    made: Artifact
    phi: Weights | Artifact
    neighbours: int


def measure_classes(task: TaskInputs, classes: Sequence[tuple[str, tuple[str, list[str]]]]) -> None:
    """Measure and store some classes, each given as (its unit, (its unit in the set, units of its real images))."""
    features_of = Features(open_phi(task.phi), own_device())
    for unit, (in_set, in_real) in classes:
        pixels = load(task.images.read(f"{in_set}.safetensors"))["pixels"]
        features = features_of.of_images(pixels).double()
        real = torch.nn.functional.normalize(read_class(task.real, in_real, "features").double(), dim=1)
        measured: dict[str, float | None] = dict.fromkeys(MEASURED)
        tensors: dict[str, torch.Tensor] = {}
        if len(real) > 1:
            closest = nearest(features, real)
            measured |= {**asdict(coverage(features, real, task.neighbours)), "novelty": closest.ratio.median().item()}
            measured["frechet"] = frechet(features, real) if len(features) > 1 else None
            tensors = {"index": closest.index, "distance": closest.distance, "ratio": closest.ratio}
        digest = task.made.write(f"{unit}.safetensors", pack_tensors(**tensors))
        note(task.made, unit, {**measured, "images": len(pixels), "sha256": digest})
