"""The teacher of soft labels: given weights, or a network trained on the encoded real images by Ray Train."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import torch

from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.joining import own_device, placed
from ims3_ray.config import EncoderTraining, TrainerConfig, WorkConfig, canonical, differing
from ims3_ray.config.evaluation import for_colour_alone
from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.sets import RealSplit
from ims3_ray.engine.shards import commit_units
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.tasks import awaited
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.models.encoder import (
    Encoder,
    EncoderConfig,
    check_encoder,
    class_positions,
    embedding_cost,
    encoder_config,
    encoder_path,
    load_encoder,
    settings_beside,
    uses_batch_norm,
)
from ims3_ray.models.teacher import TeacherNetwork
from ims3_ray.progress import Progress
from ims3_ray.stages.encode import Encode
from ims3_ray.training.encoder import Images
from ims3_ray.training.finetuning import Row

SHARD = "teacher.safetensors"


@dataclass(eq=False)
class TrainTeacher(Stage):
    """Trains the teacher. Its only shard is an encoder's weights file with the classes of the data in their order."""

    name, version, settings, exclusive = "teacher", 2, EncoderTraining, True

    @classmethod
    def plan(cls, planner: Planner) -> TrainTeacher:
        training, data = planner.work.evaluation.teacher.training, planner.work.data
        images, test = Encode.plan(planner, "train", data), Encode.plan(planner, "test", data)
        count, names = images.images * training.epochs, planner.classes.names
        check_training(training, data.channels, len(names), "evaluation.teacher.training")
        params = {"training": differing(training), "classes": list(names), **_workers(planner.work.evaluation.teacher.trainer)}
        shape = shape_in_training(training, data.channels, len(names))
        flops = 3 * count * embedding_cost(shape.model_dump_json(), data.size)[0]
        return planner.add(cls("train the teacher", params, {"images": images, "test": test}, images=count, flops=flops))

    def worker(self, config: WorkConfig) -> Worker:
        trainer = config.evaluation.teacher.trainer
        return Worker("finetune", trainer.cpus_per_worker, trainer.gpus_per_worker, trainer.num_workers)

    @classmethod
    def stem(cls, unit: str) -> str:
        return SHARD.rpartition(".")[0]

    def run(self, context: Context) -> None:
        """Train, test and commit the teacher; an interrupted training continues from the last epoch."""
        from ims3_ray.engine.loops import encoder_loop  # Ray Train takes a second to import, which students do without
        from ims3_ray.engine.train import watched_fit

        config, storage, artifact = context.config.evaluation.teacher, context.storage, self.artifact(context.storage)
        images = RealSplit.of(cast(Encode, self.inputs["images"]), storage)
        test = RealSplit.of(cast(Encode, self.inputs["test"]), storage)
        trainer, checkpoints = config.trainer, f"{artifact.folder}/train"
        arguments = {
            "training": canonical(config.training), "threads": trainer.threads_per_worker, "seed": 0,
            "images": partial(_with_names, images, context.classes.names),
        }  # fmt: skip
        cluster, workers = context.config.cluster, [trainer.worker_resources] * trainer.num_workers
        watch = wait_for_capacity(cluster, "finetune", self.title, workers, trainer.num_workers)
        total = config.training.epochs * -(-self.inputs["images"].images // config.training.batch_size)
        with Progress(self.title, total, "steps") as progress:
            outcome = watched_fit(
                encoder_loop, arguments, trainer, "teacher", storage.address(checkpoints), watch, partial(_shown, progress)
            )
            progress.done = total
        artifact.look_again()
        if not self.missing(storage):  # another job has made it meanwhile, and others may have used it already
            return
        digest = artifact.write(SHARD, outcome["weights"])
        judge = ray.remote(judged).options(
            num_cpus=trainer.cpus_per_worker, num_gpus=trainer.gpus_per_worker, **placed(cluster, "finetune")
        )
        (accuracy,) = awaited([judge.remote(artifact, test, trainer.threads_per_worker)], self.title, watch)
        print(f"{self.title}: {accuracy:.1f} % on the test split", flush=True)
        context.spend(self, outcome["seconds"], trainer.num_workers)
        images_seen = outcome["images"] * config.training.epochs
        entry = {"sha256": digest, "images": images_seen, "loss": outcome["losses"][-1], "test_accuracy": accuracy}
        commit_units(artifact, {"result": entry}, outcome["seconds"])
        storage.delete(checkpoints)


def _workers(trainer: TrainerConfig) -> dict[str, Any]:
    """What the key of a teacher holds of its workers, if there may be several: each augments its own part of a batch, and
    normalises it by itself."""
    numbers = {"workers": trainer.num_workers, "most": trainer.max_workers}
    return numbers if numbers != {"workers": 1, "most": None} else {}


def _shown(progress: Progress, rows: list[Row], sheet: bytes | None) -> None:
    if rows:
        progress.at(min(int(rows[-1]["step"]), progress.total), f"loss {rows[-1]['loss']:.4f}")


@dataclass(frozen=True)
class TeacherInput:
    """Inputs, weights and parameters that a stage adds to its plan if it uses the teacher."""

    inputs: dict[str, Stage] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


def plan_teacher(planner: Planner) -> TeacherInput:
    """Plan the teacher: the weights that the config names or, if it names none, a stage that trains a teacher.

    Raises :class:`UserError` for weights that do not fit the classes or the images.
    """
    named, data = planner.work.evaluation.teacher.weights, planner.work.data
    if named is None:
        return TeacherInput({"teacher": TrainTeacher.plan(planner)})
    path = encoder_path(named)
    check_encoder(path)
    class_positions(path, planner.classes.names, "evaluation.teacher.weights")
    if (channels := encoder_config(path).channels) != data.channels:
        raise UserError(f"teacher '{named}' takes {channels} channels but data.channels={data.channels}; choose another")
    weights = Weights.of(encoder_path, named)
    return TeacherInput(weights={"teacher": weights}, params={"teacher": weights.digest, **settings_beside(path)})


def teacher_shape(planner: Planner) -> EncoderConfig:
    """Architecture of the teacher; if it has to be trained, without its mean and standard deviation."""
    teacher, channels, classes = planner.work.evaluation.teacher, planner.work.data.channels, len(planner.classes.names)
    if teacher.weights is not None:
        return encoder_config(encoder_path(teacher.weights))
    return shape_in_training(teacher.training, channels, classes, planner.work.data.size)


def teacher_of(stage: Stage, context: Context) -> Weights | Artifact:
    """The teacher of a stage that was planned with :func:`plan_teacher`, as :func:`load_teacher` takes it."""
    return stage.inputs["teacher"].artifact(context.storage) if "teacher" in stage.inputs else stage.weights["teacher"]


def load_teacher(teacher: Weights | Artifact, class_names: tuple[str, ...], device: str) -> TeacherNetwork:
    """The teacher on a device; its logits are in the order of ``class_names``."""
    if isinstance(teacher, Artifact):
        return TeacherNetwork(read_teacher(teacher), range(len(class_names))).to(device)
    path = teacher.path()
    positions = class_positions(path, class_names, "evaluation.teacher.weights")
    return TeacherNetwork(load_encoder(path), positions).to(device)


def read_teacher(teacher: Artifact) -> Encoder:
    """Load the network that :class:`TrainTeacher` has written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, SHARD)
        path.write_bytes(teacher.read(SHARD, "result"))
        return load_encoder(path)


def judged(teacher: Artifact, test: RealSplit, threads: int) -> float:
    """Test accuracy of the teacher in per cent; it would reveal classes that are in the wrong order."""
    torch.set_num_threads(threads)
    device = own_device()
    encoder, (pixels, labels) = read_teacher(teacher).to(device), test.read()
    with torch.inference_mode():
        predicted = torch.cat([encoder.logits(to_signed(part.to(device))).argmax(dim=1).cpu() for part in pixels.split(100)])
    return 100 * (predicted == labels).double().mean().item()


def _with_names(images: RealSplit, names: tuple[str, ...]) -> Images:
    return *images.read(), names


def check_training(training: EncoderTraining, channels: int, num_classes: int, where: str) -> None:
    """Raises :class:`UserError` for settings that do not fit the images or the network; ``where`` is their key."""
    if channels != 3 and (what := for_colour_alone(training.augment)):
        raise UserError(f"{where}.{what} is for colour images, but data.channels={channels}; set it to 0")
    if training.batch_size == 1 and uses_batch_norm(shape_in_training(training, channels, num_classes).model_dump_json()):
        raise UserError(
            f"{where}.batch_size=1 is too small for {training.model}, which normalises over the images of a batch; raise it"
        )


def shape_in_training(training: EncoderTraining, channels: int, num_classes: int, size: int | None = None) -> EncoderConfig:
    """Architecture of the network in training; its mean and standard deviation are known once it is trained."""
    return EncoderConfig(
        model=training.model, model_args=training.model_args, channels=channels, num_classes=num_classes, mean=0.0, std=1.0,
        size=size,
    )  # fmt: skip
