"""Inversion-matching fine-tuning on Ray Train with DeepSpeed ZeRO (Algorithm 1, DiffFit parameters only)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from safetensors.torch import save

from ims3_ray import compat
from ims3_ray.artifacts import Artifact
from ims3_ray.config import FinetuneConfig, canonical
from ims3_ray.data.batches import batch_indices
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.ema import Ema
from ims3_ray.models.generator import load_generator
from ims3_ray.objectives.diffusion import drop_labels
from ims3_ray.objectives.inversion_matching import ims3_loss
from ims3_ray.progress import Progress
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.stages.base import Context, Stage, commit_units, read_class
from ims3_ray.stages.train import fit

TAG = "engine"


def deepspeed_config(config: FinetuneConfig, local_batch: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would have to be compiled
        "steps_per_print": 10**9,
    }


class LossBoard:
    """Where rank 0 posts each step's losses while Ray Train runs, so that the driver can show and log them."""

    def __init__(self) -> None:
        self.history: dict[int, list[float]] = {}

    def post(self, rows: list[list[float]]) -> None:
        self.history.update({int(row[0]): row for row in rows})

    def read(self) -> list[list[float]]:
        return [self.history[step] for step in sorted(self.history)]


def finetune_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker. Rank 0 returns the adapter (EMA of the trained parameters, safetensors) and [step, L, L_Diff, L_IM]."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    compat.prepare_deepspeed()
    import deepspeed

    config, seed = FinetuneConfig.model_validate(plain["config"]), int(plain["seed"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    images: Artifact = plain["images"]
    parts = [read_class(images, units, "pixels") for _, units in plain["classes"]]
    pixels = torch.cat(parts)
    labels = torch.cat([torch.full((len(p),), label) for (label, _), p in zip(plain["classes"], parts, strict=True)])

    model = load_generator(Path(plain["weights"])).to(device)
    names = set(add_difffit(model, config.scaled_blocks))
    trained = [(n, p) for n, p in model.named_parameters() if n in names]
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=config.lr, weight_decay=0.0)
    local_batch = config.batch_size // world
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, local_batch))
    ema = Ema(trained, config.ema_decay)
    step, history = 0, []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
            state = torch.load(Path(folder, "ema.pt"), map_location=device, weights_only=True)
            ema.restore(state)
            history = json.loads(Path(folder, "losses.json").read_text())
            step = len(history)
    schedule = NoiseSchedule()
    # Every worker draws for the whole global batch and takes its part: how many they are changes rounding, nothing else.
    batches = batch_indices(len(labels), config.batch_size, 0, 1, seed_for(seed, "finetune-order") % 2**31, step)
    mine = slice(rank * local_batch, (rank + 1) * local_batch)
    posted = step
    while step < config.steps:
        rng = generator_for(seed, "finetune", step)
        index = next(batches)
        noise = torch.randn((len(index), *pixels.shape[1:]), generator=rng)[mine].to(device)
        t = torch.randint(schedule.num_steps, (len(index),), generator=rng)[mine].to(device)
        dropped = drop_labels(labels[index], model.config.null_label, config.label_dropout, rng)[mine].to(device)
        z0, y = to_signed(pixels[index[mine]]).to(device), labels[index[mine]].to(device)
        loss = ims3_loss(
            engine, z0, y, dropped, t, noise, schedule,
            lambda_im=config.lambda_im, n_steps=config.inversion.n_steps, grad_steps=config.inversion.grad_steps,
        )  # fmt: skip
        engine.backward(loss.total)
        engine.step()
        ema.update(trained)
        step += 1
        history.append([step, *_mean_over_workers(loss.total, loss.diffusion, loss.inversion_matching)])
        if rank == 0 and (step % 5 == 0 or step == config.steps):
            plain["board"].post.remote(history[posted:])
            posted = step
        if step % config.checkpoint_every == 0 and step < config.steps:
            _checkpoint(engine, ema, history, rank)
    return {"adapter": save({k: v.contiguous().cpu() for k, v in ema.average.items()}), "history": history}


def _mean_over_workers(*losses: torch.Tensor) -> list[float]:
    """Of each loss, its mean over the global batch (every worker has the same share of it)."""
    values = torch.stack([loss.detach() for loss in losses])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def _checkpoint(engine: Any, ema: Ema, history: list[list[float]], rank: int) -> None:
    """All ranks store their part of the optimizer; Ray Train joins the parts into one folder."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=TAG, exclude_frozen_parameters=True)
        if rank == 0:
            torch.save(ema.state(), Path(folder, "ema.pt"))
            Path(folder, "losses.json").write_text(json.dumps(history))
        ray.train.report({"step": len(history), "loss": history[-1][1]}, checkpoint=Checkpoint.from_directory(folder))


def run(context: Context, stage: Stage) -> None:
    """Fine-tune and commit the adapter (``adapter.safetensors``) and the losses (``losses.json``)."""
    config, storage = context.config.finetune, context.storage
    artifact, encode = stage.artifact(storage), stage.inputs["encode"]
    units: dict[int, list[str]] = {label: [] for label in context.classes.source_labels}
    for unit in encode.units:
        label = int(unit.split("-")[0][1:])
        if label in units:
            units[label].append(unit)
    classes = list(zip(context.classes.generator_labels, units.values(), strict=True))
    board = ray.remote(num_cpus=0)(LossBoard).remote()
    arguments = {
        "config": canonical(config), "seed": context.config.seed, "images": encode.artifact(storage),
        "weights": stage.places["weights"], "classes": classes, "board": board,
    }  # fmt: skip
    began = time.monotonic()
    with Progress(stage.title, config.steps, "steps") as progress:
        task = _fit_task.remote(arguments, storage.address(artifact.folder))
        while not ray.wait([task], timeout=1.0)[0]:
            if rows := ray.get(board.read.remote()):
                progress.at(rows[-1][0], f"loss {rows[-1][1]:.4f}")
                context.tracker.losses(rows)
        outcome = ray.get(task)
        context.tracker.losses(outcome["history"])
        progress.done = config.steps
    digest = artifact.write("adapter.safetensors", outcome["adapter"])
    artifact.write("losses.json", json.dumps(outcome["history"]).encode())
    entry = {"sha256": digest, "images": config.steps * config.batch_size}
    commit_units(artifact, {"result": entry}, time.monotonic() - began)
    storage.delete(f"{artifact.folder}/train")


@ray.remote(num_cpus=0)
def _fit_task(arguments: dict[str, Any], folder: str) -> dict[str, Any]:
    """Ray Train blocks its caller; in a task of its own the driver is free to show progress."""
    config = FinetuneConfig.model_validate(arguments["config"])
    return fit(finetune_loop, arguments, config.trainer, "train", folder)
