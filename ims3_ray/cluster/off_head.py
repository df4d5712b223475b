"""Runs a job on the node where it was submitted, or in a Ray task on another node if that node has no CPUs for Ray.

`ray job submit` starts its command on the head node, which coordinates the cluster and should not run out of memory because of
a job's images. If the head has ``CPU: 0``, the job therefore runs in a task on another node, and the submitted command prints
the output of that task.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from ims3_ray.cluster.capacity import LOST_S, wait_for_capacity
from ims3_ray.cluster.joining import connected, here, joins, placed, results
from ims3_ray.cluster.ray_internals import start_helpers_here
from ims3_ray.config import PretrainConfig, WorkConfig
from ims3_ray.errors import UserError
from ims3_ray.provenance import record_command, recorded_command

ATTEMPTS = 20
"""Number of nodes that the task may lose before the job fails; each attempt continues where the previous one stopped."""
CANCEL_S = 30.0
"""Seconds that an interrupted job has to finish its MLflow run."""


def run_off_the_head(run: Callable[[Any], None], config: WorkConfig | PretrainConfig) -> None:
    """Call ``run(config)`` here or in a task; its errors are raised here in either case."""
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
    start_helpers_here()
    output = ray.remote(num_cpus=0, scheduling_strategy=here())(Output).remote()
    options = {"num_cpus": cluster.driver_cpus, "max_retries": ATTEMPTS, **placed(cluster, "driver")}
    watch = wait_for_capacity(cluster, "driver", "job", [{"CPU": cluster.driver_cpus}])
    running, seen = ray.remote(_drive).options(**options).remote(run, config, output, recorded_command()), 0
    try:
        while not ray.wait([running], timeout=0.5)[0]:
            seen = _print(output, seen)
            watch.look(patience_s=LOST_S)
    except KeyboardInterrupt:
        ray.cancel(running)
        ray.wait([running], timeout=CANCEL_S)
        raise
    finally:
        watch.let_go()
        _print(output, seen)
    results(running)


def _print(output: Any, seen: int) -> int:
    """Print the texts of ``output`` after the first ``seen``. Returns the number of texts that are printed now."""
    for is_error, text in ray.get(output.read.remote(seen)):
        print(text, end="", file=sys.stderr if is_error else sys.stdout, flush=True)
        seen += 1
    return seen


class Output:
    """An actor on the node of the submitted command that stores what the job's task prints."""

    def __init__(self) -> None:
        self.lines: list[tuple[bool, str]] = []
        self.attempts = 0

    def begin(self) -> None:
        """Count an attempt that begins; all but the first write a message."""
        self.attempts += 1
        if self.attempts > 1:
            self.write(False, f"the node that the job ran on is gone; it goes on elsewhere (attempt {self.attempts})\n")

    def write(self, is_error: bool, text: str) -> None:
        self.lines.append((is_error, text))

    def read(self, after: int) -> list[tuple[bool, str]]:
        return self.lines[after:]


class LineStream(io.TextIOBase):
    """A stream that sends whole lines to an :class:`Output` actor."""

    def __init__(self, output: Any, is_error: bool) -> None:
        self.output, self.is_error, self.rest = output, is_error, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.output.write.remote(self.is_error, "\n".join(lines) + "\n")
        return len(text)

    def writable(self) -> bool:
        return True


def _drive(run: Callable[[Any], None], config: Any, output: Any, command: tuple[str, ...]) -> None:
    record_command(command)
    ray.get(output.begin.remote())
    with contextlib.redirect_stdout(LineStream(output, False)), contextlib.redirect_stderr(LineStream(output, True)):
        try:
            run(config)
        finally:
            ray.get(output.read.remote(10**9))  # returns after all earlier writes have arrived
