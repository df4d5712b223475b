"""Labels of augmented batches (FKD, SRe2L): a teacher labels every batch of every epoch once, for all students."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.cluster.joining import own_device
from ims3_ray.config import ProtocolConfig, WorkConfig, differing
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.engine.per_class import each_unit
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.shards import commit_units, note, pack_tensors
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.stages.method_inputs import teacher_flops
from ims3_ray.stages.statistics import plan_statistics, read_statistics
from ims3_ray.stages.teacher import load_teacher, plan_teacher, teacher_of
from ims3_ray.training.accuracy import on_device
from ims3_ray.training.augmented import AugmentedBatches, epochs_and_batch_size, scale_of

EPOCHS_PER_UNIT = 10
"""Number of epochs whose labels are in one shard."""
OF_BATCHES = ("size", "normalise", "augment", "cutmix", "batch_size")
"""Settings of a protocol on which the batches depend, beside the number of epochs."""


@dataclass(eq=False)
class LabelBatches(Stage):
    """Labels the batches of a protocol. A unit has the ``logits`` float16 [epochs, N, num_classes] of some epochs, in the order
    of their batches (:class:`ims3_ray.training.augmented.AugmentedBatches`)."""

    name, settings, of_arm = "label_batches", ProtocolConfig, True

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)

    @classmethod
    def plan(cls, planner: Planner, title: str, images: Stage, ipc: int, protocol: ProtocolConfig) -> LabelBatches:
        """Plan the labels for the set ``images``, which has ``ipc`` images per class."""
        teacher, names, epochs = plan_teacher(planner), planner.classes.names, for_ipc(protocol.epochs, ipc)
        kept = {key: value for key, value in differing(protocol).items() if key in OF_BATCHES}
        params: dict[str, Any] = {
            "protocol": kept, "epochs": epochs, "classes": list(names), **teacher.params,
        }  # fmt: skip
        count, size = epochs * ipc * len(names), protocol.size or planner.work.data.size
        return planner.add(
            cls(
                f"label the batches ({title})", params,
                {"set": images, **teacher.inputs, **plan_statistics(planner, protocol)}, images=count,
                units=tuple(unit_of(first) for first in range(0, epochs, EPOCHS_PER_UNIT)),
                flops=count * teacher_flops(planner, size), stored=2.0 * count * len(names), weights=teacher.weights,
                protocol=protocol,
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    def run(self, context: Context) -> None:
        began, storage = time.monotonic(), context.storage
        task = TaskInputs(
            self.protocol, self.inputs["set"].artifact(storage), self.artifact(storage), teacher_of(self, context),
            context.classes.names, context.config.actors.threads,
            statistics.artifact(storage) if (statistics := self.inputs.get("statistics")) else None,
        )  # fmt: skip
        numbers = range(self.params["epochs"])
        rows = {unit: list(numbers[i * EPOCHS_PER_UNIT : (i + 1) * EPOCHS_PER_UNIT]) for i, unit in enumerate(self.units)}
        missing = set(self.missing(storage))
        rows = {unit: row for unit, row in rows.items() if unit in missing}
        gpus = context.config.actors.gpus
        entries = each_unit(context, self, label_epochs, task, rows, gpus=gpus, what="tens of epochs")
        commit_units(task.labels, entries, time.monotonic() - began)


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs to label batches."""

    protocol: ProtocolConfig
    images: Artifact
    labels: Artifact
    teacher: Weights | Artifact
    class_names: tuple[str, ...]
    threads: int
    statistics: Artifact | None
    """Mean and standard deviation of the real pixels; None if the protocol normalises otherwise."""


@torch.inference_mode()
def label_epochs(task: TaskInputs, units: Sequence[tuple[str, list[int]]]) -> None:
    """Label the batches of some epochs and store their logits."""
    torch.set_num_threads(task.threads)
    device = own_device()
    teacher = load_teacher(task.teacher, task.class_names, device)
    pixels, labels, *_ = read_set(task.images, size=task.protocol.size)
    images = on_device(pixels, device)
    _, batch_size = epochs_and_batch_size(task.protocol, labels)
    scale = scale_of(images, task.protocol, read_statistics(task.statistics))
    batches = AugmentedBatches(images, task.protocol, batch_size, scale, 0, device, shared=True)
    for unit, epochs in units:
        logits = [torch.cat([teacher(batch.images).half().cpu() for batch in batches.epoch(number)]) for number in epochs]
        note(task.labels, unit, {"sha256": task.labels.write(f"{unit}.safetensors", pack_tensors(logits=torch.stack(logits)))})


class StoredBatchLabels:
    """The labels that :class:`LabelBatches` has stored, as a student asks for them: one epoch after another."""

    def __init__(self, labels: Artifact) -> None:
        self.labels, self.unit, self.logits = labels, "", torch.empty(0)

    def __call__(self, epoch: int) -> Tensor:
        unit, number = unit_of(epoch), epoch % EPOCHS_PER_UNIT
        if unit != self.unit:
            self.unit, self.logits = unit, load(self.labels.read(f"{unit}.safetensors"))["logits"]
        return self.logits[number].float()


def unit_of(epoch: int) -> str:
    """Name of the unit that holds the labels of an epoch."""
    return f"epochs-{epoch // EPOCHS_PER_UNIT * EPOCHS_PER_UNIT:05d}"
