"""Where a job's own process runs: where it was submitted, or in a task on another node if that one has no CPUs to give.

`ray job submit` starts its command on the head, which holds the cluster together and should not run out of memory over anyone's
images. On a head with ``CPU: 0`` the job's work is therefore a task elsewhere, and what it prints is printed here.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from ims3_ray.cluster import connected, here, joins, placed, results
from ims3_ray.config import PretrainConfig, WorkConfig
from ims3_ray.errors import UserError
from ims3_ray.room import coordinator, wait_for_room

ATTEMPTS = 20
"""Nodes that the task may lose before the job fails; each attempt continues where the one before was."""
CANCEL_S = 30.0
"""For which an interrupted job may say goodbye to MLflow."""


def run_off_the_head(run: Callable[[Any], None], config: WorkConfig | PretrainConfig) -> None:
    """``run(config)``, here or in a task; raises what it raises."""
    if joins(config.cluster) is None:
        run(config)
        return
    with connected(config.cluster):
        if has_cpus():
            run(config)
            return
        if "://" not in config.storage and not Path(config.storage).is_absolute():
            raise UserError(
                f"storage '{config.storage}' is relative, but the job runs on another node than the one it was submitted on, "
                "which has no CPUs; give storage=s3://… or /absolute/path on a disk that all nodes share"
            )
        _run_elsewhere(run, config)


def has_cpus() -> bool:
    """Whether this process's node has CPUs for Ray's tasks."""
    mine = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == mine and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def _run_elsewhere(run: Callable[[Any], None], config: WorkConfig | PretrainConfig) -> None:
    cluster = config.cluster
    keep_helpers_here()
    page = ray.remote(num_cpus=0, scheduling_strategy=here())(Page).remote()
    options = {"num_cpus": cluster.driver_cpus, "max_retries": ATTEMPTS, **placed(cluster, "driver")}
    presence = wait_for_room(cluster, "driver", "job", [{"CPU": cluster.driver_cpus}])
    running, seen = ray.remote(_drive).options(**options).remote(run, config, page), 0
    try:
        while not ray.wait([running], timeout=0.5)[0]:
            seen = _print(page, seen)
            if cluster.wait_s:
                presence.look()
    except KeyboardInterrupt:
        ray.cancel(running)
        ray.wait([running], timeout=CANCEL_S)
        raise
    finally:
        _print(page, seen)
    results(running)


def keep_helpers_here() -> None:
    """Ray Data starts these actors where it is used first, for the life of the cluster: on a node that comes and goes they
    would keep it from going, or go with it."""
    from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    helpers = (
        coordinator,
        get_or_create_actor_location_tracker,
        get_or_create_stats_actor,
        get_or_create_usage_collection_actor,
    )
    for start in helpers:
        start()


def _print(page: Any, seen: int) -> int:
    """Print what was not seen yet."""
    for is_error, text in ray.get(page.read.remote(seen)):
        print(text, end="", file=sys.stderr if is_error else sys.stdout, flush=True)
        seen += 1
    return seen


class Page:
    """Beside the submitted command: what its task prints."""

    def __init__(self) -> None:
        self.lines: list[tuple[bool, str]] = []
        self.attempts = 0

    def begin(self) -> None:
        """An attempt begins."""
        self.attempts += 1
        if self.attempts > 1:
            self.write(False, f"the node that the job ran on is gone; it goes on elsewhere (attempt {self.attempts})\n")

    def write(self, is_error: bool, text: str) -> None:
        self.lines.append((is_error, text))

    def read(self, after: int) -> list[tuple[bool, str]]:
        return self.lines[after:]


class Pen(io.TextIOBase):
    """A stream that writes whole lines on a page."""

    def __init__(self, page: Any, is_error: bool) -> None:
        self.page, self.is_error, self.rest = page, is_error, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.page.write.remote(self.is_error, "\n".join(lines) + "\n")
        return len(text)

    def writable(self) -> bool:
        return True


def _drive(run: Callable[[Any], None], config: Any, page: Any) -> None:
    ray.get(page.begin.remote())
    with contextlib.redirect_stdout(Pen(page, False)), contextlib.redirect_stderr(Pen(page, True)):
        try:
            run(config)
        finally:
            ray.get(page.read.remote(10**9))  # all that was written before is there
