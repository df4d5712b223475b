"""Training of a timm network as a classifier of the training split, on Ray Train: φ, or a teacher."""

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

from ims3_ray.config import DataConfig, EncoderTraining, canonical
from ims3_ray.data.augment import augment
from ims3_ray.data.batches import batch_indices, load_pixels
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_signed
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.seeds import seed_for


class Classifier(nn.Module):
    """φ seen through its classification head, so that DistributedDataParallel meets a plain ``forward``."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder.logits(x_BCHW)


Images = tuple[Tensor, Tensor, tuple[str, ...]]
"""uint8 pixels [N, C, H, W], labels [N], class names."""


def encoder_config(training: EncoderTraining, pixels: Tensor, num_classes: int) -> EncoderConfig:
    counts = sum(part.flatten().bincount(minlength=256) for part in pixels.split(1000))
    values = to_signed(torch.arange(256, dtype=torch.uint8)).double()
    shares = counts / pixels.numel()  # not the images in floats: they are many
    mean = (shares * values).sum().item()
    std = (shares * (values - mean).square()).sum().sqrt().item()
    return EncoderConfig(
        model=training.model, model_args=training.model_args, channels=pixels.shape[1], num_classes=num_classes,
        mean=round(mean, 4), std=round(std, 4),
    )  # fmt: skip


def source_images(data: DataConfig) -> Images:
    """The training split of a source, decoded."""
    source = open_source(data.path, data.train_split)
    pixels, labels, _ = load_pixels(source, data.size, data.channels)
    return pixels, labels, source.class_names


def encoder_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker: ``training`` (:class:`EncoderTraining`, plain), ``images`` (a function), ``seed``, ``threads``. Returns
    (rank 0) the packed weights, the losses and the seconds."""
    e, seed = EncoderTraining.model_validate(plain["training"]), int(plain["seed"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plain["threads"])
    device = ray.train.torch.get_device()
    pixels, labels, names = plain["images"]()
    torch.manual_seed(seed_for(seed, "encoder-init"))
    encoder = Encoder(encoder_config(e, pixels, len(names)))
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
    batches = batch_indices(len(labels), e.batch_size, rank, world, seed, first_step=step)
    began = time.monotonic() - seconds
    wrapped.train()
    while step < e.epochs * per_epoch:
        index = next(batches)
        rng = torch.Generator(device).manual_seed(seed_for(seed, "encoder", step, rank))
        batch = 2 * augment(pixels[index].to(device).float() / 255, pixels.shape[-1], rng, **dict(e.augment)) - 1
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
        "weights": pack(encoder, canonical(encoder.config), "encoder", torch.float16, classes="\n".join(names)),
        "losses": losses,
        "seconds": seconds,
        "images": len(labels),
        "steps": step,
    }
