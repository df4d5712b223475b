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
NO_PROGRESS_S = 1800.0
"""Seconds without a finished unit after which Ray Data gives up."""


def run_units(
    units: Sequence[tuple[int, str]], works: Sequence[Work], actors: ActorsConfig, cluster: ClusterConfig
) -> Iterable[tuple[int, str, dict[str, Any]]]:
    """Process the pairs (task number, unit) on the actor pool. Yields (task number, unit, entry) as each unit finishes; the
    entry of a failed unit holds ``error``."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.max_consecutive_actor_init_deaths = 10
    context.execution_no_progress_timeout_s = max(NO_PROGRESS_S, cluster.wait_s)  # spot machines may be gone for a while
    for handler in logging.getLogger("ray.data").handlers:  # only errors reach the terminal; Ray's log file keeps everything
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    rows = (
        ray.data.from_items([{"task": task, "unit": unit} for task, unit in units], override_num_blocks=len(units))
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
                size=min(actors.count, len(units)),
                max_tasks_in_flight_per_actor=CALLS + 1,
                max_concurrent_calls_per_actor=CALLS,
                enable_true_multi_threading=True,
            ),
        )
        .iter_rows()
    )
    try:
        for row in rows:
            yield row["task"], row["unit"], json.loads(row["entry"])
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise UserError(
            f"the pool has finished no unit for {context.execution_no_progress_timeout_s:.0f} s: are there nodes for it? See "
            "`ray status`; run the same command again to continue"
        ) from error
