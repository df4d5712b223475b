"""The teacher of soft labels, trained on the encoded real images by Ray Train where no weights are given."""

from __future__ import annotations

from functools import partial

import ray
import torch

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device, placed, results
from ims3_ray.config import canonical
from ims3_ray.data.transforms import to_signed
from ims3_ray.room import wait_for_room
from ims3_ray.stages.base import Context, Stage, commit_units
from ims3_ray.stages.evaluate import TEACHER_SHARD, read_teacher
from ims3_ray.stages.pretrain_encoder import Images, encoder_loop
from ims3_ray.stages.sets import Split
from ims3_ray.stages.train import fit


def run(context: Context, stage: Stage) -> None:
    """Train, test and commit it; a run that was interrupted continues from the last epoch."""
    config, storage, artifact = context.config.evaluation.teacher, context.storage, stage.artifact(context.storage)
    images, trainer = Split.of(context, stage.inputs["images"]), config.trainer
    checkpoints = f"{artifact.folder}/train"
    arguments = {
        "training": canonical(config.training), "threads": trainer.threads_per_worker, "seed": 0,
        "images": partial(_with_names, images, context.classes.names),
    }  # fmt: skip
    print(f"{stage.title}: {config.training.epochs} epochs of {stage.inputs['images'].images} images", flush=True)
    cluster, workers = context.config.cluster, [trainer.worker_resources] * trainer.num_workers
    wait_for_room(cluster, "finetune", stage.title, workers, trainer.num_workers)
    labels = cluster.place.get("finetune")
    outcome = fit(encoder_loop, arguments, trainer, "teacher", storage.address(checkpoints), labels)
    digest = artifact.write(TEACHER_SHARD, outcome["weights"])
    judge = ray.remote(judged).options(
        num_cpus=trainer.cpus_per_worker, num_gpus=trainer.gpus_per_worker, **placed(cluster, "finetune")
    )
    accuracy = results(judge.remote(artifact, Split.of(context, stage.inputs["test"]), trainer.threads_per_worker))
    print(f"{stage.title}: {accuracy:.1f} % on the test split", flush=True)
    context.spend(stage, outcome["seconds"], trainer.num_workers)
    images_seen = outcome["images"] * config.training.epochs
    entry = {"sha256": digest, "images": images_seen, "loss": outcome["losses"][-1], "test_accuracy": accuracy}
    commit_units(artifact, {"result": entry}, outcome["seconds"])
    storage.delete(checkpoints)


def judged(teacher: Artifact, test: Split, threads: int) -> float:
    """Test accuracy in per cent: a teacher whose classes are in another order teaches nothing."""
    torch.set_num_threads(threads)
    device = own_device()
    encoder, (pixels, labels) = read_teacher(teacher).to(device), test.read()
    with torch.inference_mode():
        predicted = torch.cat([encoder.logits(to_signed(part.to(device))).argmax(dim=1).cpu() for part in pixels.split(100)])
    return 100 * (predicted == labels).double().mean().item()


def _with_names(images: Split, names: tuple[str, ...]) -> Images:
    return *images.read(), names
