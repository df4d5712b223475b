"""Inversion-matching fine-tuning on Ray Train with DeepSpeed ZeRO (Algorithm 1, DiffFit parameters only)."""

from __future__ import annotations

import json
import math
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
from ims3_ray.config import FinetuneConfig, ObjectivesConfig, canonical
from ims3_ray.data.batches import batch_indices
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import draw
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.ema import Ema
from ims3_ray.models.generator import load_generator
from ims3_ray.objectives.base import Losses, Objective, TrainingStep, add_up
from ims3_ray.objectives.diffusion import Diffusion, drop_labels
from ims3_ray.objectives.inversion_matching import InversionMatching
from ims3_ray.objectives.inversion_matching_released import InversionMatchingReleased
from ims3_ray.objectives.minimax import Minimax
from ims3_ray.progress import Progress
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.stages.base import Context, Stage, commit_units, parse_unit, read_class
from ims3_ray.stages.derived import read_latents
from ims3_ray.stages.train import fit

TAG = "engine"


def deepspeed_config(config: FinetuneConfig, local_batch: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": config.zero_stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would have to be compiled
        "steps_per_print": 10**9,
    }


def objectives_of(config: ObjectivesConfig) -> list[Objective]:
    """The objectives with a weight; a Minimax memory that is shared gathers over the workers of the process group."""
    found: list[Objective] = []
    if config.diffusion.weight:
        found.append(Diffusion(config.diffusion.weight, config.diffusion.variance))
    if (im := config.inversion_matching).weight:
        found.append(InversionMatching(im.weight, im.n_steps, im.grad_steps, im.similarity))
    if config.inversion_matching_released.weight:
        found.append(InversionMatchingReleased(config.inversion_matching_released.weight))
    if (m := config.minimax).representativeness or m.diversity:
        found.append(Minimax(m.representativeness, m.diversity, m.memory, _gather if m.shared else None))
    return found


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` of every worker, in order of rank, joined along its first dimension."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


Row = dict[str, float]
"""step, loss, loss_TERM for each term (unweighted) and grad_norm of a training step."""


class LossBoard:
    """Where rank 0 posts each step's losses while Ray Train runs, so that the driver can show and log them."""

    def __init__(self) -> None:
        self.history: dict[int, Row] = {}

    def post(self, rows: list[Row]) -> None:
        self.history.update({int(row["step"]): row for row in rows})

    def read(self) -> list[Row]:
        return [self.history[step] for step in sorted(self.history)]


class CleanImages:
    """The z_0 of all classes: pixels, or latents drawn from their cached moments; mirrored at random with ``flip``."""

    def __init__(self, pixels: Artifact, latents: Artifact | None, classes: list[tuple[int, list[str]]], flip: bool) -> None:
        self.flip = flip
        if latents is None:
            parts = [{"pixels": read_class(pixels, units, "pixels")} for _, units in classes]
        else:
            parts = [read_latents(latents, units) for _, units in classes]
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        counts = [len(next(iter(part.values()))) for part in parts]
        self.labels = torch.cat([torch.full((n,), label) for (label, _), n in zip(classes, counts, strict=True)])
        self.shape = next(iter(self.tensors.values())).shape[-3:]

    def batch(self, index: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """z_0 [n, C, H, W] of the images ``index``, float32; draws from ``rng`` for all of them."""
        mirror = torch.rand(len(index), generator=rng) < 0.5 if self.flip else torch.zeros(len(index), dtype=torch.bool)
        if "pixels" in self.tensors:
            signed = to_signed(self.tensors["pixels"][index])
            return torch.where(mirror[:, None, None, None], signed.flip(-1), signed)
        mean, log_variance = (self.tensors[name][index, mirror.long()].float() for name in ("mean", "log_variance"))
        return draw(mean, log_variance, torch.randn(mean.shape, generator=rng))


def finetune_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker. Rank 0 returns the adapter (EMA of the trained parameters, safetensors) and the rows of all steps.

    A loss or gradient that is not finite ends the loop before anything takes it up; ``diverged`` then says at which
    step and on which images (positions in the order of the classes' images), and there is no adapter.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    compat.prepare_deepspeed()
    import deepspeed

    config, seed = FinetuneConfig.model_validate(plain["config"]), int(plain["seed"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    images = CleanImages(plain["images"], plain["latents"], plain["classes"], config.flip)
    labels = images.labels

    model = load_generator(Path(plain["weights"])).to(device)
    names = set(add_difffit(model, config.scaled_blocks))
    trained = [(n, p) for n, p in model.named_parameters() if n in names]
    ema = Ema(trained, config.ema_decay)  # before ZeRO-3 takes the parameters apart
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=config.lr, weight_decay=0.0)
    local_batch = config.batch_size // world
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, local_batch))
    objectives = objectives_of(config.objectives)
    step, history = 0, []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
            state = torch.load(Path(folder, "ema.pt"), map_location=device, weights_only=True)
            ema.restore(state)
            memories = torch.load(Path(folder, f"objectives-{rank}.pt"), map_location=device, weights_only=True)
            for objective, memory in zip(objectives, memories, strict=True):
                objective.restore(memory)
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
        noise = torch.randn((len(index), *images.shape), generator=rng)[mine].to(device)
        t = torch.randint(schedule.num_steps, (len(index),), generator=rng)[mine].to(device)
        dropped = drop_labels(labels[index], model.config.null_label, config.label_dropout, rng)[mine].to(device)
        z0, y = images.batch(index, rng)[mine].to(device), labels[index[mine]].to(device)
        losses = add_up(objectives, TrainingStep.forward(engine, schedule, z0, y, dropped, t, noise))
        row = {"step": step + 1, **_mean_over_workers(losses)}
        if math.isfinite(row["loss"]):
            engine.backward(losses.total)
            norm = _grad_norm_of(trained) if config.zero_stage == 0 else None
            engine.step()
            row["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
        if not math.isfinite(row.get("grad_norm", math.nan)):
            return {
                "diverged": row,
                "images": index.tolist(),
                "kept": step // config.checkpoint_every * config.checkpoint_every,
            }
        with deepspeed.zero.GatheredParameters([p for _, p in trained], enabled=config.zero_stage == 3):
            ema.update(trained)
        step += 1
        history.append(row)
        if rank == 0 and (step % 5 == 0 or step == config.steps):
            plain["board"].post.remote(history[posted:])
            posted = step
        if step % config.checkpoint_every == 0 and step < config.steps:
            _checkpoint(engine, ema, objectives, history, rank)
    return {"adapter": save({k: v.contiguous().cpu() for k, v in ema.average.items()}), "history": history}


def _mean_over_workers(losses: Losses) -> Row:
    """Of the total and each term, the mean over the global batch (every worker has the same share of it)."""
    values = torch.stack([loss.detach().float() for loss in (losses.total, *losses.terms.values())])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    names = ("loss", *(f"loss_{name}" for name in losses.terms))
    return dict(zip(names, values.tolist(), strict=True))


def _grad_norm_of(parameters: list[tuple[str, torch.nn.Parameter]]) -> torch.Tensor:
    """DeepSpeed keeps the norm under ZeRO only."""
    return torch.nn.utils.get_total_norm([p.grad for _, p in parameters if p.grad is not None])


def _checkpoint(engine: Any, ema: Ema, objectives: list[Objective], history: list[Row], rank: int) -> None:
    """All ranks store their part of the optimizer and their memories; Ray Train joins the parts into one folder."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=TAG, exclude_frozen_parameters=True)
        torch.save([objective.state() for objective in objectives], Path(folder, f"objectives-{rank}.pt"))
        if rank == 0:
            torch.save(ema.state(), Path(folder, "ema.pt"))
            Path(folder, "losses.json").write_text(json.dumps(history))
        ray.train.report({"step": len(history), "loss": history[-1]["loss"]}, checkpoint=Checkpoint.from_directory(folder))


def arguments_of(context: Context, stage: Stage) -> dict[str, Any]:
    """What :func:`finetune_loop` is given."""
    encode = stage.inputs["encode"]
    units: dict[int, list[str]] = {label: [] for label in context.classes.source_labels}
    for unit in encode.units:
        label, _ = parse_unit(unit)
        if label in units:
            units[label].append(unit)
    latents = stage.inputs.get("latents")
    return {
        "config": canonical(context.config.finetune), "seed": context.config.seed,
        "images": encode.artifact(context.storage), "weights": stage.places["weights"],
        "latents": latents.artifact(context.storage) if latents else None,
        "classes": list(zip(context.classes.generator_labels, units.values(), strict=True)),
        "board": ray.remote(num_cpus=0)(LossBoard).remote(),
    }  # fmt: skip


def run(context: Context, stage: Stage) -> None:
    """Fine-tune and commit the adapter (``adapter.safetensors``) and the losses (``losses.json``)."""
    config, storage = context.config.finetune, context.storage
    artifact, arguments = stage.artifact(storage), arguments_of(context, stage)
    began = time.monotonic()
    with Progress(stage.title, config.steps, "steps") as progress:
        task = _fit_task.remote(arguments, storage.address(artifact.folder))
        while not ray.wait([task], timeout=1.0)[0]:
            if rows := ray.get(arguments["board"].read.remote()):
                progress.at(int(rows[-1]["step"]), f"loss {rows[-1]['loss']:.4f}")
                context.tracker.losses(rows)
        outcome = ray.get(task)
        if "diverged" in outcome:
            raise UserError(_diverged(context, stage.inputs["encode"], outcome))
        context.tracker.losses(outcome["history"])
        progress.done = config.steps
    digest = artifact.write("adapter.safetensors", outcome["adapter"])
    artifact.write("losses.json", json.dumps(outcome["history"]).encode())
    entry = {"sha256": digest, "images": config.steps * config.batch_size}
    commit_units(artifact, {"result": entry}, time.monotonic() - began)
    storage.delete(f"{artifact.folder}/train")


def _diverged(context: Context, encode: Stage, outcome: dict[str, Any]) -> str:
    row, entries = outcome["diverged"], (encode.manifest(context.storage) or {})["units"]
    names: list[str] = []
    for name, label in zip(context.classes.names, context.classes.source_labels, strict=True):
        count = sum(entry["images"] for unit, entry in entries.items() if parse_unit(unit)[0] == label)
        names += [f"{name}/{position}" for position in range(count)]
    wrong = ", ".join(f"{key} {value:g}" for key, value in row.items() if not math.isfinite(value))
    kept = f"the checkpoint of step {outcome['kept']} is kept" if outcome["kept"] else "there is no checkpoint before it"
    return (
        f"fine-tuning diverged at step {row['step']:g} ({wrong}) on images {', '.join(names[i] for i in outcome['images'])}; "
        f"{kept}; lower finetune.lr or the weights of finetune.objectives"
    )


@ray.remote(num_cpus=0)
def _fit_task(arguments: dict[str, Any], folder: str) -> dict[str, Any]:
    """Ray Train blocks its caller; in a task of its own the driver is free to show progress."""
    config = FinetuneConfig.model_validate(arguments["config"])
    return fit(finetune_loop, arguments, config.trainer, "train", folder)
