"""Ray tasks that process the classes of a stage, several classes per task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from ims3_ray.cluster.capacity import CapacityWatch, wait_for_capacity
from ims3_ray.cluster.joining import placed
from ims3_ray.config import reserved
from ims3_ray.engine.shards import read_notes
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.engine.tasks import awaited, ended_if_damaged, result_of
from ims3_ray.engine.unfinished import Shares, Unfinished
from ims3_ray.errors import Damaged
from ims3_ray.progress import Progress

CLASSES_PER_TASK = 50
"""Number of classes per Ray task in stages that take little time per class. Up to so many classes are processed without a
task."""


def map_classes(
    context: Context, title: str, function: Any, shared: Any, classes: Sequence[Any], on_pool: bool = False
) -> list[Any]:  # fmt: skip
    """The results of ``function(shared, classes)``. If there are many classes, Ray tasks of one CPU process some classes each;
    with ``on_pool`` the tasks have the resources and the nodes of the pool's actors. ``title`` is that of the stage."""
    if len(classes) <= CLASSES_PER_TASK and not on_pool:
        return list(function(shared, classes))
    cluster, actors, options = context.config.cluster, context.config.actors, dict[str, Any]()
    if on_pool:
        options = {"num_cpus": actors.cpus, "num_gpus": actors.gpus, **placed(cluster, "pool")}
        watch = wait_for_capacity(cluster, "pool", title, [actors.resources])
    else:
        watch = CapacityWatch(cluster, None, title, [{"CPU": 1.0}])
    task, shared_ref = ray.remote(function).options(max_retries=3, **options), ray.put(shared)
    parts = [classes[start : start + CLASSES_PER_TASK] for start in range(0, len(classes), CLASSES_PER_TASK)]
    return [row for rows in awaited([task.remote(shared_ref, part) for part in parts], title, watch) for row in rows]


Make = Callable[[Any, Sequence[tuple[str, Any]]], None]
"""``make(shared, [(unit, row), …])`` makes some units of a stage in a task, and stores the entry of each with
:func:`ims3_ray.engine.shards.note`, so that nothing is made twice after an interruption."""


@dataclass(frozen=True, eq=False)
class Work:
    """Units of a stage that tasks have to make."""

    stage: Stage
    shared: Any
    """What all tasks of the stage are given."""
    rows: Mapping[str, Any]
    """Unit → input of its task."""
    most_at_once: int = 25
    """The most units that a task makes."""
    flops_per_unit: float = 0.0
    """Floating-point operations of a unit, by which stages are ordered and their progress is weighed."""


Entries = dict[str, dict[str, Any]]
"""Unit → its entry."""


def each_unit(
    context: Context, stage: Stage, make: Make, shared: Any, rows: Mapping[str, Any], *, gpus: float = 0, what: str = "classes"
) -> Entries:  # fmt: skip
    """Make the units of ``rows`` (unit → input of its task) that do not exist yet; returns the entries of all, in order."""
    ((_, entries, _),) = each_unit_of(context, stage.title, [Work(stage, shared, rows)], make, gpus=gpus, what=what)
    return entries


def each_unit_of(
    context: Context, title: str, works: Sequence[Work], make: Make, *, gpus: float = 0, what: str, saves: bool = False
) -> Iterator[tuple[Work, Entries, float]]:  # fmt: skip
    """Make the units of several stages that do not exist yet, side by side. Yields for each stage, as soon as it is complete,
    the entries of all its units in order, and the seconds that its tasks took.

    Stages whose units cost most begin first. ``saves`` says that the units save their states as :class:`Unfinished`, by which
    progress within a unit is shown.
    """
    actors, cluster = context.config.actors, context.config.cluster
    task = ray.remote(make).options(max_retries=3, num_cpus=actors.cpus, num_gpus=gpus, **placed(cluster, "pool"))
    waiting = _tasks(context, works)
    left = {work: sum(each.work is work for each in waiting) for work in works}
    seconds = dict.fromkeys(works, 0.0)
    watch = wait_for_capacity(cluster, "pool", title, [reserved(actors.cpus, gpus)] * min(actors.count, len(waiting)))
    shares, running = _shares(title, waiting, what), dict[Any, tuple[_Task, float]]()
    with shares.progress, ended_if_damaged(running):
        yield from (_completed(context, work, 0.0) for work in works if not left[work])
        while waiting or running:
            while waiting and len(running) < actors.count:
                started = waiting.pop(0)
                running[task.remote(started.shared, started.rows)] = started, time.monotonic()
            begun = [unit for each, _ in running.values() for unit in each.units]
            done = watch.first_done(list(running), partial(shares.look, begun) if saves else None)
            ended, since = running.pop(done)
            result_of(done, ended.work.stage.title)
            shares.finish(ended.units)
            seconds[ended.work] += time.monotonic() - since
            left[ended.work] -= 1
            if not left[ended.work]:
                context.spend(ended.work.stage, seconds[ended.work])
                yield _completed(context, ended.work, seconds[ended.work])


@dataclass(frozen=True)
class _Task:
    work: Work
    shared: Any
    rows: list[tuple[str, Any]]
    units: list[Unfinished]


def _tasks(context: Context, works: Sequence[Work]) -> list[_Task]:
    """The tasks that make the missing units, those of costly units first."""
    found = []
    for work in sorted(works, key=lambda work: -work.flops_per_unit):
        artifact = work.stage.artifact(context.storage)
        there = read_notes(artifact, list(work.rows))
        todo, shared = [(unit, row) for unit, row in work.rows.items() if unit not in there], ray.put(work.shared)
        at_once = max(1, min(work.most_at_once, -(-len(todo) // (2 * context.config.actors.count))))
        for start in range(0, len(todo), at_once):
            rows = todo[start : start + at_once]
            found.append(_Task(work, shared, rows, [Unfinished(artifact, unit) for unit, _ in rows]))
    return found


def _shares(title: str, tasks: Sequence[_Task], what: str) -> Shares:
    """Progress in units, or, where the units of some stages cost more than those of others, in per cent of the operations."""
    units = [(unit.artifact, each.work.flops_per_unit) for each in tasks for unit in each.units]
    total = sum(flops for _, flops in units)
    if len({flops for _, flops in units}) < 2:
        return Shares(Progress(title, len(units), what))
    weights = {artifact: 100 * flops / total for artifact, flops in units}
    return Shares(Progress(title, 100, "%"), lambda unit: weights[unit.artifact])


def _completed(context: Context, work: Work, seconds: float) -> tuple[Work, Entries, float]:
    artifact = work.stage.artifact(context.storage)
    made = read_notes(artifact, list(work.rows))
    if lost := [unit for unit in work.rows if unit not in made]:
        raise Damaged(f"{artifact.address}: {lost[0]} is damaged; the same command makes it again")
    return work, {unit: made[unit] for unit in work.rows}, seconds
