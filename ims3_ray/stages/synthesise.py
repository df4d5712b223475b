"""Synthesis: a method of :mod:`ims3_ray.synthesis` turns a set of images into another one, or makes a set from nothing.

Ray tasks make the parts of a set, each part completely or not at all; an interrupted part continues from the state that the
method has saved. The images of all parts are then collected in one shard per class.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.cluster.joining import own_device
from ims3_ray.config import ArmConfig, RunConfig, SamplingConfig, WorkConfig, differing
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.engine.images import DTYPES, Decoder
from ims3_ray.engine.per_class import each_unit, map_classes
from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.sets import EXTRAS, RealSplit, commit_set, write_class
from ims3_ray.engine.shards import note
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.models.autoencoder import load_autoencoder
from ims3_ray.models.encoder import embedding_cost, encoder_config, encoder_path
from ims3_ray.stages.adapters import Adapters, GroupModels
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.select import Select
from ims3_ray.stages.teacher import load_teacher, plan_teacher, teacher_of, training_cost
from ims3_ray.synthesis.base import Given, Need, Part, Synthesis

ENCODED_AT_ONCE = 8
"""Images per call of the autoencoder."""


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
        params: dict[str, Any] = {
            "method": method.name, "settings": differing(settings), "k": k, "classes": list(planner.classes.names),
            "seed": config.seed, "size": config.data.size, "channels": config.data.channels, **plugins.hashes(method),
        }  # fmt: skip
        inputs: dict[str, Stage] = {} if start is None else {"set": start}
        weights: dict[str, Weights] = {}
        forward: dict[Need, float] = {}
        if "real" in method.needs:
            inputs["real"] = Encode.plan(planner, "train", config.data)
        if "generator" in method.needs:
            models, pool = planner.models(config), cast(Select, start).pool
            params |= {
                "generator": models.generator_weights.digest, "labels": list(models.labels),
                "precision": config.sampling.precision, **plugins.hashes(method, type(models.generator)),
            }  # fmt: skip
            inputs |= {name: stage for name, stage in pool.inputs.items() if name == "finetune"}
            if models.autoencoder is not None:
                inputs["images"] = pool  # for the latents of its images, if these are stored
            weights |= pool.weights
            forward["generator"] = models.generator.forward_flops()
        if "teacher" in method.needs:
            teacher = plan_teacher(planner)
            inputs, weights, params = inputs | teacher.inputs, weights | teacher.weights, params | teacher.params
            forward["teacher"] = teacher_flops(planner)
        count = k * len(planner.classes.names)
        return planner.add(
            cls(
                f"synthesise ({title}, {method.name})", params, inputs, units=planner.class_units(), images=count,
                flops=count * method.flops(settings, forward), label=label, has_logits=None, weights=weights, config=config,
                stored=2 * pixel_bytes(count, config),
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    def run(self, context: Context) -> None:
        began, storage, config = time.monotonic(), context.storage, self.run_config
        method: type[Synthesis] = Synthesis.registry[self.params["method"]]
        settings, classes, k = config.synthesis.of(method), len(context.classes.names), self.params["k"]
        parts = named(method.parts(settings, classes, k), self.units, k)
        start, real = self.inputs.get("set"), self.inputs.get("real")
        way = _Way(
            method(settings), self.artifact(storage), start.artifact(storage) if start else None,
            RealSplit.of(cast(Encode, real), storage) if real else None, self._generator(context),
            teacher_of(self, context) if "teacher" in method.needs else None, context.classes.names,
            (config.data.channels, config.data.size, config.data.size), config.seed, context.config.actors.threads,
        )  # fmt: skip
        gpus = context.config.actors.gpus
        entries = each_unit(context, self, make_parts, way, parts, gpus=gpus, what="parts")
        if tuple(parts) != self.units:
            members = members_of(parts, classes)
            gathered = map_classes(gather_parts, way.made, [(unit, members[i]) for i, unit in enumerate(self.units)])
            entries = dict(zip(self.units, gathered, strict=True))
        commit_set(way.made, entries, time.monotonic() - began)

    def _generator(self, context: Context) -> _Generator | None:
        if "generator" not in self.weights:
            return None
        storage, pool, tuned = context.storage, cast(Select, self.inputs["set"]).pool, self.inputs.get("finetune")
        kept = pool.store(storage)
        return _Generator(
            self.weights["generator"], self.weights.get("autoencoder"), Adapters.of(tuned, storage) if tuned else None,
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


def teacher_flops(planner: Planner) -> float:
    """Floating-point operations of a forward pass of the teacher on one image."""
    teacher, data = planner.work.evaluation.teacher, planner.work.data
    if teacher.weights is None:
        return training_cost(teacher.training, data.channels, len(planner.classes.names), data.size)
    return embedding_cost(encoder_config(encoder_path(teacher.weights)).model_dump_json(), data.size)[0]


@dataclass(frozen=True)
class _Generator:
    """What a task needs to build the :class:`PoolDenoiser` of the pool from which a set was selected."""

    weights: Weights
    autoencoder: Weights | None
    adapters: Adapters | None
    pool: Artifact | None
    """Artifact with the latents of all candidates; None if they are not stored."""
    sampling: SamplingConfig
    labels: tuple[int, ...]
    first: tuple[Mapping[str, int], ...]
    """For each class: unit → index within the class of the unit's first image."""


@dataclass(frozen=True)
class _Way:
    method: Synthesis
    made: Artifact
    start: Artifact | None
    real: RealSplit | None
    generator: _Generator | None
    teacher: Weights | Artifact | None
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    seed: int
    threads: int


def make_parts(way: _Way, parts: Sequence[tuple[str, Part]]) -> None:
    """Make some parts of a set."""
    torch.set_num_threads(way.threads)
    device = own_device()
    generator = PoolDenoiser(way.generator, device) if way.generator is not None else None
    teacher = load_teacher(way.teacher, way.class_names, device) if way.teacher is not None else None
    for name, part in parts:
        given = _given(way, part, device, generator, teacher)
        state = f"{name}.state"
        saved = way.made.read(state) if state in way.made.shards() else None
        made = dict(way.method.make(given, saved, partial(way.made.write, state)))
        check_made(way.method.name, made, given, len(part), way.shape)
        note(way.made, name, write_class(way.made, name, made.pop("pixels"), indices=given.indices, **made))
        if state in way.made.shards():
            way.made.forget(state)


def check_made(method: str, made: Mapping[str, Tensor], given: Given, count: int, shape: tuple[int, int, int]) -> None:
    """Raises :class:`UserError` for what is not a part of a set: images, logits and weights of every member, finite."""
    wanted = {"pixels": (count, *shape), "logits": (count, given.num_classes), "weights": (count,)}
    if wrong := [name for name, tensor in made.items() if tuple(tensor.shape) != wanted.get(name)]:
        name = wrong[0]
        raise UserError(
            f"synthesis method '{method}' gives {name} {tuple(made[name].shape)} where the part has {wanted.get(name)}; "
            "correct its make()"
        )
    if "pixels" not in made or made["pixels"].dtype != torch.uint8:
        raise UserError(f"synthesis method '{method}' gives no uint8 pixels; correct its make()")
    if infinite := [name for name, tensor in made.items() if not tensor.double().isfinite().all()]:
        raise UserError(f"synthesis method '{method}' gives {infinite[0]} that are not finite; lower its step size")


def _given(way: _Way, part: Part, device: str, generator: PoolDenoiser | None, teacher: Any) -> Given:
    classes = torch.tensor([position for position, _ in part])
    numbers = torch.tensor([number for _, number in part])
    pixels, indices = torch.zeros((0, *way.shape), dtype=torch.uint8), numbers
    if way.start is not None:
        shards = {i: load(way.start.read(f"class-{i:04d}.safetensors")) for i in classes.unique().tolist()}
        pixels = torch.stack([shards[position]["pixels"][number] for position, number in part])
        if all("indices" in shard for shard in shards.values()):
            indices = torch.stack([shards[position]["indices"][number] for position, number in part])
    real = _no_real_images if way.real is None else way.real.read_class
    return Given(pixels, classes, indices, len(way.class_names), way.seed, device, real, generator, teacher)


def _no_real_images(position: int) -> Tensor:
    raise ValueError("this method does not say that it needs real images; add 'real' to its needs")


def members_of(parts: Mapping[str, Part], classes: int) -> list[list[tuple[str, int]]]:
    """For each class, the part that holds each of its images 0 … K−1, and the image's index within that part."""
    found: list[dict[int, tuple[str, int]]] = [{} for _ in range(classes)]
    for name, part in parts.items():
        for place, (position, number) in enumerate(part):
            found[position][number] = (name, place)
    return [[members[number] for number in sorted(members)] for members in found]


def gather_parts(made: Artifact, classes: Sequence[tuple[str, list[tuple[str, int]]]]) -> list[dict[str, Any]]:
    """Write the shards of some classes, whose images are read from the parts that hold them; returns the shards' entries."""
    parts: dict[str, dict[str, Tensor]] = {}
    entries = []
    for unit, members in classes:
        parts = {name: parts.get(name) or load(made.read(f"{name}.safetensors")) for name, _ in members}
        names = ("pixels", "indices", *(name for name in EXTRAS if all(name in parts[part] for part, _ in members)))
        tensors = {name: torch.stack([parts[part][name][place] for part, place in members]) for name in names}
        entries.append(write_class(made, unit, tensors.pop("pixels"), **tensors))
    return entries


class PoolDenoiser:
    """The :class:`ims3_ray.synthesis.base.Denoiser` of a pool: its generator, with the latents of its images."""

    def __init__(self, source: _Generator, device: str) -> None:
        dtype = DTYPES[source.sampling.precision]
        self.source, self.device = source, device
        self.models = GroupModels(source.weights.path(), source.adapters, device, dtype)
        vae = source.autoencoder
        self.decoder = Decoder(vae.path(), device, source.sampling.precision) if vae is not None else None
        self.schedule = self.models.generator.schedule

    def label(self, position: int) -> int:
        return self.source.labels[position]

    def predictor(self, position: int, count: int) -> Predictor:
        label = self.label(position)
        self.models.of_class(label).requires_grad_(False)
        return self.models.predictor(label, count)

    def latents(self, given: Given) -> Tensor:
        s = self.source
        if s.autoencoder is None:
            return to_signed(given.pixels)
        if s.pool is None:
            with torch.inference_mode():
                encode = load_autoencoder(s.autoencoder.path()).to(self.device).moments
                parts = given.pixels.split(ENCODED_AT_ONCE)
                return torch.cat([encode(to_signed(part.to(self.device)))[0].cpu() for part in parts]).clone()
        found = []
        for position, index in zip(given.classes.tolist(), given.indices.tolist(), strict=True):
            unit, start = max(
                ((unit, start) for unit, start in s.first[position].items() if start <= index), key=lambda pair: pair[1]
            )
            found.append(load(s.pool.read(f"{unit}.safetensors"))["latents"][index - start])
        return torch.stack(found).float()

    def decode(self, latents: Tensor) -> Tensor:
        return to_uint8(latents).cpu() if self.decoder is None else self.decoder(latents).cpu()
