"""Notes of units that the actors of a pool have finished: an interrupted run commits them, if their hardware is the pool's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ims3_ray.cluster.hardware import kind
from ims3_ray.engine.shards import commit_units, read_notes
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage

if TYPE_CHECKING:
    from ims3_ray.engine.pool import DerivedStage, ImagePool


def kind_of(storage: Storage, source: ImagePool | None) -> str | None:
    """Kind of hardware that made the images which a pool holds: empty if it holds none, None if any hardware is allowed."""
    if source is None or not source.same_hardware:
        return None
    units = (source.manifest(storage) or {"units": {}})["units"]
    return next((kind(entry["hardware"]) for entry in units.values()), "")


def check_alike(alike: str | None, noted: Artifact, unit: str, entry: dict[str, Any]) -> str | None:
    """Kind of hardware that made ``unit``, or None if the pool allows any. Raises :class:`UserError` if the pool's other images
    were made on another kind; the unit is then not added to the pool."""
    if alike is None:
        return None
    mine = kind(entry["hardware"])
    if alike and mine != alike:
        noted.forget(f"{unit}.json")
        raise UserError(
            f"unit {unit} was made on {mine}, the pool's other images on {alike}: they would differ in their last bits; "
            f"use {alike}, or allow both with pool.mix_hardware=true, or delete '{noted.address}' to make all of it anew"
        )
    return mine


def commit_noted(context: Context, noted: Stage, source: ImagePool, derived: Sequence[DerivedStage]) -> None:
    """Commit the units of ``source`` and of the ``derived`` stages that an interrupted run has finished.

    ``noted`` is one of these stages. Beside its shards lie the notes of units; a unit's note was written after all its shards.
    Notes of images that were made on another kind of hardware than the pool's are deleted.
    """
    storage, artifact = context.storage, noted.artifact(context.storage)
    missing: dict[Stage, set[str]] = {stage: set(stage.missing(storage)) for stage in (source, *derived)}
    if not any(missing.values()):
        return
    wanted_units = set().union(*missing.values())
    notes = read_notes(
        artifact, [unit for unit in source.units if unit in wanted_units], stored=noted is not source or source.keeps
    )
    alike = kind_of(storage, source) if noted is source else None
    if alike == "" and notes:  # nothing is committed yet: the kind that made most
        alike = Counter(kind(note["hardware"]) for note in notes.values()).most_common(1)[0][0]
    for unit, note in list(notes.items()):
        if alike not in (None, kind(note["hardware"])):
            artifact.forget(f"{unit}.json")
            del notes[unit]
    for stage, wanted in missing.items():
        if not wanted:
            continue
        own, target = stage is noted is source, stage.artifact(storage)
        present = target.stems()
        found = {
            unit: without_derived(note) if own else note.get("derived", {}).get(target.folder)
            for unit, note in notes.items()
            if unit in present or (stage is source and not source.keeps)
        }
        if whole := {unit: entry for unit, entry in found.items() if entry and unit in wanted}:
            seconds = sum(entry["seconds"] for entry in whole.values()) / context.config.actors.count
            commit_units(target, whole, seconds)


def without_derived(note: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in note.items() if key != "derived"}
