"""Pretraining on Ray Train: the class-conditional DiT in pixel space."""

from __future__ import annotations

import io
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import prepare_model
from torch import nn

from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.data.batches import batch_indices, load_pixels
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.ema import Ema
from ims3_ray.objectives.diffusion import diffusion_loss, drop_labels


def dit_config(config: PretrainConfig, num_classes: int) -> DiTConfig:
    g = config.generator
    return DiTConfig(
        input_size=config.data.size,
        in_channels=config.data.channels,
        patch_size=g.patch_size,
        hidden_size=g.hidden_size,
        depth=g.depth,
        num_heads=g.num_heads,
        num_classes=num_classes,
    )


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, constant, linear cool-down to zero: a run can be lengthened without changing its start."""
    g = config.generator
    up = min(1.0, (step + 1) / max(1, g.warmup_steps))
    down = min(1.0, (g.steps - step) / max(1, g.cooldown_steps))
    return g.lr * min(up, down)


def generator_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of the generator's pretraining. Returns (rank 0) the packed EMA weights and the losses."""
    config = PretrainConfig.model_validate(plain)
    g, context = config.generator, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    source = open_source(config.data.path, config.data.train_split)
    pixels, labels, _ = load_pixels(source, config.data.size, config.data.channels)
    torch.manual_seed(config.seed)
    model = DiT(dit_config(config, len(source.class_names)))
    wrapped: nn.Module = prepare_model(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=g.lr, weight_decay=0.0, fused=True)
    ema = Ema(model.named_parameters(), g.ema_decay)
    schedule = NoiseSchedule()
    step, seconds = 0, 0.0
    losses: list[float] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"), map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.restore(state["ema"])
        step, seconds, losses = state["step"], state["seconds"], state["losses"]
    half = torch.autocast(device.type, torch.bfloat16) if g.precision == "bf16" else nullcontext()
    batches = batch_indices(len(labels), g.batch_size, rank, world, config.seed, first_step=step)
    began = time.monotonic() - seconds
    while step < g.steps:
        noise_rng = torch.Generator().manual_seed((config.seed * 7919 + step) * world + rank)
        index = next(batches)
        z0 = to_signed(pixels[index].to(device))
        if g.flip:
            z0 = torch.where(
                (torch.rand(len(index), generator=noise_rng) < 0.5)[:, None, None, None].to(device), z0.flip(3), z0
            )
        noise = torch.randn(z0.shape, generator=noise_rng).to(device)
        t = torch.randint(schedule.num_steps, (len(index),), generator=noise_rng).to(device)
        y = drop_labels(labels[index], len(source.class_names), g.label_dropout, noise_rng).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        with half:
            loss = diffusion_loss(wrapped(schedule.add_noise(z0, noise, t), t, y), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model.named_parameters())
        losses.append(loss.item())
        step += 1
        if step % g.checkpoint_every == 0 or step == g.steps:
            seconds = time.monotonic() - began
            _report(config, model, optimizer, ema, step, seconds, losses, rank)
    model.load_state_dict({**model.state_dict(), **ema.average})
    return {
        "weights": pack(model, canonical(model.config), "dit", torch.float16, classes="\n".join(source.class_names)),
        "losses": losses,
        "seconds": seconds,
        "images": len(labels),
        "steps": step,
    }


def _report(
    config: PretrainConfig, model: DiT, optimizer: torch.optim.Optimizer, ema: Ema, step: int, seconds: float,
    losses: list[float], rank: int,
) -> None:  # fmt: skip
    recent = losses[-config.generator.checkpoint_every :]
    metrics = {"step": step, "loss": sum(recent) / len(recent), "images_per_s": step * config.generator.batch_size / seconds}
    if rank != 0:
        ray.train.report(metrics)
        return
    print(
        f"step {step}/{config.generator.steps}  loss {metrics['loss']:.4f}  {metrics['images_per_s']:.0f} images/s", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state(),
            "step": step, "seconds": seconds, "losses": losses,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(state, buffer)
        Path(folder, "state.pt").write_bytes(buffer.getvalue())
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
