"""Evaluation: students are trained on a set and tested on the real test split, in one Ray task per student and seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import ray
import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.cluster.capacity import largest_memory, wait_for_capacity
from ims3_ray.cluster.joining import most_at_once, placed, results
from ims3_ray.config import ProtocolConfig, WorkConfig, differing, reserved
from ims3_ray.config.evaluation import for_colour_alone, for_ipc
from ims3_ray.engine.mapped import MAPPED_ABOVE
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.sets import RealSplit
from ims3_ray.engine.shards import commit_units, read_notes
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.tasks import ended_if_damaged, reason
from ims3_ray.engine.unfinished import Shares, Unfinished
from ims3_ray.errors import Damaged, IncompletePool, UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.models.student_costs import forward_flops, training_bytes
from ims3_ray.models.students import check_student, student_builder
from ims3_ray.progress import Progress
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.held_out import HoldOut
from ims3_ray.stages.label_batches import LabelBatches
from ims3_ray.stages.statistics import plan_statistics
from ims3_ray.stages.student_task import StudentTask, train_and_test, unit_of
from ims3_ray.stages.teacher import TeacherInput, plan_teacher, teacher_of


@dataclass(eq=False)
class Evaluate(Stage):
    """Trains and tests students. Each student seed is a unit: its accuracies are in the manifest, its confusion matrix in
    the shard."""

    name, version, settings, of_arm, runs_last, counted = "evaluate", 6, ProtocolConfig, True, True, "evaluations"

    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """The protocol for the one student of the row."""
    shape: tuple[int, int] = (1, 28)
    """Channels, and height and width, of the images of the data set."""

    @classmethod
    def plan(cls, planner: Planner, title: str, images: Stage, ipc: int, row: str) -> Evaluate:
        """Plan the students of one row of the table (``PROTOCOL/STUDENT``) on the set ``images``, which has ``ipc`` images per
        class."""
        config, data, names = planner.work.evaluation, planner.work.data, planner.classes.names
        protocol_name, student = config.rows[row]
        protocol = config.protocols[protocol_name]
        check_protocol(planner, protocol_name, protocol, ipc)
        if protocol.labels == "stored" and images.has_logits is False:
            raise UserError(
                f"evaluation.protocols.{protocol_name} takes stored soft labels, which the set of '{title}' has not; set "
                "labels: soft for its arm, or score a set that has them"
            )
        inputs: dict[str, Stage] = {"set": images, "test": plan_test(planner, protocol), **plan_statistics(planner, protocol)}
        if config.val_per_class != 0:
            inputs["val"] = HoldOut.plan(planner)
        if protocol.labels == "stored_batches":
            inputs["labels"] = LabelBatches.plan(planner, title, images, ipc, protocol)
        teacher = plan_teacher(planner) if protocol.labels == "soft" else TeacherInput()
        params: dict[str, Any] = {
            "protocol": differing(protocol, without=("students",)), "student": student,
            "classes": list(names),  # the key of a set depends on its images, not on the names of its classes
            **teacher.params, **plugins.hashes(student_builder(student)),
        }  # fmt: skip
        size, classes = network_size(protocol, data.size), len(names)
        tested = sum(inputs[name].images for name in ("test", "val") if name in inputs)
        trained = for_ipc(protocol.epochs, ipc) * ipc * classes
        flops = evaluation_flops(protocol, student, data.channels, size, classes, trained, tested)
        return planner.add(
            cls(
                f"evaluate ({title}; {row})", params, {**inputs, **teacher.inputs},
                units=tuple(f"seed-{seed}" for seed in config.seeds), images=ipc * classes * len(config.seeds),
                flops=flops * len(config.seeds), label=row, weights=teacher.weights,
                protocol=protocol.model_copy(update={"students": (student,)}), shape=(data.channels, data.size),
            )
        )  # fmt: skip

    @property
    def batch(self) -> Hashable:
        return "students"

    @classmethod
    def lost(cls, artifact: Artifact) -> list[str]:
        present = artifact.stems()
        return [unit for unit in artifact.units if unit not in present]

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("evaluate", config.evaluation.cpus_per_task, config.evaluation.gpus_per_task)

    def run(self, context: Context) -> None:
        self.run_all(context, [self])

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[Evaluate]) -> None:
        train_students(context, stages)


def plan_test(planner: Planner, protocol: ProtocolConfig) -> Encode:
    """Plan the test images of a protocol. If it names a size or crops them, they are scaled from the data set's files as
    torchvision's Resize and CenterCrop do, before the protocol's own crop."""
    data = planner.work.data
    if protocol.size is None and protocol.test_crop == 1:
        return Encode.plan(planner, "test", data)
    size = round((protocol.size or data.size) / protocol.test_crop)
    return Encode.plan(planner, "test", data.model_copy(update={"size": size}), filter="bilinear")


def plan_rows(planner: Planner, title: str, images: Stage, ipc: int) -> dict[str, Evaluate]:
    """Row of the table → the stage that trains its students on a set."""
    return {row: Evaluate.plan(planner, title, images, ipc, row) for row in planner.work.evaluation.rows}


def check_protocol(planner: Planner, name: str, protocol: ProtocolConfig, ipc: int) -> None:
    """Raises :class:`UserError` for a protocol that does not fit the images, or a set of ``ipc`` images per class."""
    classes = len(planner.classes.names)
    batch_size = min(for_ipc(protocol.batch_size, ipc), ipc * classes)
    where, data = f"evaluation.protocols.{name}", planner.work.data
    size = network_size(protocol, data.size)
    if data.channels != 3 and (what := for_colour_alone(protocol.augment, protocol.normalise)):
        raise UserError(f"{where}.{what} is for colour images, but data.channels={data.channels}; set it otherwise")
    for student in protocol.students:
        try:
            check_student(student, data.channels, size, classes, protocol.norm, protocol.width, batch_size)
        except UserError as error:
            raise UserError(f"{where}.students: {error}") from error


def network_size(protocol: ProtocolConfig, size: int) -> int:
    """Height and width of the images that a student's network gets, for a data set of images of ``size``."""
    return max(protocol.size or size, protocol.pad_to or 0)


def evaluation_flops(
    protocol: ProtocolConfig, student: str, channels: int, size: int, classes: int, trained: int, tested: int
) -> float:
    """Floating-point operations of one student: three forward passes per training image and epoch (``trained`` counts all
    epochs), four with ``second_pass``, and one per test image and validation. Those of a teacher are not included."""
    forward = forward_flops(student, channels, size, classes, protocol.norm, protocol.width)
    passes = 4 if protocol.second_pass else 3
    return forward * (passes * trained + protocol.validations * tested)


PROCESS_BYTES = {"cpu": 0.7e9, "gpu": 2.5e9}
"""Host memory of a student's process beside images and training: Python, PyTorch, Ray, and CUDA's context where there is one.
That of a CPU was measured (benchmarks/scale.py); that of a GPU is usual for CUDA 12."""


def host_bytes(stage: Evaluate, gpus: float) -> float:
    """Memory in bytes that a student of ``stage`` takes of its host. Images that are mapped from the machine's cache are not
    counted, since the system takes their memory back where it is short."""
    protocol, images = stage.protocol, stage.inputs["set"].images
    student = protocol.students[0]
    (channels, size), classes = stage.shape, len(stage.params["classes"])
    per_image = channels * (protocol.size or size) ** 2
    held = [inputs.images * per_image for name, inputs in stage.inputs.items() if name in ("set", "test", "val")]
    needed = PROCESS_BYTES["gpu" if gpus else "cpu"] + sum(bytes for bytes in held if bytes <= MAPPED_ABOVE)
    if gpus:
        return needed
    weights, kept = training_bytes(student, channels, network_size(protocol, size), classes, protocol.norm, protocol.width)
    ipc = -(-images // classes)
    # Weights, gradients and the optimiser's two moments; activations, and their gradients on the way back.
    return needed + 4 * weights + 2 * kept * min(for_ipc(protocol.batch_size, ipc), images)


def train_students(context: Context, stages: Sequence[Evaluate]) -> None:
    """Train the student of every missing (stage, seed), as many at a time as ``context`` and a small machine allow.

    Each task stores its own results, so the students that have finished are kept if the driver dies. A student that fails on
    every attempt does not stop the others; :class:`IncompletePool` is raised at the end.
    """
    config, cluster = context.config.evaluation, context.config.cluster
    waiting = _missing(context, stages)
    student = reserved(config.cpus_per_task, config.gpus_per_task)
    watch = wait_for_capacity(cluster, "evaluate", "evaluate", [student] if waiting else [])
    limits = (context.most_tasks, most_at_once(cluster, config.cpus_per_task))
    at_once = min((limit for limit in limits if limit is not None), default=len(waiting))
    options = {"num_cpus": config.cpus_per_task, "num_gpus": config.gpus_per_task, **placed(cluster, "evaluate")}
    remote = ray.remote(train_and_test)
    running: dict[Any, tuple[_Student, float]] = {}
    """Reference of a task → its student, and the memory in bytes that it reserves."""
    cancelled, failed = set[Any](), list[str]()
    with Progress("evaluate", len(waiting), "students") as progress, ended_if_damaged(running):
        shares = Shares(progress)

        def meanwhile() -> None:
            shares.look([each.unfinished for each, _ in running.values()])
            largest = largest_memory(cluster, "evaluate", student)
            for ref, (_, memory) in running.items():
                if 0 < largest < memory and ref not in cancelled:  # no node has so much any more: Ray would never start it
                    ray.cancel(ref)
                    cancelled.add(ref)

        while running or waiting:
            largest = largest_memory(cluster, "evaluate", student)
            while waiting and len(running) < at_once and (largest or not running):  # without any node one student waits for it
                next_one = waiting.pop(0)
                memory = min(host_bytes(next_one.stage, config.gpus_per_task), largest)
                task = remote.options(max_retries=3, memory=memory, **options)
                running[task.remote(next_one.task, next_one.seed, next_one.artifact)] = next_one, memory
            ref = watch.first_done(list(running), meanwhile)
            ended, _ = running.pop(ref)
            stage, unit = ended.stage, unit_of(ended.seed)
            try:
                outcome = results(ref)
            except Damaged:
                raise
            except UserError as error:
                raise UserError(f"{stage.title}, {unit}: {error}") from error
            except ray.exceptions.RayError as error:
                if ref in cancelled:
                    waiting.insert(0, ended)
                    continue
                failed.append(f"{stage.title}, {unit}: {reason(error)}")
                continue
            context.spend(stage, outcome["seconds"])
            commit_units(ended.artifact, {unit: outcome}, outcome["seconds"])
            shares.finish([ended.unfinished])
    if failed:
        raise IncompletePool(f"{len(failed)} students failed every attempt, e.g. {failed[0]}; the same command tries again")


@dataclass(frozen=True)
class _Student:
    """A student that is to be trained."""

    stage: Evaluate
    task: StudentTask
    artifact: Artifact
    seed: int

    @property
    def unfinished(self) -> Unfinished:
        return Unfinished(self.artifact, unit_of(self.seed))


def _missing(context: Context, stages: Sequence[Evaluate]) -> list[_Student]:
    """The students that have not been trained. Those that have, in a run that was interrupted, are committed."""
    found, storage = list[_Student](), context.storage
    for stage in {stage.key(storage): stage for stage in stages}.values():
        artifact, missing = stage.artifact(storage), stage.missing(storage)
        noted = read_notes(artifact, missing)
        if noted:
            commit_units(artifact, noted, sum(outcome["seconds"] for outcome in noted.values()))
        left, task = set(missing) - set(noted), _task(context, stage)
        found += [_Student(stage, task, artifact, seed) for seed in context.config.evaluation.seeds if unit_of(seed) in left]
    return found


def _task(context: Context, stage: Evaluate) -> StudentTask:
    storage = context.storage
    val, labels, statistics = (stage.inputs.get(name) for name in ("val", "labels", "statistics"))
    return StudentTask(
        stage.protocol, stage.inputs["set"].artifact(storage), RealSplit.of(cast(Encode, stage.inputs["test"]), storage),
        val.artifact(storage) if val else None,
        teacher_of(stage, context) if stage.protocol.labels == "soft" else None,
        labels.artifact(storage) if labels else None, statistics.artifact(storage) if statistics else None,
        context.classes.names, context.config.evaluation.threads_per_task,
    )  # fmt: skip


def confusion(artifact: Artifact, units: Sequence[str]) -> Tensor:
    """Confusion matrix int64 [C, C], summed over some students of a row (see :class:`ims3_ray.training.students.Accuracy`)."""
    return torch.stack([load(artifact.read(f"{unit}.safetensors"))["confusion"] for unit in units]).sum(dim=0)
