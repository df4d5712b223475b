"""One actor of the pool: makes images and what is derived of them. :mod:`ims3_ray.stages.actors` keeps several busy."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from ims3_ray.artifacts import Artifact
from ims3_ray.hardware import hardware
from ims3_ray.stages.derived import Derive, Derived
from ims3_ray.stages.images import ImageStore, Produced
from ims3_ray.stages.producers import Producer

GRACE_S = 2.0
"""Seconds that an actor with a broken device waits before it exits, so that its last result is still delivered."""


class ShardReceiver(Protocol):
    """Receives each unit's shard when it is made."""

    def tell(self, unit: str, shard: bytes) -> None:
        """Delivery may fail: shards that were not delivered are read from storage later."""


@dataclass(frozen=True)
class Derivation:
    """Something that is derived of every unit's images. It is built by every actor, for its device."""

    build: Callable[[str], Derive]
    artifact: Artifact
    listeners: tuple[ShardReceiver, ...] = ()


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

    def __init__(self, works: Sequence[Work], threads: int, encoders: int, own_device: Callable[[], str]) -> None:
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
            time.sleep(GRACE_S)
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
