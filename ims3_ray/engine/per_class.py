"""Ray tasks that process the classes of a stage, several classes per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray

from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.joining import placed, results
from ims3_ray.config import reserved
from ims3_ray.engine.shards import read_notes
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.engine.unfinished import Shares, Unfinished
from ims3_ray.errors import Damaged, IncompletePool
from ims3_ray.progress import Progress

CLASSES_PER_TASK = 50
"""Number of classes per Ray task in stages that take little time per class. Up to so many classes are processed without a
task."""


def map_classes(function: Any, shared: Any, classes: Sequence[Any], **resources: Any) -> list[Any]:
    """The results of ``function(shared, classes)``. If there are many classes or ``resources`` are given, Ray tasks process
    some classes each."""
    if len(classes) <= CLASSES_PER_TASK and not resources:
        return list(function(shared, classes))
    task = ray.remote(function).options(max_retries=3, **resources)
    shared_ref = ray.put(shared)
    parts = [classes[start : start + CLASSES_PER_TASK] for start in range(0, len(classes), CLASSES_PER_TASK)]
    return [row for rows in results([task.remote(shared_ref, part) for part in parts]) for row in rows]


def each_unit(
    context: Context, stage: Stage, function: Callable[[Any, Sequence[tuple[str, Any]]], None], shared: Any,
    rows: Mapping[str, Any], *, gpus: float = 0, what: str = "classes", most_at_once: int = 25,
    saves: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Make the units of ``rows`` (unit → input of its task) that do not exist yet. Returns the entries of all units, in order.

    Ray tasks call ``function(shared, [(unit, row), …])``, which makes some units and stores each one's entry with
    :func:`ims3_ray.engine.shards.note`, so that nothing is made twice after an interruption. A task makes at most
    ``most_at_once`` units. ``saves`` says that the units save their states as :class:`Unfinished`, by which progress within a
    unit is shown.
    """
    artifact = stage.artifact(context.storage)
    there = read_notes(artifact, list(rows))
    todo = [(unit, row) for unit, row in rows.items() if unit not in there]
    actors, cluster = context.config.actors, context.config.cluster
    options = {"num_cpus": actors.cpus, "num_gpus": gpus, **placed(cluster, "pool")}
    task, shared_ref = ray.remote(function).options(max_retries=3, **options), ray.put(shared)
    at_once = max(1, min(most_at_once, -(-len(todo) // (2 * context.config.actors.count))))
    parts = [todo[start : start + at_once] for start in range(0, len(todo), at_once)]
    watch = wait_for_capacity(cluster, "pool", stage.title, [reserved(actors.cpus, gpus)] * min(actors.count, len(parts)))
    with Progress(stage.title, len(todo), what) as progress:
        waiting, running = list(parts), dict[Any, list[Unfinished]]()
        shares = Shares(progress)
        while waiting or running:
            while waiting and len(running) < actors.count:
                part = waiting.pop(0)
                running[task.remote(shared_ref, part)] = [Unfinished(artifact, unit) for unit, _ in part]
            begun = [unit for units in running.values() for unit in units]
            done = watch.first_done(list(running), partial(shares.look, begun) if saves else None)
            try:
                results(done)
            except ray.exceptions.RayTaskError as error:
                reason = str(error.cause or error).strip().splitlines()[-1]
                kind = type(error.cause or error).__name__
                raise IncompletePool(f"{stage.title}: {kind}: {reason}; run the same command again to continue") from error
            shares.finish(len(running.pop(done)))
    context.spend(stage, progress.seconds, min(actors.count, max(1, len(parts))))
    made = read_notes(artifact, list(rows))
    if lost := [unit for unit in rows if unit not in made]:
        raise Damaged(f"{artifact.address}: {lost[0]} is damaged; the same command makes it again")
    return {unit: made[unit] for unit in rows}
