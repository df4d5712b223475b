"""Sets of images to train on, a shard per class, and tasks that work through classes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import placed, results
from ims3_ray.config import reserved
from ims3_ray.evaluation import Labelled
from ims3_ray.progress import Progress
from ims3_ray.room import wait_for_room
from ims3_ray.stages.base import Context, Stage, by_class, commit_units, pack_tensors, read_class, read_many


def write_class(artifact: Artifact, unit: str, pixels: Tensor, **more: Tensor) -> dict[str, Any]:
    """Write a class's uint8 images [K, C, H, W]; returns its entry for the manifest."""
    digest = artifact.write(f"{unit}.safetensors", pack_tensors(pixels=pixels, **more))
    return {"sha256": digest, "images": len(pixels), "content": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()}


def commit_set(artifact: Artifact, entries: Mapping[str, dict[str, Any]], seconds: float, **extra: Any) -> None:
    """Commit all classes, given in their order; ``content`` is the hash of the images by which later stages know the set."""
    content = hashlib.sha256("".join(entry["content"] for entry in entries.values()).encode()).hexdigest()[:16]
    commit_units(artifact, entries, seconds, content=content, **extra)


def read_set(images: Artifact, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """uint8 pixels [N, …] of a committed set, class by class, and their classes' positions [N]; of the first ``classes``
    alone if so many are asked for."""
    units = sorted((images.manifest() or {})["units"])[:classes]
    parts = [load(shard)["pixels"] for _, shard in read_many(images, units, "safetensors")]
    return torch.cat(parts), torch.cat([torch.full((len(part),), position) for position, part in enumerate(parts)])


CLASSES_PER_TASK = 50
"""What a task does of a stage that looks at classes one by one; fewer classes in all are no work to send away."""


@dataclass(frozen=True)
class Split:
    """Real images: the shards of each class in order."""

    artifact: Artifact
    units: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, context: Context, encode: Stage) -> Split:
        units = by_class(encode.units)
        return cls(encode.artifact(context.storage), tuple(tuple(units[label]) for label in context.classes.source_labels))

    def read(self) -> Labelled:
        parts = [read_class(self.artifact, units, "pixels") for units in self.units]
        return torch.cat(parts), torch.cat([torch.full((len(part),), position) for position, part in enumerate(parts)])


def spread(function: Any, shared: Any, classes: Sequence[Any], **resources: Any) -> list[Any]:
    """``function(shared, classes)``, by tasks that take some classes each if there are many, or if a device is needed."""
    if len(classes) <= CLASSES_PER_TASK and not resources:
        return list(function(shared, classes))
    task = ray.remote(function).options(max_retries=3, **resources)
    shared_ref = ray.put(shared)
    parts = [classes[start : start + CLASSES_PER_TASK] for start in range(0, len(classes), CLASSES_PER_TASK)]
    return [row for rows in results([task.remote(shared_ref, part) for part in parts]) for row in rows]


def each_class(
    context: Context, stage: Stage, function: Callable[[Any, Sequence[tuple[str, Any]]], None], shared: Any,
    rows: Sequence[Any], gpus: float = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Entries of all classes of ``stage``, in order. ``function(shared, [(unit, row), …])`` makes those that are not there yet,
    in tasks, and leaves each one's entry with :func:`note`, so that nothing is made twice after an interruption."""
    artifact = stage.artifact(context.storage)
    there = artifact.shards()
    todo = [(unit, row) for unit, row in zip(stage.units, rows, strict=True) if f"{unit}.json" not in there]
    actors, cluster = context.config.actors, context.config.cluster
    options = {"num_cpus": actors.cpus, "num_gpus": gpus, **placed(cluster, "pool")}
    task, shared_ref = ray.remote(function).options(max_retries=3, **options), ray.put(shared)
    at_once = max(1, min(25, -(-len(todo) // (2 * context.config.actors.count))))
    parts = [todo[start : start + at_once] for start in range(0, len(todo), at_once)]
    presence = wait_for_room(cluster, "pool", stage.title, [reserved(actors.cpus, gpus)] * min(actors.count, len(parts)))
    with Progress(stage.title, len(todo), "classes") as progress:
        waiting, running = list(parts), dict[Any, int]()
        while waiting or running:
            while waiting and len(running) < actors.count:
                part = waiting.pop(0)
                running[task.remote(shared_ref, part)] = len(part)
            done = presence.first_done(list(running))
            results(done)
            progress.advance(running.pop(done))
    context.spend(stage, progress.seconds, min(actors.count, max(1, len(parts))))
    return {unit: json.loads(note) for unit, note in read_many(artifact, stage.units, "json")}


def note(artifact: Artifact, unit: str, entry: Mapping[str, Any]) -> None:
    """Leave a class's entry beside its shard: its presence says that the shard is whole."""
    artifact.write(f"{unit}.json", json.dumps(entry).encode())
