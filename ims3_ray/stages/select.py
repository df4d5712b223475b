"""Selection: S3 takes one subgroup per class by Eq. 10; other selectors look at one class at a time. Then the chosen images are
gathered, one shard per class."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device, placed, results
from ims3_ray.errors import UserError
from ims3_ray.hardware import hardware, kind
from ims3_ray.room import Bundle, wait_for_room
from ims3_ray.seeds import generator_for
from ims3_ray.selection import SELECTORS, ClassImages, Per, SubgroupSelection
from ims3_ray.stages.base import Context, Stage, by_class, read_many
from ims3_ray.stages.images import ImageStore, first_index
from ims3_ray.stages.pool import kind_of
from ims3_ray.stages.s3 import Listener, Part, actor_name, start_selector, table_of
from ims3_ray.stages.sets import commit_set, spread, write_class

LISTENING = 4
"""S3 actors, a process each, that listen while candidates are made."""


@dataclass(frozen=True)
class ClassUnits:
    """A class's units in order, with the index within the class of each one's first image, and how many images there are."""

    label: int
    first: dict[str, int]
    count: int


def class_units(context: Context, stage: Stage, pool_size: int) -> list[ClassUnits]:
    """Of every class, in order. Broken real images do not count; candidates beyond ``pool_size`` are none."""
    real = stage.kind == "encode"
    labels = context.classes.source_labels if real else context.classes.generator_labels
    size, units, found = 0 if real else stage.run.sampling.unit_size, by_class(stage.units), []
    entries = (stage.manifest(context.storage) or {})["units"] if real else {}
    for label in labels:
        images = {unit: entries[unit]["images"] if real else size for unit in units[label]}
        count = sum(images.values()) if real else min(sum(images.values()), pool_size)
        found.append(ClassUnits(label, first_index(units[label], images), count))
    return found


# S3


def parts_of(context: Context, stage: Stage) -> dict[str, Part]:
    """What the S3 actor of a selection adds up. Needs the real images to be decoded, but no candidate."""
    s, storage = stage.run.selection, context.storage
    k, labels = s.images_per_class, context.classes.generator_labels
    classes = class_units(context, stage.inputs["images"], stage.run.pool_size)
    first = {unit: index for c in classes for unit, index in c.first.items() if index < s.groups * k}
    counts = {c.label: c.count for c in classes}
    candidates = Part(stage.inputs["embed"].artifact(storage), labels, first, counts, k, s.groups)
    references = stage.inputs["references"]
    if s.references == "real":
        classes, labels = class_units(context, references.inputs["images"], 0), context.classes.source_labels
    counts = {c.label: c.count for c in classes}
    drawn = Part(
        references.artifact(storage), labels, {}, counts, s.references_per_class or max(counts.values()), 1, stage.run.seed
    )
    first = {}
    for c in classes:
        groups, ends = drawn.group_of(c.label), [*list(c.first.values())[1:], c.count]
        held = [(groups[start:end] >= 0).any() for start, end in zip(c.first.values(), ends, strict=True)]
        first |= dict(itertools.compress(c.first.items(), held))
    return {"candidates": candidates, "references": replace(drawn, first=first)}


def listen(context: Context, stages: Sequence[Stage]) -> dict[Stage, list[Listener]]:
    """Start the S3 actor of selections that are to come, to be told of every unit while candidates are made: by the stage that
    embeds them. Beyond a few the selections read what is committed when it is their turn."""
    storage = context.storage
    listeners: dict[Stage, list[Listener]] = {}
    coming = [s for s in stages if s.kind == "select" and s.params["select"] == "s3" and s.missing(storage)]
    for stage in [s for s in coming if s.inputs["embed"].missing(storage)][:LISTENING]:
        key, parts = stage.key(storage), parts_of(context, stage)
        assert key is not None
        selector = start_selector(key, parts, stage.run.selection)
        print(f"{stage.title}: the S3 actor is {actor_name(key, storage)}", flush=True)
        shared = stage.run.selection.references == "generated"
        heard = ("candidates", "references") if shared else ("candidates",)
        listeners.setdefault(stage.inputs["embed"], []).extend(Listener(selector, name, parts[name]) for name in heard)
    return listeners


def choose_s3(context: Context, stage: Stage) -> tuple[list[Tensor], dict[str, Any]]:
    """Indices of the chosen subgroup of each class, and the terms of Eq. 10, from the S3 actor."""
    key = stage.key(context.storage)
    assert key is not None
    selector = start_selector(key, parts_of(context, stage), stage.run.selection)
    try:
        if (selection := results(selector.select.remote())) is None:
            results(selector.refresh.remote())
            selection = results(selector.select.remote())
    except ValueError as error:  # of a geometry that has no solution
        raise UserError(f"{stage.title}: {str(error).splitlines()[-1]} (class and subgroup, from 0)") from error
    if selection is None:
        lost = results(selector.missing.remote())
        raise UserError(f"{stage.title}: {len(lost)} embedding shards are gone from the storage, e.g. {lost[0][1]}")
    ray.kill(selector)
    return chosen_by(selection, stage.run.selection.images_per_class)


def chosen_by(selection: SubgroupSelection, k: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Indices of the images of the chosen subgroups, and the table of the selection."""
    return [torch.arange(g * k, (g + 1) * k) for g in selection.groups.tolist()], table_of(selection)


# Other selectors


@dataclass(frozen=True)
class Looked:
    """What a selector is shown of each class."""

    select: str
    per: Per
    k: int
    seed: int
    embed: Artifact | None
    references: Artifact | None


def choose_classes(look: Looked, classes: list[tuple[ClassUnits, ClassUnits | None, int]]) -> list[Tensor]:
    """Chosen indices of some classes, of which the images, the real ones and the number of images to choose among are given."""
    selector, chosen = SELECTORS[look.select], []
    for units, real, count in classes:
        shown: dict[str, Tensor] = {}
        if look.embed is not None:
            tensors = [load(shard) for _, shard in read_many(look.embed, list(units.first), "safetensors")]
            names = ("log_probability", "recognised") if "confidence" in selector.needs else ("features",)
            shown = {name: torch.cat([part[name] for part in tensors])[:count] for name in names}
        if look.references is not None and real is not None:
            shards = read_many(look.references, list(real.first), "safetensors")
            shown["references"] = torch.cat([load(shard)["features"] for _, shard in shards])
        for name in shown.keys() & {"features", "references"}:
            shown[name] = normalize(shown[name].double(), dim=1)
        rng = generator_for(look.seed, "random-subset", units.label)
        chosen.append(selector.choose(ClassImages(count, rng, **shown), look.k, look.per).sort().values)
    return chosen


def choose_one_by_one(context: Context, stage: Stage) -> list[Tensor]:
    """Indices of each class's chosen images, in rising order."""
    storage, real = context.storage, stage.inputs["images"].kind == "encode"
    embed, references = stage.inputs.get("embed"), stage.inputs.get("references")
    look = Looked(
        stage.params["select"], stage.params["per"], stage.params["k"], stage.run.seed,
        embed.artifact(storage) if embed else None, references.artifact(storage) if references else None,
    )  # fmt: skip
    units = class_units(context, stage.inputs["images"], stage.run.pool_size)
    others = class_units(context, references.inputs["images"], 0) if references else [None] * len(units)
    counts = [c.count if real else stage.params["pool"] for c in units]
    return spread(choose_classes, look, list(zip(units, others, counts, strict=True)))


# The images


@dataclass(frozen=True)
class Gathered:
    """Where the chosen images are read and written, and how they are decoded if they were stored as latents."""

    store: ImageStore
    selected: Artifact
    threads: int
    alike: str | None
    """Kind of hardware that made the pool's images; None if another may decode them."""


def gather_classes(way: Gathered, classes: list[tuple[str, ClassUnits, Tensor]]) -> list[dict[str, Any]]:
    """Read the chosen images of some classes, decoding only the parts of shards that hold them, and write a shard for each."""
    decoder = None
    if way.store.form == "latents":
        torch.set_num_threads(way.threads)
        device = own_device()
        if way.alike not in (None, kind(hardware(device))):
            raise UserError(
                f"the pool's images were made on {way.alike}, and {kind(hardware(device))} would decode them again to others "
                "in the last bits; use one kind of node, or allow it with pool.mix_hardware=true"
            )
        decoder = way.store.decoder(device)
    entries = []
    for name, units, indices in classes:
        firsts = np.array(list(units.first.values()))
        inside = np.searchsorted(firsts, indices.numpy(), side="right") - 1
        offsets = {unit: (indices.numpy()[inside == i] - firsts[i]).tolist() for i, unit in enumerate(units.first)}
        shards = read_many(way.store.artifact, [unit for unit, within in offsets.items() if within], way.store.suffix)
        images = torch.cat([way.store.unpack(shard, decoder, offsets[unit]) for unit, shard in shards])
        entries.append(write_class(way.selected, name, images, indices=indices))
    return entries


def run(context: Context, stage: Stage) -> None:
    """Choose K images per class and commit them: a shard ``class-NNNN.safetensors`` each with pixels [K, …] and their
    indices."""
    began = time.monotonic()
    if stage.params["select"] == "s3":
        chosen, table = choose_s3(context, stage)
    else:
        chosen, table = choose_one_by_one(context, stage), {}
    commit_chosen(context, stage, chosen, table, began)


def commit_chosen(context: Context, stage: Stage, chosen: Sequence[Tensor], table: dict[str, Any], began: float) -> None:
    """Gather the images that were chosen of each class."""
    images, artifact = stage.inputs["images"], stage.artifact(context.storage)
    actors = context.config.actors
    way = Gathered(ImageStore.of(images, context.storage), artifact, actors.threads, kind_of(context, images))
    cluster = context.config.cluster
    resources: dict[str, Any] = {}
    workers: list[Bundle] = []
    if way.store.form == "latents":
        resources = {"num_cpus": actors.cpus, "num_gpus": actors.gpus, **placed(cluster, "pool")}
        workers = [actors.resources]
    classes = list(zip(stage.units, class_units(context, images, stage.run.pool_size), chosen, strict=True))
    wait_for_room(cluster, "pool", stage.title, workers)
    made = spread(gather_classes, way, classes, **resources)
    entries = dict(zip(stage.units, made, strict=True))
    commit_set(artifact, entries, time.monotonic() - began, s3=table)
