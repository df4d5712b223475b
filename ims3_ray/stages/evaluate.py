"""Evaluation as parallel Ray tasks, one per (set of images, protocol, student, seed)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device, placed, results
from ims3_ray.config import ProtocolConfig, reserved
from ims3_ray.errors import IncompletePool
from ims3_ray.evaluation import Labelled, Teacher, train_student
from ims3_ray.models.encoder import Encoder, class_positions, load_encoder
from ims3_ray.progress import Progress
from ims3_ray.room import wait_for_room
from ims3_ray.stages.base import Context, Stage, commit_units, pack_tensors, read_many
from ims3_ray.stages.sets import Split, note, read_set
from ims3_ray.stages.weights import Weights

TEACHER_SHARD = "teacher.safetensors"


@dataclass(frozen=True)
class Exam:
    """What a task needs to train and test students of one set."""

    protocol: ProtocolConfig
    images: Artifact
    test: Split
    val: Split | None
    teacher: Weights | Artifact | None
    """Given weights, or what :mod:`ims3_ray.stages.teacher` left."""
    class_names: tuple[str, ...]
    threads: int


def sit(exam: Exam, seed: int, found: Artifact) -> dict[str, Any]:
    """Train one student and test it; its accuracies, which lie in ``found`` too, beside its confusion matrix.

    A training that was interrupted goes on from its last state.
    """
    torch.set_num_threads(exam.threads)
    began, device, train = time.monotonic(), own_device(), read_set(exam.images)
    val = held_out(exam.val.read(), train) if exam.val else None
    classes, unit = len(exam.class_names), unit_of(seed)
    state = f"{unit}.state"
    _, accuracy = train_student(
        exam.protocol.students[0], train, exam.test.read(), classes, exam.protocol, seed, device=device, val=val,
        teacher=teacher_of(exam, device) if exam.protocol.labels == "soft" else None,
        resume=found.read(state) if state in found.shards() else None, save=partial(found.write, state),
    )  # fmt: skip
    plain = asdict(replace(accuracy, confusion=torch.empty(0)))
    plain.pop("confusion")
    outcome = {**plain, "seconds": time.monotonic() - began}
    found.write(f"{unit}.safetensors", pack_tensors(confusion=accuracy.confusion))
    note(found, unit, outcome)
    if state in found.shards():
        found.forget(state)
    return outcome


def held_out(val: Labelled, train: Labelled) -> Labelled:
    """``val`` without the images that are in the set itself."""
    known = {image.numpy().tobytes() for image in train[0]}
    kept = torch.tensor([image.numpy().tobytes() not in known for image in val[0]])
    return val[0][kept], val[1][kept]


def teacher_of(exam: Exam, device: str) -> Teacher:
    """The teacher on a device, asked for the classes of the set in their order."""
    if isinstance(exam.teacher, Artifact):
        encoder, positions = read_teacher(exam.teacher), list(range(len(exam.class_names)))
    else:
        assert exam.teacher is not None
        path = exam.teacher.path()
        encoder, positions = load_encoder(path), class_positions(path, exam.class_names, "evaluation.teacher.weights")
    encoder = encoder.to(device)
    order = torch.tensor(positions, device=device)
    return lambda images: encoder.logits(2 * images - 1)[:, order]


def read_teacher(teacher: Artifact) -> Encoder:
    """The network that the teacher's stage has written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, TEACHER_SHARD)
        path.write_bytes(teacher.read(TEACHER_SHARD))
        return load_encoder(path)


def unit_of(seed: int) -> str:
    return f"seed-{seed}"


def run_all(context: Context, stages: Sequence[Stage], at_once: int | None = None) -> None:
    """Train every missing (stage, seed), all at once or so many at a time. Each student is stored when it is finished,
    whatever becomes of the driver; one that fails on every attempt stops no other and is named in the end by
    :class:`IncompletePool`."""
    config, cluster, storage = context.config.evaluation, context.config.cluster, context.storage
    options = {"num_cpus": config.cpus_per_task, "num_gpus": config.gpus_per_task, **placed(cluster, "evaluate")}
    task = ray.remote(sit).options(max_retries=3, **options)
    waiting: list[tuple[Stage, Exam, Artifact, int]] = []
    for stage in {stage.key(storage): stage for stage in stages}.values():
        exam, artifact, missing = _exam(context, stage), stage.artifact(storage), stage.missing(storage)
        noted = [unit for unit in missing if f"{unit}.json" in artifact.shards()]
        if noted:  # an interrupted run has not committed them
            outcomes = {unit: json.loads(shard) for unit, shard in read_many(artifact, noted, "json")}
            commit_units(artifact, outcomes, sum(outcome["seconds"] for outcome in outcomes.values()))
        left = set(missing) - set(noted)
        waiting += [(stage, exam, artifact, seed) for seed in config.seeds if unit_of(seed) in left]
    running: dict[Any, tuple[Stage, Artifact, str]] = {}
    failed: list[str] = []
    student = reserved(config.cpus_per_task, config.gpus_per_task)
    presence = wait_for_room(cluster, "evaluate", "evaluate", [student] if waiting else [])
    with Progress("evaluate", len(waiting), "students") as progress:
        while running or waiting:
            while waiting and (at_once is None or len(running) < at_once):
                stage, exam, artifact, seed = waiting.pop(0)
                running[task.remote(exam, seed, artifact)] = (stage, artifact, unit_of(seed))
            ref = presence.first_done(list(running))
            stage, artifact, unit = running.pop(ref)
            try:
                outcome = results(ref)
            except ray.exceptions.RayError as error:
                failed.append(f"{stage.title}, {unit}: {str(error).strip().splitlines()[-1]}")
                continue
            context.spend(stage, outcome["seconds"])
            commit_units(artifact, {unit: outcome}, outcome["seconds"])
            progress.advance(1)
    if failed:
        raise IncompletePool(f"{len(failed)} students failed every attempt, e.g. {failed[0]}; the same command tries again")


def _exam(context: Context, stage: Stage) -> Exam:
    storage, val = context.storage, stage.inputs.get("val")
    protocol = ProtocolConfig.model_validate({**stage.params["protocol"], "students": [stage.params["student"]]})
    teacher = stage.inputs["teacher"].artifact(storage) if "teacher" in stage.inputs else stage.weights.get("teacher")
    return Exam(
        protocol, stage.inputs["set"].artifact(storage), Split.of(context, stage.inputs["test"]),
        Split(val.artifact(storage), tuple((unit,) for unit in val.units)) if val else None, teacher, context.classes.names,
        context.config.evaluation.threads_per_task,
    )  # fmt: skip


def confusion(artifact: Artifact, units: Sequence[str]) -> Tensor:
    """int64 [C, C], the sum over some students of a row (see :class:`ims3_ray.evaluation.Accuracy`)."""
    return torch.stack([load(artifact.read(f"{unit}.safetensors"))["confusion"] for unit in units]).sum(dim=0)
