"""What a Ray task does that trains and tests one student."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ims3_ray.cluster.joining import own_device
from ims3_ray.config import ProtocolConfig
from ims3_ray.engine.sets import RealSplit, held_out, read_set
from ims3_ray.engine.shards import made_meanwhile, note, pack_tensors
from ims3_ray.engine.unfinished import Unfinished
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.label_batches import StoredBatchLabels
from ims3_ray.stages.statistics import read_statistics
from ims3_ray.stages.teacher import load_teacher
from ims3_ray.training.students import train_student


@dataclass(frozen=True)
class StudentTask:
    """What a task needs to train and test students of one set."""

    protocol: ProtocolConfig
    images: Artifact
    test: RealSplit
    val: Artifact | None
    teacher: Weights | Artifact | None
    """Given weights, or the artifact of :mod:`ims3_ray.stages.teacher`; None if the protocol needs no teacher."""
    labels: Artifact | None
    """Stored labels of the batches; None if the protocol takes other labels."""
    statistics: Artifact | None
    """Mean and standard deviation of the real pixels; None if the protocol normalises otherwise."""
    class_names: tuple[str, ...]
    threads: int


def train_and_test(task: StudentTask, seed: int, found: Artifact) -> dict[str, Any]:
    """Train one student, test it and return its accuracies, which are stored in ``found`` too, with its confusion matrix.

    An interrupted training continues from its last saved state. Raises :class:`UserError` for a set without the soft labels
    that the protocol asks for.
    """
    unit = unit_of(seed)
    if (made := made_meanwhile(found, unit)) is not None:
        return made
    torch.set_num_threads(task.threads)
    began, device, train = time.monotonic(), own_device(), read_set(task.images, size=task.protocol.size)
    if task.protocol.labels == "stored" and train.logits is None:
        raise UserError("labels: stored needs a set with soft labels; this one has none (arms.NAME.labels=soft stores them)")
    size, keep = train.pixels.shape[-1], task.protocol.test_crop
    test, val = task.test.read(size, keep), held_out(task.val, task.images, size, keep) if task.val else None
    classes, unfinished = len(task.class_names), Unfinished(found, unit)
    _, accuracy = train_student(
        task.protocol.students[0], train, test, classes, task.protocol, seed, device=device, val=val,
        teacher=load_teacher(task.teacher, task.class_names, device) if task.teacher is not None else None,
        resume=unfinished.state(), save=unfinished.save,
        batch_labels=StoredBatchLabels(task.labels) if task.labels is not None else None,
        statistics=read_statistics(task.statistics),
    )  # fmt: skip
    plain = asdict(replace(accuracy, confusion=torch.empty(0)))
    plain.pop("confusion")
    seconds = time.monotonic() - began
    if (made := made_meanwhile(found, unit)) is not None:
        return made
    digest = found.write(f"{unit}.safetensors", pack_tensors(confusion=accuracy.confusion))
    outcome = {**plain, "seconds": seconds, "sha256": digest}
    note(found, unit, outcome)
    unfinished.forget()
    return outcome


def unit_of(seed: int) -> str:
    """Name of the unit of a student's seed."""
    return f"seed-{seed}"
