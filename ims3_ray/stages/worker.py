"""One actor of the pool that makes images and what is derived of them, and Ray Data that keeps a number of these busy."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch
from numpy.typing import NDArray

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device, placed
from ims3_ray.config import ActorsConfig, ClusterConfig
from ims3_ray.errors import UserError
from ims3_ray.hardware import hardware
from ims3_ray.stages.derived import Derive, Derived
from ims3_ray.stages.images import ImageStore, Produced
from ims3_ray.stages.producers import Producer
from ims3_ray.stages.s3 import Listener

CALLS = 2
"""Units that an actor has in hand: one on the device, one whose images are encoded and written meanwhile."""

GRACE_S = 2.0
NO_PROGRESS_S = 1800.0
"""After which Ray Data gives a pool up that finishes nothing."""


@dataclass(frozen=True)
class Derivation:
    """Something that is derived of every unit's images. It is built by every actor, for its device."""

    build: Callable[[str], Derive]
    artifact: Artifact
    listeners: tuple[Listener, ...] = ()


@dataclass(frozen=True)
class Work:
    """What actors do with each unit of a task. The producer is built by every actor, for its device."""

    producer: Callable[[str], Producer]
    store: ImageStore | None
    """Where the images go; None if they are there already."""
    derivations: tuple[Derivation, ...]
    noted: Artifact
    """Where a unit's note goes, written last: its presence says that the shards are whole."""


class UnitWorker:
    """Produces a unit, derives features or latents of it, stores all, notes it. Two calls run side by side, of which one has
    the device."""

    def __init__(self, works: Sequence[Work], threads: int, encoders: int) -> None:
        self.works, self.threads, self.device = works, threads, own_device()
        self.built: dict[int, tuple[Producer, list[Derive]]] = {}
        """Of the task at hand alone: its models go before the next one's come."""
        self.busy = threading.Lock()
        self.unusable = False
        """Whether the device has failed, after which it fails for every unit: a new process has to take it."""
        self.encoders = ThreadPoolExecutor(encoders)

    def __call__(self, row: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        task, unit = int(row["task"][0]), str(row["unit"][0])
        try:
            entry = self._make(task, unit)
        except Exception as error:  # one bad unit must not take the job with it; the driver decides what to do
            self.unusable |= isinstance(error, torch.AcceleratorError)
            entry = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        return {"task": [task], "unit": [unit], "entry": [json.dumps(entry)]}

    def _make(self, task: int, unit: str) -> dict[str, Any]:
        """The unit's note: images, names of broken ones, hardware, seconds, hashes, and the same of what was derived."""
        work = self.works[task]
        torch.set_num_threads(self.threads)  # for this thread: calls come on several
        with self.busy:
            produced, derived, seconds = self._compute(task, unit)
        common = {"images": len(produced.pixels), "hardware": hardware(self.device)}
        entry = {**common, "broken": produced.broken, "seconds": seconds[0]}
        if produced.batch is not None:
            entry["batch"] = produced.batch
        if work.store is not None:
            entry["sha256"] = work.store.write(unit, produced, self.encoders)
        entry["derived"] = {
            derivation.artifact.folder: {
                **common, "seconds": spent, "sha256": derivation.artifact.write(f"{unit}.{shard.suffix}", shard.data),
            }
            for derivation, shard, spent in zip(work.derivations, derived, seconds[1:], strict=True)
        }  # fmt: skip
        work.noted.write(f"{unit}.json", json.dumps(entry).encode())
        for derivation, shard in zip(work.derivations, derived, strict=True):
            for listener in derivation.listeners:
                listener.tell(unit, shard.data)
        return entry

    def _compute(self, task: int, unit: str) -> tuple[Produced, list[Derived], list[float]]:
        """What needs the device, with the seconds of each step."""
        if self.unusable:
            time.sleep(GRACE_S)  # in which the row of the unit that broke it leaves
            os._exit(1)  # not a failure of this unit: Ray starts another actor, which tries it
        if task not in self.built:
            self.built.clear()
            work = self.works[task]
            self.built[task] = work.producer(self.device), [derivation.build(self.device) for derivation in work.derivations]
        produce, derivers = self.built[task]
        times = [time.monotonic()]
        produced = produce(unit)
        if produced.pixels.is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic())
        derived = []
        for derive in derivers:
            derived.append(derive(unit, produced))
            times.append(time.monotonic())
        return produced, derived, [after - before for before, after in itertools.pairwise(times)]


def run_units(
    units: Sequence[tuple[int, str]], works: Sequence[Work], actors: ActorsConfig, cluster: ClusterConfig
) -> Iterable[tuple[int, str, dict[str, Any]]]:
    """Work through (number of a task, unit) on the pool; yields them with their entries as they are finished, errors
    included."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.max_consecutive_actor_init_deaths = 10
    context.execution_no_progress_timeout_s = max(NO_PROGRESS_S, cluster.wait_s)  # spot machines may be gone for a while
    for handler in logging.getLogger("ray.data").handlers:  # the terminal is ours; Ray's own log file keeps everything
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    rows = (
        ray.data.from_items([{"task": task, "unit": unit} for task, unit in units], override_num_blocks=len(units))
        .map_batches(
            UnitWorker,
            fn_constructor_kwargs={"works": works, "threads": actors.threads, "encoders": actors.encoders},
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
            "`ray status`; the same command goes on"
        ) from error
