"""The teacher of soft labels, trained on the encoded real images by Ray Train where no weights are given."""

from __future__ import annotations

from functools import partial

from ims3_ray.config import canonical
from ims3_ray.stages.base import Context, Stage, by_class, commit_units
from ims3_ray.stages.evaluate import Split
from ims3_ray.stages.pretrain_encoder import Images, encoder_loop
from ims3_ray.stages.train import fit

SHARD = "teacher.safetensors"


def run(context: Context, stage: Stage) -> None:
    """Train and commit it; a run that was interrupted continues from the last epoch."""
    config, storage, artifact = context.config.evaluation.teacher, context.storage, stage.artifact(context.storage)
    encode = stage.inputs["images"]
    units = by_class(encode.units)
    images = Split(encode.artifact(storage), tuple(tuple(units[label]) for label in context.classes.source_labels))
    checkpoints = f"{artifact.folder}/train"
    arguments = {
        "training": canonical(config.training), "threads": config.trainer.threads_per_worker, "seed": 0,
        "images": partial(_with_names, images, context.classes.names),
    }  # fmt: skip
    print(f"{stage.title}: {config.training.epochs} epochs of {encode.images} images", flush=True)
    outcome = fit(encoder_loop, arguments, config.trainer, "teacher", storage.address(checkpoints))
    digest = artifact.write(SHARD, outcome["weights"])
    entry = {"sha256": digest, "images": outcome["images"] * config.training.epochs, "loss": outcome["losses"][-1]}
    commit_units(artifact, {"result": entry}, outcome["seconds"])
    storage.delete(checkpoints)


def _with_names(images: Split, names: tuple[str, ...]) -> Images:
    return *images.read(), names
