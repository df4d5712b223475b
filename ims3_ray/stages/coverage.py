"""What each set covers of the real images of its classes, in φ's space: :mod:`ims3_ray.selection.coverage`."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from pydantic import Field
from safetensors.torch import load
from torch import Tensor

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
from ims3_ray.selection.coverage import NEIGHBOURS, boundary_distance, coverage, frechet, nearest, radii, reached
from ims3_ray.stages.embed import Embed, Phi, open_phi
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.features import Features

MEASURED = ("precision", "recall", "density", "coverage", "frechet", "novelty", "boundary")
"""Names of the values of a class."""
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Numbers of images of a class after which it is noted what they have reached."""


@dataclass(eq=False)
class MeasureCoverage(Stage):
    """Compares each class of a set with the real training images of the class.

    A unit is a class. Its entry holds :data:`MEASURED`: the four values of
    :class:`~ims3_ray.selection.coverage.Coverage`, the Fréchet distance, ``novelty``, the median over images of the distance to
    the nearest real image divided by that to the second nearest, and ``boundary``, the median distance to the decision boundary
    of φ's own classifier, if it has a linear one that knows the classes. Values that need more images than a class has are
    null. ``reached`` is the coverage of the first :data:`COUNTS` images. Its shard holds the tensors of
    :class:`~ims3_ray.selection.coverage.Nearest` among the real images of the class, and the features of the images.
    """

    name, version, of_arm = "coverage", 2, True

    class Config(Section):
        """Which neighbour says how far a ball reaches."""

        neighbours: int = Field(default=NEIGHBOURS, ge=1)
        """k: the radius of an image's ball is the distance to its k-th nearest neighbour."""
        map: bool = False
        """Whether the report shows a t-SNE map of the features of real images and of all sets."""

    settings = Config
    mapped: bool = False
    """Whether the report shows the map."""
    titles: tuple[str, ...] = ()
    """The sets that are these images: two arms may choose the same."""

    @classmethod
    def plan_beside(
        cls, planner: Planner, config: RunConfig, settings: MeasureCoverage.Config, sets: Mapping[str, Stage]
    ) -> None:
        """Plan the measurement of every set, with the φ of the run."""
        real = Embed.plan(planner, Encode.plan(planner, "train", config.data), config)
        phi = Phi.of(planner, config)
        heads = None if phi.positions is None else list(phi.positions)
        params = {"coverage": differing(settings.model_copy(update={"map": False})), "heads": heads, **phi.params}
        flops, _ = embedding_cost(phi.shape.model_dump_json(), config.data.size)
        for title, images in sets.items():
            stage = planner.add(
                cls(
                    f"coverage ({title})", params,
                    {"set": images, "real": real, **phi.inputs}, units=planner.class_units(), images=images.images,
                    flops=images.images * flops, weights=phi.weights, config=config, label=title, mapped=settings.map,
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
        heads = self.params["heads"] or [None] * len(self.units)
        rows = {
            unit: (images.units_of_class(position)[0], real.units_of_class(position), heads[position])
            for position, unit in enumerate(self.units)
            if unit in missing
        }
        return Work(self, shared, rows, flops_per_unit=self.flops / len(self.units))

    def results(self, storage: Storage) -> dict[str, Any]:
        """Set → the mean of each value over classes, and under ``by_class`` its values for the classes, in order."""
        units = (self.manifest(storage) or {})["units"]
        by_class = {name: [units[unit][name] for unit in self.units] for name in MEASURED}
        means = {name: None if None in values else statistics.fmean(values) for name, values in by_class.items()}
        curves = [units[unit]["reached"] for unit in self.units]
        shortest = min(map(len, curves))
        reached = {str(COUNTS[i]): statistics.fmean(curve[i] for curve in curves) for i in range(shortest)}
        return {"coverage": {title: {**means, "reached": reached, "by_class": by_class} for title in self.titles}}


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to measure some classes of a set."""

    images: Artifact
    real: Artifact
    """Features of the real images."""
    made: Artifact
    phi: Weights | Artifact
    neighbours: int


def measure_classes(task: TaskInputs, classes: Sequence[tuple[str, tuple[str, list[str], int | None]]]) -> None:
    """Measure and store some classes, each given as (its unit, (its unit in the set, units of its real images, its index in φ's
    own classifier))."""
    phi = open_phi(task.phi)
    features_of, weight = Features(phi, own_device()), phi.head_weight
    for unit, (in_set, in_real, head) in classes:
        pixels = load(task.images.read(f"{in_set}.safetensors"))["pixels"]
        features, scores = (found.double() for found in features_of.seen(pixels))
        real = torch.nn.functional.normalize(read_class(task.real, in_real, "features").double(), dim=1)
        measured: dict[str, float | None] = dict.fromkeys(MEASURED)
        tensors, curve = {"features": features.half()}, list[float]()
        if head is not None and weight is not None and len(weight) > 1:
            measured["boundary"] = boundary_distance(scores, weight.double().cpu(), head).median().item()
        if len(real) > 1:
            closest, radii_M = nearest(features, real), _radii(task, in_real, real)
            measured |= {**asdict(coverage(features, real, task.neighbours, radii_M)), "novelty": closest.ratio.median().item()}
            measured["frechet"] = frechet(features, real) if len(features) > 1 else None
            tensors |= {"index": closest.index, "distance": closest.distance, "ratio": closest.ratio}
            shares = reached(features, real, task.neighbours, radii_M).tolist()
            curve = [shares[count - 1] for count in COUNTS if count <= len(shares)]
        digest = task.made.write(f"{unit}.safetensors", pack_tensors(**tensors))
        note(task.made, unit, {**measured, "reached": curve, "images": len(pixels), "sha256": digest})


_radii_of_real = dict[tuple[str, str, int], Tensor]()
"""Radii of the real images of each class that this process has measured sets of: 8 bytes an image."""


def _radii(task: TaskInputs, in_real: Sequence[str], real_MD: Tensor) -> Tensor:
    """Radii of the real images of a class. They are computed once in a process, however many sets are compared with them."""
    key = task.real.address, " ".join(in_real), task.neighbours
    if key not in _radii_of_real:
        _radii_of_real[key] = radii(real_MD, task.neighbours)
    return _radii_of_real[key]
