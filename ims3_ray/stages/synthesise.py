"""Synthesis: a method of :mod:`ims3_ray.synthesis` turns a set of images into another one, or makes a set from nothing.

Ray tasks make the parts of a set, each part completely or not at all; an interrupted part continues from the state that the
method has saved. The images of all parts are then collected in one shard per class.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.cluster.joining import own_device
from ims3_ray.config import ArmConfig, RunConfig, WorkConfig, differing
from ims3_ray.engine.per_class import Work, each_unit_of, map_classes
from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.sets import EXTRAS, commit_set, write_class
from ims3_ray.engine.shards import made_meanwhile, note
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.unfinished import Unfinished
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.adapters import Adapters, Pretrained
from ims3_ray.stages.method_inputs import MethodInputs, costs_of, plan_needs
from ims3_ray.stages.pool_denoiser import PoolDenoiser, PoolModels
from ims3_ray.stages.prepare import Prepare, Prepared
from ims3_ray.stages.select import Select
from ims3_ray.synthesis.base import Given, Part, Synthesis


@dataclass(eq=False)
class Synthesise(Stage):
    """Makes a set by a synthesis method. Every class has a shard ``class-NNNN.safetensors`` with pixels [K, …], and with logits
    and weights if the method returns them."""

    name, makes_set, of_arm = "synthesise", True, True

    @classmethod
    def plan(
        cls, planner: Planner, label: str, title: str, arm: ArmConfig, config: RunConfig, start: Stage | None
    ) -> Synthesise:  # fmt: skip
        """Plan a synthesis that starts from the set ``start``, which holds K images per class, or from nothing."""
        method, k = arm.method, config.selection.images_per_class
        assert method is not None
        settings = config.synthesis.of(method)
        needed = plan_needs(planner, method.needs, config, start)
        params: dict[str, Any] = {
            "method": method.name, **({"version": method.version} if method.version > 1 else {}),
            "settings": differing(settings), "k": k, "classes": list(planner.classes.names), "seed": config.seed,
            "size": config.data.size, "channels": config.data.channels, **needed.params,
        }  # fmt: skip
        own = (method, type(planner.models(config).generator)) if "generator" in method.needs else (method,)
        params |= plugins.hashes(*own)
        inputs: dict[str, Stage] = {} if start is None else {"set": start}
        inputs |= needed.inputs
        if method.pieces(settings, planner.classes.counts):
            inputs["prepared"] = Prepare.plan(planner, method, config)
        costs = costs_of(planner, config, needed)
        method.check(settings, costs)
        count = k * len(planner.classes.names)
        return planner.add(
            cls(
                f"synthesise ({title}, {method.name})", params, inputs, units=planner.class_units(), images=count,
                flops=method.flops(settings, costs), label=label, has_logits=None,
                weights=needed.weights, data_source=needed.data_source, config=config, stored=2 * pixel_bytes(count, config),
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    @property
    def batch(self) -> Hashable:
        return "synthesis"

    def run(self, context: Context) -> None:
        self.run_all(context, [self])

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[Synthesise]) -> None:
        """Make the parts of all sets side by side: a method may have one part only."""
        works = {stage._work(context): stage for stage in stages}
        gpus, title = context.config.actors.gpus, stages[0].title if len(stages) == 1 else "synthesise"
        for work, entries, seconds in each_unit_of(
            context, title, list(works), make_parts, gpus=gpus, what="parts", saves=True
        ):
            works[work]._finish(context, entries, work, seconds)

    def _work(self, context: Context) -> Work:
        storage, config, k = context.storage, self.run_config, self.params["k"]
        method: type[Synthesis] = Synthesis.registry[self.params["method"]]
        settings = config.synthesis.of(method)
        start, prepared = self.inputs.get("set"), self.inputs.get("prepared")
        shared = TaskInputs(
            method(settings), self.artifact(storage), start.artifact(storage) if start else None, self._generator(context),
            Prepared(prepared.artifact(storage) if prepared else None), MethodInputs.of(self, method.needs, context),
        )  # fmt: skip
        parts = named(method.parts(settings, len(context.classes.names), k), self.units, k)
        return Work(self, shared, parts, most_at_once=1, flops_per_unit=self.flops / len(parts))

    def _finish(self, context: Context, entries: dict[str, dict[str, Any]], work: Work, seconds: float) -> None:
        """Collect the parts in one shard per class, and commit the set."""
        if tuple(work.rows) != self.units:
            members = members_of(work.rows, len(self.units))
            source = work.shared.made, {part: entry["sha256"] for part, entry in entries.items()}
            wanted = [(unit, members[i]) for i, unit in enumerate(self.units)]
            gathered = map_classes(context, self.title, gather_parts, source, wanted)
            entries = dict(zip(self.units, gathered, strict=True))
        commit_set(work.shared.made, entries, seconds)

    def _generator(self, context: Context) -> PoolModels | None:
        if "generator" not in self.weights:
            return None
        storage, pool, tuned = context.storage, cast(Select, self.inputs["set"]).pool, self.inputs.get("finetune")
        kept = pool.store(storage)
        return PoolModels(
            Pretrained.of(pool, storage), self.weights.get("autoencoder"), Adapters.of(tuned, storage) if tuned else None,
            kept.artifact if kept.form == "latents" else None, self.run_config.sampling, tuple(self.params["labels"]),
            tuple(units.first for units in pool.class_units(storage)),
        )  # fmt: skip


def named(parts: Sequence[Part], units: Sequence[str], k: int) -> dict[str, Part]:
    """A name for each part. If every part is one whole class, it is the name of the class's unit and nothing has to be
    collected."""
    whole = [[(position, number) for number in range(k)] for position in range(len(units))]
    given = sorted(member for part in parts for member in part)
    if given != [member for members in whole for member in members]:
        raise UserError(
            "the parts of the synthesis method do not have every image of the set exactly once; correct its parts()"
        )
    if [list(part) for part in parts] == whole:
        return dict(zip(units, parts, strict=True))
    return {f"part-{number:05d}": part for number, part in enumerate(parts)}


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to make parts of a set."""

    method: Synthesis
    made: Artifact
    start: Artifact | None
    generator: PoolModels | None
    prepared: Prepared
    inputs: MethodInputs


def make_parts(task: TaskInputs, parts: Sequence[tuple[str, Part]]) -> None:
    """Make some parts of a set."""
    device = own_device()
    inputs = task.inputs.on(device)
    inputs["generator"] = PoolDenoiser(task.generator, device) if task.generator is not None else None
    for name, part in parts:
        if made_meanwhile(task.made, name) is not None:
            continue
        given = _given(task, part, inputs)
        unfinished = Unfinished(task.made, name)
        tensors = task.method.make(given, unfinished.state(), unfinished.save)
        made = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        check_made(task.method.name, made, given, len(part), task.inputs.shape)
        if made_meanwhile(task.made, name) is not None:
            continue
        note(task.made, name, write_class(task.made, name, made.pop("pixels"), indices=given.indices, **made))
        unfinished.forget()


def check_made(method: str, made: Mapping[str, Tensor], given: Given, count: int, shape: tuple[int, int, int]) -> None:
    """Raises :class:`UserError` for what is not a part of a set: images, logits and weights of every member, finite."""
    wanted = {"pixels": (count, *shape), "logits": (count, given.num_classes), "weights": (count,)}
    if unknown := made.keys() - wanted.keys():
        raise UserError(f"synthesis method '{method}' gives {min(unknown)}, which no set has; correct its make()")
    if wrong := [name for name, tensor in made.items() if tuple(tensor.shape) != wanted[name]]:
        name = wrong[0]
        raise UserError(
            f"synthesis method '{method}' gives {name} {tuple(made[name].shape)} where the part has {wanted[name]}; "
            "correct its make()"
        )
    if "pixels" not in made or made["pixels"].dtype != torch.uint8:
        raise UserError(f"synthesis method '{method}' gives no uint8 pixels; correct its make()")
    if infinite := [name for name, tensor in made.items() if not tensor.double().isfinite().all()]:
        raise UserError(f"synthesis method '{method}' gives {infinite[0]} that are not finite; lower its step size")


def _given(task: TaskInputs, part: Part, inputs: Mapping[str, Any]) -> Given:
    classes = torch.tensor([position for position, _ in part])
    numbers = torch.tensor([number for _, number in part])
    pixels, indices = torch.zeros((0, *task.inputs.shape), dtype=torch.uint8), numbers
    if task.start is not None:
        shards = {i: load(task.start.read(f"class-{i:04d}.safetensors")) for i in classes.unique().tolist()}
        pixels = torch.stack([shards[position]["pixels"][number] for position, number in part])
        if all("indices" in shard for shard in shards.values()):
            indices = torch.stack([shards[position]["indices"][number] for position, number in part])
    return Given(pixels=pixels, classes=classes, indices=indices, prepared=task.prepared, **inputs)


def members_of(parts: Mapping[str, Part], classes: int) -> list[list[tuple[str, int]]]:
    """For each class, the part that holds each of its images 0 … K−1, and the image's index within that part."""
    found: list[dict[int, tuple[str, int]]] = [{} for _ in range(classes)]
    for name, part in parts.items():
        for place, (position, number) in enumerate(part):
            found[position][number] = (name, place)
    return [[members[number] for number in sorted(members)] for members in found]


def gather_parts(
    source: tuple[Artifact, Mapping[str, str]], classes: Sequence[tuple[str, list[tuple[str, int]]]]
) -> list[dict[str, Any]]:
    """Write the shards of some classes, whose images are read from the parts that hold them; returns the shards' entries.

    ``source`` is the artifact, and the hash of each part. The parts are kept: if a class's shard is damaged later, it is
    gathered again. Raises :class:`~ims3_ray.errors.Damaged` for a part that was altered.
    """
    made, digests = source
    parts: dict[str, dict[str, Tensor]] = {}
    entries = []
    for unit, members in classes:
        parts = {name: parts.get(name) or load(made.read(f"{name}.safetensors", digest=digests[name])) for name, _ in members}
        names = ("pixels", "indices", *(name for name in EXTRAS if all(name in parts[part] for part, _ in members)))
        tensors = {name: torch.stack([parts[part][name][place] for part, place in members]) for name in names}
        entries.append(write_class(made, unit, tensors.pop("pixels"), **tensors))
    return entries
