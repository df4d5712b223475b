"""One worker of a fine-tuning on Ray Train: the loop around :class:`ims3_ray.training.finetuning.Finetuner`."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.config import FinetuneConfig
from ims3_ray.data.batches import batch_indices
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.stages.adapters import Pretrained
from ims3_ray.stages.latents import read_images
from ims3_ray.stages.zero import ZeroEngine
from ims3_ray.training.finetuning import Finetuner, Row, finetune_flops

POST_EVERY = 5


def finetune_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """The loop of one worker. Rank 0 returns the adapter (EMA of the trained parameters, safetensors), the rows of all steps
    and the seconds.

    A loss or gradient that is not finite ends the loop. The outcome then has no adapter but ``diverged``, the row of that
    step; ``images``, the batch as positions in the order of the classes' images; and ``kept``, the step of the last
    checkpoint (0 for none).
    """
    config, seed, group = FinetuneConfig.model_validate(plain["config"]), int(plain["seed"]), int(plain["group"])
    began, context = time.monotonic(), ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    images = read_images(plain["images"], plain["latents"], plain["classes"], config.flip, plain["captions"])
    steps = config.total_steps(len(images.labels))
    pretrained: Pretrained = plain["pretrained"]
    generator = pretrained.open()
    flops = finetune_flops(generator, config)
    tuner = Finetuner(pretrained.load(generator), generator, config, device, rank, world, ZeroEngine)
    history: list[Row] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            tuner.load(Path(folder))
            found = json.loads(Path(folder, "losses.json").read_text("utf-8"))
            history, began = found["history"], began - found["seconds"]
        if rank == 0:
            plain["board"].post.remote(group, history)  # a driver that was killed may not have logged all of them
    batches = batch_indices(
        len(images.labels), config.batch_size, 0, 1, seed_for(seed, "finetune-order", group) % 2**31, len(history)
    )
    peak = matmul_rate(device, torch.bfloat16 if config.precision == "bf16" else torch.float32) * world
    posted, since = len(history), time.monotonic()
    for step in range(len(history), steps):
        index = next(batches)
        row = {"step": step + 1, **tuner.step(tuner.draw(images, index, generator_for(seed, "finetune", group, step)))}
        if not all(map(math.isfinite, row.values())):
            kept = step // config.checkpoint_every * config.checkpoint_every
            return {"diverged": row, "images": index.tolist(), "kept": kept}
        history.append(row)
        if rank == 0 and (len(history) % POST_EVERY == 0 or len(history) == steps):
            rate = (len(history) - posted) / (time.monotonic() - since)
            flop_rate = rate * config.batch_size * flops
            speed = {
                "images_per_s": rate * config.batch_size, "tflop_per_s": flop_rate / 1e12, "share_of_peak": flop_rate / peak,
            }  # fmt: skip
            post = plain["board"].post.remote(group, [*history[posted:-1], {**history[-1], **speed}])
            if len(history) == steps:
                ray.get(post)  # the driver reads no more once this group has ended
            posted, since = len(history), time.monotonic()
        if len(history) % config.checkpoint_every == 0 and len(history) < steps:
            _checkpoint(tuner, history, time.monotonic() - began)
    if rank != 0:
        return {}
    return {
        "adapter": tuner.adapter(
            classes=[label for label, _ in plain["classes"]],
            generator=pretrained.weights.digest,
            **({"added": list(pretrained.added)} if pretrained.added else {}),
            **({"adopted": pretrained.adopted_hash} if pretrained.adopted else {}),
        ),
        "history": history,
        "seconds": time.monotonic() - began,
    }


def _checkpoint(tuner: Finetuner, history: list[Row], seconds: float) -> None:
    """Every rank stores its part; Ray Train joins the parts in one folder and uploads them while training continues."""
    folder = Path(tempfile.mkdtemp(prefix="ims3-checkpoint-"))
    tuner.save(folder)
    if tuner.rank == 0:
        (folder / "losses.json").write_text(json.dumps({"history": history, "seconds": seconds}))
    ray.train.report(
        {"step": len(history), "loss": history[-1]["loss"]},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
