"""Ray Data keeps a pool of :class:`~ims3_ray.engine.worker.UnitWorker` actors busy with units of work."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import ray

from ims3_ray.cluster.joining import own_device, placed
from ims3_ray.config import ActorsConfig, ClusterConfig
from ims3_ray.engine.worker import UnitWorker, Work
from ims3_ray.errors import UserError

CALLS = 2
"""Calls that run concurrently in an actor: one uses the device while the other encodes and writes its images."""
ACTORS_PER_UNIT, ROWS_PER_ACTOR, MOST_AT_ONCE = 50, 20, 10
"""An actor is given one more unit at a time for every so many actors, up to a largest number, and as long as each actor gets so
many rows, for all to end at about the same time. A row costs the driver 3 ms of a core, however many units it has
(benchmarks/scale.py), and a lost actor loses the units of its rows."""
NO_PROGRESS_S = 1800.0
"""Seconds without a finished row of units after which Ray Data gives up, unless rows are expected to take longer."""
TIMES_LONGER = 10.0
"""How many times longer than expected a row may take before Ray Data gives up."""


def run_units(
    units: Sequence[tuple[int, str]],
    works: Sequence[Work],
    actors: ActorsConfig,
    cluster: ClusterConfig,
    at_once: int | None = None,
    unit_s: float = 0.0,
) -> Iterable[tuple[int, str, dict[str, Any]]]:
    """Process the pairs (task number, unit) on the actor pool. Yields (task number, unit, entry) as the units finish; the
    entry of a failed unit holds ``error``. ``at_once`` is the number of units in a row; by default it follows from the number
    of actors. ``unit_s`` is the number of seconds that the longest unit is expected to take."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.max_consecutive_actor_init_deaths = 10
    for handler in logging.getLogger("ray.data").handlers:  # only errors reach the terminal; Ray's log file keeps everything
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    at_once = at_once or units_at_once(len(units), actors.count)
    # Spot machines may be gone for a while.
    context.execution_no_progress_timeout_s = max(NO_PROGRESS_S, cluster.wait_s, TIMES_LONGER * at_once * unit_s)
    rows = [list(units[start : start + at_once]) for start in range(0, len(units), at_once)]
    found = (
        ray.data.from_items([{"units": json.dumps(row)} for row in rows], override_num_blocks=len(rows))
        .map_batches(
            UnitWorker,
            fn_constructor_kwargs={
                "works": works,
                "threads": actors.threads,
                "encoders": actors.encoders,
                "own_device": own_device,
            },
            batch_size=1,
            num_cpus=actors.cpus,
            num_gpus=actors.gpus or None,
            **placed(cluster, "pool"),
            compute=ray.data.ActorPoolStrategy(
                size=min(actors.count, len(rows)),
                max_tasks_in_flight_per_actor=CALLS + 1,
                max_concurrent_calls_per_actor=CALLS,
                enable_true_multi_threading=True,
            ),
        )
        .iter_rows()
    )
    left = dict.fromkeys(map(tuple, units))
    try:
        for row in found:
            for number, unit, entry in json.loads(row["entries"]):
                left.pop((number, unit), None)
                yield number, unit, entry
    except ray.data.exceptions.ExecutionTimeoutError as error:
        unit = next((unit for _, unit in left), "")
        raise UserError(
            f"the pool has finished no unit for {context.execution_no_progress_timeout_s:.0f} s; the first without a result is "
            f"{unit}. Are there nodes for it (`ray status`), or does it end its process, for want of memory? Run the same "
            "command again to continue"
        ) from error


def units_at_once(units: int, actors: int) -> int:
    """Number of units that an actor is given at a time."""
    return max(1, min(MOST_AT_ONCE, actors // ACTORS_PER_UNIT, units // (ROWS_PER_ACTOR * actors)))
