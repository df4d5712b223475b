"""Selection: K images of each class are chosen and copied, one shard per class.

A selector that looks at one class at a time runs in Ray tasks; one that looks at the subgroups of all classes runs in the S3
actor (:mod:`ims3_ray.stages.s3`), which receives the sums of every embedded unit while candidates are still being made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray import plugins
from ims3_ray.cluster.hardware import hardware, kind
from ims3_ray.cluster.joining import own_device, results
from ims3_ray.config import ArmConfig, RunConfig, differing
from ims3_ray.engine.images import ImageStore
from ims3_ray.engine.noted import kind_of
from ims3_ray.engine.per_class import map_classes
from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.pool import ClassUnits, ImagePool
from ims3_ray.engine.sets import commit_set, write_class
from ims3_ray.engine.shards import read_many
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.engine.worker import ShardReceiver
from ims3_ray.errors import Damaged, UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.seeds import generator_for
from ims3_ray.selection import ClassImages, ClassSelector, Per, Selector, SubgroupSelection, SubgroupSelector
from ims3_ray.stages.embed import Embed
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.generate import Generate
from ims3_ray.stages.s3 import Listener, Part, actor_name, start_selector, table_of

LISTENING = 4
"""Largest number of S3 actors (each is a process) that receive sums while candidates are made."""


@dataclass(eq=False)
class Select(Stage):
    """Selects a set. Every class has a shard ``class-NNNN.safetensors`` with pixels [K, …] and the images' indices among the
    candidates."""

    name, version, makes_set, of_arm = "select", 3, True, True

    @classmethod
    def plan(cls, planner: Planner, label: str, title: str, arm: ArmConfig, config: RunConfig) -> Select:
        """Plan the selection of an arm that chooses from real images or from candidates."""
        s, selector = config.selection, arm.selector
        together = issubclass(selector, SubgroupSelector)
        params: dict[str, Any] = {
            "select": arm.select, "per": arm.per, **({} if selector.whole else {"k": s.images_per_class}),
            "classes": list(planner.classes.names), "settings": differing(s.of(selector)), **plugins.hashes(selector),
        }  # fmt: skip
        if (s.references_per_class or arm.images == "real") if together else selector.draws:
            params["seed"] = config.seed
        if not together or s.references == "generated":
            params["pool"] = _pool_size(arm, config)
        images: ImagePool
        if together and arm.images == "real":
            _check_real(planner, arm, s.groups * s.images_per_class)
        if arm.images == "real":
            images = Encode.plan(planner, "train", config.data, s.images_per_class * (s.groups if together else 1))
        else:
            images = Generate.plan(planner, arm, config)
        inputs: dict[str, Stage] = {"images": images}
        if selector.needs & {"features", "confidence"}:
            asked_by = f"select: {arm.select}" if "confidence" in selector.needs else ""
            inputs["embed"] = Embed.plan(planner, images, config, asked_by)
        if together and s.references == "generated":
            inputs["references"] = inputs["embed"]
        elif "references" in selector.needs:
            inputs["references"] = Embed.plan(planner, Encode.plan(planner, "train", config.data), config)
        if together:
            params |= {"groups": s.groups, "references": s.references, "references_per_class": s.references_per_class}
        count = images.images if selector.whole else s.images_per_class * len(planner.classes.names)
        return planner.add(
            cls(
                f"select ({title})", params, inputs, units=planner.class_units(), images=count, label=label, config=config,
                stored=pixel_bytes(count, config),
            )
        )  # fmt: skip

    @property
    def pool(self) -> ImagePool:
        """The images from which the selection chooses."""
        return cast(ImagePool, self.inputs["images"])

    @property
    def selector(self) -> Selector:
        """The selector with its settings."""
        selector: type[Selector] = Selector.registry[self.params["select"]]
        return selector(self.run_config.selection.of(selector))

    def knows_images(self, context: Context) -> bool:
        """Whether the real images that it looks at are decoded, so that their number is known. That of candidates always is."""
        looked_at = {self.pool, cast(Embed, self.inputs["references"]).source}
        return not any(isinstance(images, Encode) and images.missing(context.storage) for images in looked_at)

    @classmethod
    def listen(cls, context: Context, waiting: Sequence[Select], running: Sequence[Stage]) -> dict[Stage, list[ShardReceiver]]:
        """Start the S3 actors of the first :data:`LISTENING` waiting selections whose candidates are embedded now, and return
        their listeners. The other selections read the committed embeddings when they run."""
        found: dict[Stage, list[ShardReceiver]] = {}
        coming = [s for s in waiting if isinstance(s.selector, SubgroupSelector) and s.inputs["embed"] in running]
        for stage in [s for s in coming if s.knows_images(context)][:LISTENING]:
            key, parts = stage.key(context.storage), parts_of(context, stage)
            assert key is not None
            actor = start_selector(key, parts, cast(SubgroupSelector, stage.selector))
            print(f"{stage.title}: the S3 actor is {actor_name(key, context.storage)}", flush=True)
            shared = stage.inputs["references"] is stage.inputs["embed"]
            heard = ("candidates", "references") if shared else ("candidates",)
            found.setdefault(stage.inputs["embed"], []).extend(Listener(actor, name, parts[name]) for name in heard)
        return found

    def run(self, context: Context) -> None:
        began = time.monotonic()
        if isinstance(self.selector, SubgroupSelector):
            chosen, table = choose_together(context, self)
        elif self.selector.whole:
            chosen, table = [torch.arange(units.count) for units in self.pool.class_units(context.storage)], {}
        else:
            chosen, table = choose_one_by_one(context, self), {}
        commit_chosen(context, self, chosen, table, began)


def _pool_size(arm: ArmConfig, config: RunConfig) -> int:
    """Number of candidates of each class from which an arm chooses; 0 for real images, all of which take part."""
    s = config.selection
    if arm.images == "real":
        return 0
    if arm.select == "first":
        return s.images_per_class
    return s.groups * s.images_per_class if arm.per == "group" and not _together(arm) else config.pool_size


def _check_real(planner: Planner, arm: ArmConfig, needed: int) -> None:
    """Raises :class:`UserError` for a class with too few real images to make up the candidate subgroups."""
    for name, count in zip(planner.classes.names, planner.classes.counts, strict=True):
        if count < needed:
            raise UserError(
                f"class '{name}' has {count} images, and select: {arm.select} chooses among selection.groups·images_per_class "
                f"= {needed} real images; lower one of the two"
            )


def _together(arm: ArmConfig) -> bool:
    return issubclass(arm.selector, SubgroupSelector)


# Selectors that look at all classes


def parts_of(context: Context, stage: Select) -> dict[str, Part]:
    """The two pools of embeddings that the S3 actor of a selection adds up. The real images must be decoded already; the
    candidates need not exist yet."""
    config, storage, pool = stage.run_config, context.storage, stage.pool
    s, real = config.selection, isinstance(pool, Encode)
    classes = pool.class_units(storage, None if real else config.pool_size)
    drawn = (config.seed, "subgroups") if real else (None, "")
    candidates = Part.of(stage.inputs["embed"].artifact(storage), classes, s.images_per_class, s.groups, *drawn)
    references = cast(Embed, stage.inputs["references"])
    if references.source is not pool:
        classes = references.source.class_units(storage)
    most = s.references_per_class or max(c.count for c in classes)
    return {"candidates": candidates, "references": Part.of(references.artifact(storage), classes, most, 1, config.seed)}


def choose_together(context: Context, stage: Select) -> tuple[list[Tensor], dict[str, Any]]:
    """Let the S3 actor select; returns the indices of each class's chosen images, and the terms of the objective."""
    key, parts = stage.key(context.storage), parts_of(context, stage)
    assert key is not None
    actor = start_selector(key, parts, cast(SubgroupSelector, stage.selector))
    try:
        if (selection := results(actor.select.remote())) is None:
            results(actor.refresh.remote())
            selection = results(actor.select.remote())
    except ValueError as error:  # raised for centroids that allow no selection
        raise UserError(f"{stage.title}: {str(error).splitlines()[-1]} (class and subgroup, from 0)") from error
    if selection is None:
        lost = results(actor.missing.remote())
        raise Damaged(
            f"{stage.title}: {len(lost)} shards of embeddings are lost or damaged, e.g. of unit {lost[0][1]}; the same command "
            "makes them again"
        )
    ray.kill(actor)
    return chosen_by(selection, parts["candidates"])


def chosen_by(selection: SubgroupSelection, candidates: Part) -> tuple[list[Tensor], dict[str, Any]]:
    """Indices of the images of the chosen subgroups, and the table of the selection."""
    groups = zip(candidates.labels, selection.groups.tolist(), strict=True)
    return [candidates.members(label, group) for label, group in groups], table_of(selection)


# Selectors that look at one class at a time


@dataclass(frozen=True)
class _Choice:
    """How a selector chooses, and the artifacts with the embeddings that it looks at."""

    selector: ClassSelector
    per: Per
    k: int
    seed: int
    embed: Artifact | None
    references: Artifact | None


def choose_classes(choice: _Choice, classes: list[tuple[ClassUnits, ClassUnits | None]]) -> list[Tensor]:
    """Indices of the chosen images of some classes. Each class is given as (units of its images, units of its real images)."""
    selector, chosen = choice.selector, []
    for units, real in classes:
        shown: dict[str, Tensor] = {}
        if choice.embed is not None:
            tensors = [load(shard) for _, shard in read_many(choice.embed, list(units.first), "safetensors")]
            names = ("log_probability", "recognised") if "confidence" in selector.needs else ("features",)
            shown = {name: torch.cat([part[name] for part in tensors])[: units.count] for name in names}
        if choice.references is not None and real is not None:
            shards = read_many(choice.references, list(real.first), "safetensors")
            shown["references"] = torch.cat([load(shard)["features"] for _, shard in shards])
        for name in shown.keys() & {"features", "references"}:
            shown[name] = normalize(shown[name].double(), dim=1)
        rng = generator_for(choice.seed, "random-subset", units.label)
        chosen.append(selector.choose(ClassImages(units.count, rng, **shown), choice.k, choice.per).sort().values)
    return chosen


def choose_one_by_one(context: Context, stage: Select) -> list[Tensor]:
    """Indices of each class's chosen images, in ascending order."""
    storage, selector = context.storage, stage.selector
    assert isinstance(selector, ClassSelector)
    embed, references = stage.inputs.get("embed"), stage.inputs.get("references")
    choice = _Choice(
        selector, stage.params["per"], stage.run_config.selection.images_per_class, stage.run_config.seed,
        embed.artifact(storage) if embed else None, references.artifact(storage) if references else None,
    )  # fmt: skip
    units = stage.pool.class_units(storage, stage.params["pool"] or None)
    real = cast(Embed, references).source.class_units(storage) if references else [None] * len(units)
    return map_classes(context, stage.title, choose_classes, choice, list(zip(units, real, strict=True)))


# The images


@dataclass(frozen=True)
class _Gathering:
    """Where the chosen images are read and written, and how they are decoded if they were stored as latents."""

    store: ImageStore
    selected: Artifact
    threads: int
    alike: str | None
    """Kind of hardware that made the pool's images; None if hardware of any kind may decode them."""


def gather_classes(gathering: _Gathering, classes: list[tuple[str, ClassUnits, Tensor]]) -> list[dict[str, Any]]:
    """Read the chosen images of some classes, decoding only the parts of shards that hold them, and write a shard for each."""
    decoder = None
    if gathering.store.form == "latents":
        torch.set_num_threads(gathering.threads)
        device = own_device()
        if gathering.alike not in (None, kind(hardware(device))):
            raise UserError(
                f"the pool's images were made on {gathering.alike}, and {kind(hardware(device))} would decode them again to "
                "others in the last bits; use one kind of node, or allow it with pool.mix_hardware=true"
            )
        decoder = gathering.store.decoder(device)
    entries = []
    for name, units, indices in classes:
        images = gathering.store.read_some(within_units(units, indices.numpy()), decoder)
        entries.append(write_class(gathering.selected, name, images, indices=indices))
    return entries


def within_units(units: ClassUnits, indices: NDArray[np.int64]) -> dict[str, list[int]]:
    """Unit → the offsets in it of those images of a class that are at ``indices``; only units that hold some of them."""
    firsts = np.array(list(units.first.values()))
    inside = np.searchsorted(firsts, indices, side="right") - 1
    offsets = {unit: (indices[inside == number] - firsts[number]).tolist() for number, unit in enumerate(units.first)}
    return {unit: within for unit, within in offsets.items() if within}


def commit_chosen(context: Context, stage: Select, chosen: Sequence[Tensor], table: dict[str, Any], began: float) -> None:
    """Copy the chosen images of each class into a set and commit it; ``table`` holds the values that led to the choice."""
    storage, pool, actors = context.storage, stage.pool, context.config.actors
    gathering = _Gathering(pool.store(storage), stage.artifact(storage), actors.threads, kind_of(storage, pool))
    classes = list(zip(stage.units, pool.class_units(storage), chosen, strict=True))
    decodes = gathering.store.form == "latents"
    made = map_classes(context, stage.title, gather_classes, gathering, classes, on_pool=decodes)
    commit_set(gathering.selected, dict(zip(stage.units, made, strict=True)), time.monotonic() - began, table=table)
