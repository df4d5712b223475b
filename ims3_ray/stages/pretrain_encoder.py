"""Pretraining of φ on Ray Train: a timm network as a classifier of the training split."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import prepare_model
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.data.batches import batch_indices, load_pixels
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_signed
from ims3_ray.evaluation import augment
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.seeds import generator_for, seed_for


class Classifier(nn.Module):
    """φ seen through its classification head, so that DistributedDataParallel meets a plain ``forward``."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder.logits(x_BCHW)


def encoder_config(config: PretrainConfig, pixels: Tensor, num_classes: int) -> EncoderConfig:
    signed = to_signed(pixels)
    return EncoderConfig(
        model=config.encoder.model, model_args=config.encoder.model_args, channels=config.data.channels,
        num_classes=num_classes, mean=round(signed.mean().item(), 4), std=round(signed.std().item(), 4),
    )  # fmt: skip


def encoder_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of φ's pretraining. Returns (rank 0) the packed weights, the losses and the seconds."""
    config = PretrainConfig.model_validate(plain)
    e, context = config.encoder, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    source = open_source(config.data.path, config.data.train_split)
    pixels, labels, _ = load_pixels(source, config.data.size, config.data.channels)
    torch.manual_seed(seed_for(config.seed, "encoder-init"))
    encoder = Encoder(encoder_config(config, pixels, len(source.class_names)))
    wrapped: nn.Module = prepare_model(Classifier(encoder))
    per_epoch = -(-len(labels) // e.batch_size)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=e.lr, weight_decay=e.weight_decay, fused=True)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=e.lr, total_steps=e.epochs * per_epoch)
    step, seconds = 0, 0.0
    losses: list[float] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"), map_location=device, weights_only=True)
        encoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        decay.load_state_dict(state["decay"])
        step, seconds, losses = state["step"], state["seconds"], state["losses"]
    batches = batch_indices(len(labels), e.batch_size, rank, world, config.seed, first_step=step)
    began = time.monotonic() - seconds
    wrapped.train()
    while step < e.epochs * per_epoch:
        index = next(batches)
        rng = generator_for(config.seed, "encoder", step, rank)
        batch = augment(to_signed(pixels[index].to(device)), e.max_shift, e.flip, rng)
        loss = F.cross_entropy(wrapped(batch), labels[index].to(device), label_smoothing=e.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        step += 1
        if step % per_epoch == 0:
            seconds = time.monotonic() - began
            metrics = {"epoch": step // per_epoch, "loss": sum(losses[-per_epoch:]) / per_epoch}
            if rank != 0:
                ray.train.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as folder:
                state = {
                    "model": encoder.state_dict(), "optimizer": optimizer.state_dict(), "decay": decay.state_dict(),
                    "step": step, "seconds": seconds, "losses": losses,
                }  # fmt: skip
                torch.save(state, Path(folder, "state.pt"))
                ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
    return {
        "weights": pack(encoder, canonical(encoder.config), "encoder", torch.float16, classes="\n".join(source.class_names)),
        "losses": losses,
        "seconds": seconds,
        "images": len(labels),
        "steps": step,
    }
