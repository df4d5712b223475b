"""Pools of images, real and generated, and what is derived of them, made unit by unit on a Ray Data actor pool.

One actor does all that a unit needs (generator → autoencoder → φ → encoded image → shards), so pixels never cross Ray's object
store and no two pools compete for the same devices. Rows of a few hundred bytes come back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ims3_ray.artifacts import Artifact, Storage
from ims3_ray.config import ActorsConfig, ClusterConfig
from ims3_ray.errors import IncompletePool, UserError
from ims3_ray.hardware import kind
from ims3_ray.progress import Progress
from ims3_ray.room import wait_for_room
from ims3_ray.stages.actors import run_units
from ims3_ray.stages.base import Context, Stage, commit_units, parse_unit, read_many
from ims3_ray.stages.derived import derive_of
from ims3_ray.stages.images import ImageStore
from ims3_ray.stages.producers import Producer, Stored, producer_of
from ims3_ray.stages.s3 import Listener
from ims3_ray.stages.worker import Derivation, Work

Listeners = Mapping[Stage, Sequence[Listener]]
"""A stage that embeds → the selections that want to hear of its units."""


@dataclass
class Task:
    """Units of a stage, with the same things to be derived of each; or of stored images (``source`` is None)."""

    producer: Callable[[str], Producer]
    source: Stage | None
    derived: tuple[Stage, ...]
    units: Sequence[str]

    @property
    def stage(self) -> Stage:
        return self.source or self.derived[0]


def produce(context: Context, pools: Mapping[Stage, Sequence[Stage]], listeners: Listeners | None = None) -> None:
    """Make what is missing of stages that make images, and of what is derived of each, all in one pass of the actors."""
    tasks = []
    for source, derived in pools.items():
        for noted in (source, *derived):
            _commit_noted(context, noted, source, derived)
        new = set(source.missing(context.storage))
        wanted = [(stage, set(stage.missing(context.storage))) for stage in derived]
        groups: dict[tuple[bool, tuple[Stage, ...]], list[str]] = {}
        for unit in source.units:
            todo = tuple(stage for stage, missing in wanted if unit in missing)
            if unit in new or todo:
                groups.setdefault((unit in new, todo), []).append(unit)
        stored = partial(Stored, ImageStore.of(source, context.storage))
        for (fresh, todo), units in groups.items():
            tasks.append(Task(producer_of(context, source) if fresh else stored, source if fresh else None, todo, units))
    run_tasks(context, tasks, listeners or {})


def check_decoded(context: Context, encode: Stage, needed: int) -> None:
    """:class:`UserError` for a class of which fewer images than ``needed`` could be decoded."""
    units = (encode.manifest(context.storage) or {})["units"]
    decoded, broken = (dict.fromkeys(context.classes.source_labels, 0) for _ in range(2))
    for unit, entry in units.items():
        decoded[parse_unit(unit)[0]] += entry["images"]
        broken[parse_unit(unit)[0]] += len(entry["broken"])
    for name, label in zip(context.classes.names, context.classes.source_labels, strict=True):
        if decoded[label] < needed:
            raise UserError(
                f"class '{name}' has {decoded[label]} {encode.label} images that can be decoded ({broken[label]} cannot), "
                f"fewer than {needed}; replace the broken files or leave the class out with data.classes"
            )


def run_tasks(context: Context, tasks: Sequence[Task], listeners: Listeners) -> None:
    """Run all units, commit what succeeded, try failures again, raise :class:`IncompletePool` if some remain."""
    if not tasks:
        return
    config, storage = context.config, context.storage
    works = [_work(task, storage, listeners) for task in tasks]
    done: list[dict[str, dict[str, Any]]] = [{} for _ in tasks]
    failed: list[dict[str, str]] = [{} for _ in tasks]
    alike = [kind_of(context, task.source) for task in tasks]
    pending = [(number, unit) for number, task in enumerate(tasks) for unit in task.units]
    per_unit = [task.stage.images / len(task.stage.units) for task in tasks]
    titles = list(dict.fromkeys(task.stage.title for task in tasks))
    title = ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")
    total = sum(each * len(task.units) for each, task in zip(per_unit, tasks, strict=True))
    workers = [config.actors.resources] * min(config.actors.count, len(pending))
    price = pool_price(config.actors, config.cluster)
    wait_for_room(config.cluster, "pool", title, workers)
    with Progress(title, round(total), "images", price=price) as progress:
        for _ in range(config.actors.max_attempts):
            failed = [{} for _ in tasks]
            for number, unit, entry in run_units(pending, works, config.actors, config.cluster) if pending else []:
                if "error" in entry:
                    failed[number][unit] = entry["error"]
                    continue
                alike[number] = _check_alike(alike[number], works[number].noted, unit, entry)
                done[number][unit] = entry
                progress.advance(entry["images"])
            pending = [(number, unit) for number, errors in enumerate(failed) for unit in errors]
    _commit(context, tasks, works, done, failed, progress.seconds)
    if missing := [_what_is_missing(context, t.stage, errors) for t, errors in zip(tasks, failed, strict=True) if errors]:
        raise IncompletePool(f"{'; '.join(missing)}; the same command tries again")


def _work(task: Task, storage: Storage, listeners: Listeners) -> Work:
    derivations = tuple(
        Derivation(derive_of(stage), stage.artifact(storage), tuple(listeners.get(stage, ()))) for stage in task.derived
    )
    store = ImageStore.of(task.source, storage) if task.source else None
    return Work(task.producer, store, derivations, task.stage.artifact(storage))


def _commit(
    context: Context,
    tasks: Sequence[Task],
    works: Sequence[Work],
    done: Sequence[dict[str, Any]],
    failed: Sequence[dict[str, str]],
    seconds: float,
) -> None:
    """Commit the units of every stage; the pass's ``seconds`` are shared out as the actors' time was."""
    made: list[tuple[Stage, dict[str, Any], dict[str, str]]] = []
    for task, work, notes, errors in zip(tasks, works, done, failed, strict=True):
        if task.source:
            made.append((task.source, {unit: _without_derived(note) for unit, note in notes.items()}, errors))
        for stage, derivation in zip(task.derived, work.derivations, strict=True):
            folder = derivation.artifact.folder
            made.append((stage, {unit: note["derived"][folder] for unit, note in notes.items()}, errors))
    busy = [sum(entry["seconds"] for entry in entries.values()) for _, entries, _ in made]
    workers = min(context.config.actors.count, sum(len(task.units) for task in tasks))
    for mine, (stage, entries, errors) in zip(busy, made, strict=True):
        share = seconds * mine / (sum(busy) or 1.0)
        context.spend(stage, share, workers)
        commit_units(stage.artifact(context.storage), entries, share, errors)


def pool_price(actors: ActorsConfig, cluster: ClusterConfig) -> float:
    """What an hour of the actor pool costs; 0 where no prices are configured."""
    return actors.count * cluster.hourly("pool", actors.cpus, actors.gpus)


def _what_is_missing(context: Context, stage: Stage, failed: Mapping[str, str]) -> str:
    """The images of the failed units by class and index, and the first error of all."""
    made = stage.inputs.get("images", stage)
    generated = made.kind == "generate"
    labels = context.classes.generator_labels if generated else context.classes.source_labels
    names = dict(zip(labels, context.classes.names, strict=True))
    size = made.run.sampling.unit_size if generated else context.config.data.unit_size
    places = []
    for unit in sorted(failed):
        label, number = parse_unit(unit)
        places.append(f"{names.get(label, label)} {number * size}–{(number + 1) * size - 1}")
    shown = ", ".join(places[:20]) + (f" and {len(places) - 20} more" if len(places) > 20 else "")
    unit = min(failed)
    return (
        f"{stage.title}: {len(failed)} of {len(stage.units)} units failed every attempt, images missing: {shown}; {unit}: "
        f"{failed[unit]} (all errors: {stage.artifact(context.storage).address}/manifest.json)"
    )


def kind_of(context: Context, source: Stage | None) -> str | None:
    """What made the images that a pool has; empty for none, None where it does not matter."""
    if source is None or source.kind == "encode" or source.run.pool.mix_hardware:
        return None
    units = (source.manifest(context.storage) or {"units": {}})["units"]
    return next((kind(entry["hardware"]) for entry in units.values()), "")


def _check_alike(alike: str | None, noted: Artifact, unit: str, entry: dict[str, Any]) -> str | None:
    """:class:`UserError` for a unit from another kind of hardware than the pool's, which is then not part of it; None for a
    pool that takes any."""
    if alike is None:
        return None
    mine = kind(entry["hardware"])
    if alike and mine != alike:
        noted.forget(f"{unit}.json")
        raise UserError(
            f"unit {unit} was made on {mine}, the pool's other images on {alike}: they would differ in their last bits; "
            "use one kind of node, or allow it with pool.mix_hardware=true"
        )
    return mine


def _commit_noted(context: Context, noted: Stage, source: Stage, derived: Sequence[Stage]) -> None:
    """Commit what an interrupted run has finished of ``source`` and of what is ``derived``: a note beside the shards of
    ``noted``, one of these, was written after all of a unit's shards. Images of another kind of hardware than the pool's are
    forgotten.
    """
    storage, artifact = context.storage, noted.artifact(context.storage)
    missing = {stage: set(stage.missing(storage)) for stage in (source, *derived)}
    names = {name.removesuffix(".json") for name in artifact.shards()}
    there = sorted(names & set().union(*missing.values()))
    notes = {unit: json.loads(note) for unit, note in read_many(artifact, there, "json")}
    alike = kind_of(context, source) if noted is source else None
    for unit, note in list(notes.items()):
        if alike == "":
            alike = kind(note["hardware"])
        if alike not in (None, kind(note["hardware"])):
            artifact.forget(f"{unit}.json")
            del notes[unit]
    for stage, wanted in missing.items():
        own, folder = stage is noted is source, stage.artifact(storage).folder
        found = {unit: _without_derived(note) if own else note["derived"].get(folder) for unit, note in notes.items()}
        if whole := {unit: entry for unit, entry in found.items() if entry and unit in wanted}:
            seconds = sum(entry["seconds"] for entry in whole.values()) / context.config.actors.count
            commit_units(stage.artifact(storage), whole, seconds)


def _without_derived(note: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in note.items() if key != "derived"}
