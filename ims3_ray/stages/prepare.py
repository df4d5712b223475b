"""The preparation of a synthesis method: computations on the real images that the sets of all sizes and starts share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.cluster.joining import own_device
from ims3_ray.config import RunConfig, WorkConfig, differing
from ims3_ray.engine.per_class import Work, each_unit_of
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import commit_units, note, pack_tensors
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.method_inputs import MethodInputs, costs_of, plan_needs
from ims3_ray.synthesis.base import Inputs, Piece, Synthesis


@dataclass(eq=False)
class Prepare(Stage):
    """Makes the pieces of a preparation. Each is a unit with the tensors that the method returned."""

    name = "prepare"

    @classmethod
    def plan(cls, planner: Planner, method: type[Synthesis], config: RunConfig) -> Prepare:
        settings, needed = config.synthesis.of(method), plan_needs(planner, method.preparation_needs, config)
        params: dict[str, Any] = {
            "method": method.name, **({"version": method.version} if method.version > 1 else {}),
            "settings": {key: value for key, value in differing(settings).items() if key in method.prepared_by},
            "classes": list(planner.classes.names), "seed": config.seed, "size": config.data.size,
            "channels": config.data.channels, **needed.params, **plugins.hashes(method),
        }  # fmt: skip
        pieces, costs = method.pieces(settings, planner.classes.counts), costs_of(planner, config, needed)
        return planner.add(
            cls(
                f"prepare {method.name}", params, needed.inputs, units=tuple(unit_of(piece) for piece in pieces),
                flops=method.preparation_flops(settings, costs), stored=method.preparation_bytes(settings, costs),
                label=method.name, weights=needed.weights, data_source=needed.data_source, config=config,
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    @property
    def batch(self) -> Hashable:
        return "preparations"

    def run(self, context: Context) -> None:
        self.run_all(context, [self])

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[Prepare]) -> None:
        """Make the pieces of all preparations side by side."""
        works = [stage._work(context) for stage in stages]
        gpus, title = context.config.actors.gpus, stages[0].title if len(stages) == 1 else "prepare"
        for work, entries, seconds in each_unit_of(context, title, works, make_pieces, gpus=gpus, what="pieces"):
            commit_units(work.shared.made, entries, seconds)

    def _work(self, context: Context) -> Work:
        method: type[Synthesis] = Synthesis.registry[self.params["method"]]
        settings, missing = self.run_config.synthesis.of(method), set(self.missing(context.storage))
        pieces = method.pieces(settings, context.classes.counts)
        rows = {unit_of(piece): piece for piece in pieces if unit_of(piece) in missing}
        shared = TaskInputs(
            method(settings), self.artifact(context.storage), MethodInputs.of(self, method.preparation_needs, context)
        )  # fmt: skip
        return Work(self, shared, rows, method.pieces_at_once, self.flops / len(self.units))


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to make pieces of a preparation."""

    method: Synthesis
    made: Artifact
    inputs: MethodInputs


def make_pieces(task: TaskInputs, pieces: Sequence[tuple[str, Piece]]) -> None:
    """Make and store some pieces."""
    inputs = Inputs(**task.inputs.on(own_device()))
    for unit, piece in pieces:
        tensors = task.method.prepare(piece, inputs)
        note(task.made, unit, {"sha256": task.made.write(f"{unit}.safetensors", pack_tensors(**tensors))})


def unit_of(piece: Piece) -> str:
    """Name of a piece's unit."""
    position, number = piece
    return f"class-{position:04d}-{number:05d}"


@dataclass(frozen=True)
class Prepared:
    """The pieces of a preparation; there are none where the method has no preparation."""

    made: Artifact | None

    def __call__(self, piece: Piece) -> Mapping[str, Tensor]:
        if self.made is None:
            raise ValueError("this method has no preparation; its pieces() names none")
        return load(self.made.read(f"{unit_of(piece)}.safetensors"))
