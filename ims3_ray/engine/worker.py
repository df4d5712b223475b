"""One actor of the pool: makes images and the data derived from them. :mod:`ims3_ray.engine.actors` runs several."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray

from ims3_ray.cluster.hardware import hardware
from ims3_ray.engine.images import Derive, ImageStore, Producer
from ims3_ray.engine.shards import note
from ims3_ray.io.artifacts import Artifact

GRACE_S = 2.0
"""Seconds that an actor with a broken device waits before it exits, so that its last result is still delivered."""


class ShardReceiver(Protocol):
    """Receives each unit's shard when it is made."""

    def tell(self, unit: str, shard: bytes) -> None:
        """Delivery may fail: shards that were not delivered are read from storage later."""


@dataclass(frozen=True)
class Derivation:
    """A computation on every unit's images. Every actor builds it for its own device."""

    build: Callable[[str], Derive]
    artifact: Artifact
    listeners: tuple[ShardReceiver, ...] = ()


@dataclass(frozen=True)
class Work:
    """What actors do with each unit of a task. Every actor builds the producer for its own device."""

    producer: Callable[[str], Producer]
    store: ImageStore | None
    """Where the images are stored; None if they are stored already, or are not to be stored."""
    derivations: tuple[Derivation, ...]
    noted: Artifact
    """Artifact to which a unit's note is written, after all its shards: the note's presence shows that they are complete."""


class UnitWorker:
    """Produces a unit's images, derives features or latents from them, stores everything and writes the unit's note. Two calls
    run concurrently, of which one at a time uses the device. Where that is a GPU, a producer that says ``on_host = True``, such
    as one that decodes files, makes the next unit's images meanwhile."""

    def __init__(self, works: Sequence[Work], threads: int, encoders: int, own_device: Callable[[], str]) -> None:
        self.works, self.threads, self.device = works, threads, own_device()
        self.built: dict[int, tuple[Producer, list[Derive]]] = {}
        """Task → its producer and derivations. It holds the current task alone, whose models are freed before the next task's
        are loaded."""
        self.busy = threading.Lock()
        self.unusable = False
        """Whether the device has failed. It then fails for every unit until a new process uses it."""
        self.encoders = ThreadPoolExecutor(encoders)

    def __call__(self, row: dict[str, NDArray[Any]]) -> dict[str, list[str]]:
        """Make the units of a row, given as the JSON of pairs (task, unit); returns their entries as JSON."""
        units: list[tuple[int, str]] = json.loads(str(row["units"][0]))
        return {"entries": [json.dumps([(task, unit, self._entry(task, unit)) for task, unit in units])]}

    def _entry(self, task: int, unit: str) -> dict[str, Any]:
        """The entry of a unit that is made now; that of a failed one holds ``error``."""
        try:
            return self._make(task, unit)
        except Exception as error:  # one bad unit must not end the job; the driver decides what to do
            self.unusable |= isinstance(error, torch.AcceleratorError)
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}

    def _make(self, task: int, unit: str) -> dict[str, Any]:
        """Make and store a unit. Returns its note: number of images, names of broken ones, hardware, seconds and hash, and the
        corresponding values of each derived shard."""
        work = self.works[task]
        torch.set_num_threads(self.threads)  # the setting is per thread, and calls run on several threads
        produce, derivers = self.built.get(task) or self._build(task)
        beside = self.device != "cpu" and getattr(produce, "on_host", False)
        early = timed(partial(produce, unit)) if beside else None
        with self.busy:
            self._check_device()
            produced, took = early or timed(partial(produce, unit), self.device)
            derived, seconds = [], [took]
            for derive in derivers:
                shard, took = timed(partial(derive, unit, produced), self.device)
                derived.append(shard)
                seconds.append(took)
        common = {"images": len(produced.pixels), "hardware": hardware(self.device)}
        entry = {**common, "broken": produced.broken, "seconds": seconds[0]}
        if produced.transparent:
            entry["transparent"] = produced.transparent
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
        note(work.noted, unit, entry)
        for derivation, shard in zip(work.derivations, derived, strict=True):
            for listener in derivation.listeners:
                listener.tell(unit, shard.data)
        return entry

    def _build(self, task: int) -> tuple[Producer, list[Derive]]:
        """The producer and the derivations of a task, with their models."""
        with self.busy:
            self._check_device()
            if task not in self.built:
                self.built.clear()
                work = self.works[task]
                derivers = [derivation.build(self.device) for derivation in work.derivations]
                self.built[task] = work.producer(self.device), derivers
            return self.built[task]

    def _check_device(self) -> None:
        if self.unusable:
            time.sleep(GRACE_S)
            os._exit(1)  # not a failure of this unit: Ray starts another actor, which tries the unit again


R = TypeVar("R")


def timed(compute: Callable[[], R], device: str = "cpu") -> tuple[R, float]:
    """The result of ``compute``, and the seconds until the device had made it."""
    began = time.monotonic()
    result = compute()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, time.monotonic() - began
