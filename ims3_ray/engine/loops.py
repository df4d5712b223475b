"""Loops that each worker of Ray Train runs to train a generator or an encoder: the trainers of :mod:`ims3_ray.training`, with
checkpoints and reports."""

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

from ims3_ray.config import DataConfig, EncoderTraining, PretrainConfig
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.errors import Unanimous
from ims3_ray.training.encoder import EncoderTrainer, Images
from ims3_ray.training.generator import GeneratorTrainer
from ims3_ray.training.pace import BySteps


def generator_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of the generator's pretraining. Returns, on rank 0, the packed EMA weights and the losses."""
    config = PretrainConfig.model_validate(plain)
    g, context = config.generator, ray.train.get_context()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    pixels, labels, names = source_images(config.data)
    trainer = GeneratorTrainer(
        g, (pixels, labels), len(names), config.seed, device, context.get_world_rank(), context.get_world_size(),
        prepare_model,
    )  # fmt: skip
    seconds = _restored(trainer, device, g.steps, "generator.steps")
    began = time.monotonic() - seconds
    for step in trainer.run(BySteps(g.steps, g.warmup_steps, g.cooldown_steps)):
        if step % g.checkpoint_every == 0 or step == g.steps:
            seconds = time.monotonic() - began
            _report(config, trainer, seconds)
    return {
        "weights": trainer.weights(names),
        "losses": trainer.losses,
        "seconds": seconds,
        "images": len(labels),
        "steps": trainer.steps,
    }


def _report(config: PretrainConfig, trainer: GeneratorTrainer, seconds: float) -> None:
    state, step = trainer.state(), trainer.steps
    recent = trainer.losses[-config.generator.checkpoint_every :]
    metrics = {"step": step, "loss": sum(recent) / len(recent), "images_per_s": step * config.generator.batch_size / seconds}
    if trainer.rank != 0:
        ray.train.report(metrics)
        return
    print(
        f"step {step}/{config.generator.steps}  loss {metrics['loss']:.4f}  {metrics['images_per_s']:.0f} images/s", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**state, "seconds": seconds}, Path(folder, "state.pt"))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _restored(trainer: GeneratorTrainer | EncoderTrainer, device: torch.device, steps: int, setting: str) -> float:
    """Restore the trainer from the last checkpoint, if there is one; returns the seconds that it had trained. Raises
    :class:`Unanimous` if it has trained for more than ``steps`` steps, the number that ``setting`` asks for."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0.0
    with checkpoint.as_directory() as folder:
        state = torch.load(os.path.join(folder, "state.pt"), map_location=device, weights_only=True)
    if (done := len(state["losses"])) > steps:
        raise Unanimous(
            f"the last checkpoint has {done} steps, but {setting} asks for {steps} steps; a training cannot be shortened, so "
            "raise it or choose another name"
        )
    trainer.restore(state)
    return float(state["seconds"])


def source_images(data: DataConfig) -> Images:
    """The decoded training split of a source, with the classes that ``data`` chooses."""
    return decoded_split(data, "train")[0]


def encoder_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of an encoder's training. Returns, on rank 0, the packed weights, the losses and the seconds.

    ``plain`` holds ``training`` (the plain values of an :class:`EncoderTraining`), ``images`` (a function that loads the
    images), ``seed`` and ``threads``.
    """
    config, context = EncoderTraining.model_validate(plain["training"]), ray.train.get_context()
    torch.set_num_threads(plain["threads"])
    device = ray.train.torch.get_device()
    trainer = EncoderTrainer(
        config, plain["images"](), int(plain["seed"]), device, context.get_world_rank(), context.get_world_size(), prepare_model
    )
    seconds = _restored(trainer, device, config.epochs * trainer.steps_per_epoch, "encoder.epochs")
    began = time.monotonic() - seconds
    for epoch in trainer.epochs():
        seconds = time.monotonic() - began
        recent = trainer.losses[-trainer.steps_per_epoch :]
        metrics = {"epoch": epoch, "loss": sum(recent) / len(recent)}
        if trainer.rank != 0:
            ray.train.report(metrics)
            continue
        with tempfile.TemporaryDirectory() as folder:
            torch.save({**trainer.state(), "seconds": seconds}, Path(folder, "state.pt"))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
    return {
        "weights": trainer.weights(), "losses": trainer.losses, "seconds": seconds, "images": len(trainer.labels),
        "steps": trainer.steps,
    }  # fmt: skip
