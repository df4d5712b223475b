"""Evaluation as parallel Ray tasks, one per (set of images, protocol, student, seed)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device, results
from ims3_ray.config import ProtocolConfig
from ims3_ray.evaluation import Labelled, Teacher, train_student
from ims3_ray.models.encoder import class_positions, load_encoder
from ims3_ray.progress import Progress
from ims3_ray.seeds import generator_for
from ims3_ray.stages.base import Context, Stage, by_class, commit_units, pack_tensors, read_class
from ims3_ray.stages.sets import read_set
from ims3_ray.stages.weights import Weights


@dataclass(frozen=True)
class Split:
    """Encoded real images: units of each class in order, of which ``per_class`` are taken at random (all when None)."""

    artifact: Artifact
    units: tuple[tuple[str, ...], ...]
    per_class: int | None = None

    def read(self) -> Labelled:
        parts = [read_class(self.artifact, units, "pixels") for units in self.units]
        if self.per_class is not None:
            parts = [part[_drawn(len(part), self.per_class, position)] for position, part in enumerate(parts)]
        return torch.cat(parts), torch.cat([torch.full((len(part),), position) for position, part in enumerate(parts)])


def _drawn(count: int, wanted: int, position: int) -> Tensor:
    """The same for every run, so that equal sets are worth the same."""
    return torch.randperm(count, generator=generator_for(0, "validation", position))[:wanted]


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


def sit(exam: Exam, seed: int) -> tuple[dict[str, Any], bytes]:
    """Train one student and test it: its accuracies, and its confusion matrix as safetensors."""
    torch.set_num_threads(exam.threads)
    began, device, train = time.monotonic(), own_device(), read_set(exam.images)
    val = held_out(exam.val.read(), train) if exam.val else None
    classes = len(exam.class_names)
    _, accuracy = train_student(
        exam.protocol.students[0], train, exam.test.read(), classes, exam.protocol, seed, device=device, val=val,
        teacher=teacher_of(exam, device) if exam.protocol.labels == "soft" else None,
    )  # fmt: skip
    plain = asdict(replace(accuracy, confusion=torch.empty(0)))
    plain.pop("confusion")
    return {**plain, "seconds": time.monotonic() - began}, pack_tensors(confusion=accuracy.confusion)


def held_out(val: Labelled, train: Labelled) -> Labelled:
    """``val`` without the images that are in the set itself."""
    known = {image.numpy().tobytes() for image in train[0]}
    kept = torch.tensor([image.numpy().tobytes() not in known for image in val[0]])
    return val[0][kept], val[1][kept]


def teacher_of(exam: Exam, device: str) -> Teacher:
    """The teacher on a device, asked for the classes of the set in their order."""
    if isinstance(exam.teacher, Artifact):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "teacher.safetensors")
            path.write_bytes(exam.teacher.read(path.name))
            encoder, positions = load_encoder(path), list(range(len(exam.class_names)))
    else:
        assert exam.teacher is not None
        path = exam.teacher.path()
        encoder, positions = load_encoder(path), class_positions(path, exam.class_names, "evaluation.teacher.weights")
    encoder = encoder.to(device)
    order = torch.tensor(positions, device=device)
    return lambda images: encoder.logits(2 * images - 1)[:, order]


def unit_of(seed: int) -> str:
    return f"seed-{seed}"


def run_all(context: Context, stages: Sequence[Stage]) -> None:
    """Run every missing (stage, seed) at once; each result is stored as it arrives."""
    config, storage = context.config.evaluation, context.storage
    task = ray.remote(sit).options(num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task, max_retries=3)
    running: dict[Any, tuple[Stage, int]] = {}
    for stage in {stage.key(storage): stage for stage in stages}.values():
        exam = _exam(context, stage)
        for seed in config.seeds:
            if unit_of(seed) in stage.missing(storage):
                running[task.remote(exam, seed)] = (stage, seed)
    with Progress("evaluate", len(running), "students") as progress:
        while running:
            (ref,), _ = ray.wait(list(running), num_returns=1)
            stage, seed = running.pop(ref)
            outcome, confusion = results(ref)
            artifact = stage.artifact(storage)
            artifact.write(f"{unit_of(seed)}.json", json.dumps(outcome).encode())
            artifact.write(f"{unit_of(seed)}.safetensors", confusion)
            commit_units(artifact, {unit_of(seed): outcome}, outcome["seconds"])
            progress.advance(1)


def _exam(context: Context, stage: Stage) -> Exam:
    storage, config = context.storage, context.config.evaluation

    def split(name: str, per_class: int | None = None) -> Split:
        units = by_class(stage.inputs[name].units)
        ordered = tuple(tuple(units[label]) for label in context.classes.source_labels)
        return Split(stage.inputs[name].artifact(storage), ordered, per_class)

    plain = {key: value for key, value in stage.params.items() if key in ProtocolConfig.model_fields}
    teacher = stage.inputs["teacher"].artifact(storage) if "teacher" in stage.inputs else stage.weights.get("teacher")
    val = split("val", stage.params["val_per_class"]) if "val" in stage.inputs else None
    return Exam(
        ProtocolConfig.model_validate(plain), stage.inputs["set"].artifact(storage), split("test"), val, teacher,
        context.classes.names, config.threads_per_task,
    )  # fmt: skip


def confusion(artifact: Artifact, units: Sequence[str]) -> Tensor:
    """int64 [C, C], the sum over some students of a row (see :class:`ims3_ray.evaluation.Accuracy`)."""
    from safetensors.torch import load

    return torch.stack([load(artifact.read(f"{unit}.safetensors"))["confusion"] for unit in units]).sum(dim=0)
