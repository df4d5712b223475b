"""Loops that each worker of Ray Train runs to train a generator, an encoder or an autoencoder: the trainers of
:mod:`ims3_ray.training`, with checkpoints and reports."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import prepare_model

from ims3_ray.config import DataConfig, EncoderTraining, PretrainConfig
from ims3_ray.config.pretrain import AutoencoderTraining, GeneratorTraining
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.data.transforms import to_uint8
from ims3_ray.engine.board import RESUMED
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.errors import Unanimous
from ims3_ray.models.autoencoder import KIND, load_autoencoder
from ims3_ray.training.autoencoder import AutoencoderTrainer, latents_of, pixels_of
from ims3_ray.training.encoder import EncoderTrainer, Images
from ims3_ray.training.epochs import EpochTrainer
from ims3_ray.training.generator import PREVIEW_IMAGES, GeneratorTrainer
from ims3_ray.training.pace import ByClock, BySteps, Pace


def generator_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of the generator's pretraining. Returns, on rank 0, the packed EMA weights and the losses.

    ``plain`` holds ``config`` (the plain values of a :class:`PretrainConfig`), ``autoencoder`` (its weights, for a generator of
    latents) and ``board`` (a :class:`~ims3_ray.engine.board.Board`), to which rank 0 posts losses, speed and, every few
    minutes, samples.
    """
    config, board = PretrainConfig.model_validate(plain["config"]), plain["board"]
    g, context = config.generator, ray.train.get_context()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    pixels, labels, names = source_images(config.data)
    length, state = {"steps": g.steps, "minutes": g.minutes}, _last_checkpoint(device)
    ended = state is not None and state["ended"] == length
    images, to_pixels, about = CleanImages.of_pixels(pixels, labels, g.flip), to_uint8, dict[str, str]()
    if KIND in plain:
        autoencoder, about = load_autoencoder(plain[KIND].path()).to(device), {KIND: plain[KIND].digest}
        if ended:  # the shape of the latents is still needed
            images = CleanImages.of_pixels(pixels[:1], labels[:1], g.flip)
        images, to_pixels = latents_of(autoencoder, images, device), partial(pixels_of, autoencoder)
    trainer = GeneratorTrainer(
        g, images, len(names), config.seed, device, context.get_world_rank(), context.get_world_size(), prepare_model, to_pixels
    )  # fmt: skip
    spent = state["seconds"] if state else 0.0
    if state:
        _check_not_shorter(state, g)
        trainer.restore(state)
    if not ended:
        news = News(board, trainer.rank, trainer.losses, g.batch_size, spent)
        began = shown = time.monotonic()
        for step in trainer.run(_pace(g, spent, device)):
            news.tell(trainer.losses)
            if trainer.rank == 0 and time.monotonic() - shown > 60 * config.quality.preview_minutes:
                board.show.remote(0, contact_sheet(trainer.preview(config.quality.sampling), PREVIEW_IMAGES))
                shown = time.monotonic()
            if step % g.checkpoint_every == 0:
                _report(trainer, spent + time.monotonic() - began)
        spent += time.monotonic() - began
        news.tell(trainer.losses, wait=True)
        _report(trainer, spent, ended=length)
    return {
        "weights": trainer.weights(names, **about),
        "losses": trainer.losses,
        "seconds": spent,
        "images": len(labels),
        "steps": trainer.steps,
    }


def _pace(g: GeneratorTraining, spent: float, device: torch.device) -> Pace:
    if g.minutes is None:
        assert g.steps is not None
        return BySteps(g.steps, g.warmup, g.cooldown)
    return ByClock(60 * g.minutes, g.warmup, g.cooldown, spent, partial(_agreed_time, device))


def _agreed_time(device: torch.device) -> float:
    """The clock of rank 0, which all workers read together."""
    now = torch.tensor([time.monotonic()], dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(now, 0)
    return float(now.item())


LAST_STEP_MINUTES = 1.0
"""The most minutes that the last steps of a training by the clock may take after the time is over."""


def _check_not_shorter(state: dict[str, Any], g: GeneratorTraining) -> None:
    """Raises :class:`Unanimous` for a checkpoint of a longer training than the one that is asked for."""
    if g.steps is not None and (done := len(state["losses"])) > g.steps:
        raise _too_short(f"{done} steps", f"generator.steps asks for {g.steps} steps")
    asked_before = (state["ended"] or {}).get("minutes") or 0.0
    # The last step ends after the time is over, so the checkpoint of a training that was killed then may be a little longer.
    minutes = asked_before or state["seconds"] / 60 - LAST_STEP_MINUTES
    if g.minutes is not None and minutes > g.minutes:
        raise _too_short(f"{minutes:.3g} minutes", f"generator.minutes asks for {g.minutes:g}")


def _too_short(done: str, asked: str) -> Unanimous:
    return Unanimous(
        f"the last checkpoint has {done}, but {asked}; a training cannot be shortened, so raise it or choose another name"
    )


class News:
    """What rank 0 posts on the board while it trains: the losses of all steps, the seconds so far, and the rate since the last
    post."""

    def __init__(self, board: Any, rank: int, losses: list[float], batch_size: int, spent: float) -> None:
        """``losses`` are those of a checkpoint after ``spent`` seconds, from which the training goes on. A driver that was
        killed may have lost them. The last of their rows is marked by :data:`RESUMED`."""
        self.board, self.rank, self.batch_size = board, rank, batch_size
        self.told, self.since = len(losses), time.monotonic()
        self.began = self.since - spent
        if rank == 0 and losses:
            rows = _rows(losses, 0)
            board.post.remote(0, [*rows[:-1], {**rows[-1], RESUMED: 1.0}])

    def tell(self, losses: list[float], wait: bool = False) -> None:
        """Post the losses that are new; with ``wait``, return when the board has them."""
        if self.rank == 0 and len(losses) > self.told:
            now = time.monotonic()
            rate = (len(losses) - self.told) * self.batch_size / (now - self.since)
            rows = _rows(losses[self.told :], self.told)
            post = self.board.post.remote(0, [*rows[:-1], {**rows[-1], "seconds": now - self.began, "images_per_s": rate}])
            self.told, self.since = len(losses), now
            if wait:
                ray.get(post)


def _rows(losses: list[float], before: int) -> list[dict[str, float]]:
    return [{"step": before + number, "loss": loss} for number, loss in enumerate(losses, 1)]


def _report(trainer: GeneratorTrainer | EpochTrainer[Any], seconds: float, ended: dict[str, Any] | None = None) -> None:
    """Write a checkpoint; all workers call it together. ``ended`` is the length that was asked for, if it is reached."""
    state, metrics = trainer.state(), {"step": trainer.steps, "loss": trainer.losses[-1]}
    if trainer.rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**state, "seconds": seconds, "ended": ended}, Path(folder, "state.pt"))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _last_checkpoint(device: torch.device) -> dict[str, Any] | None:
    """What :func:`_report` wrote last, if anything: the trainer's state, with ``seconds`` and ``ended``."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(os.path.join(folder, "state.pt"), map_location=device, weights_only=True)
    return {"ended": None, **state}  # a checkpoint of an earlier version does not say whether the training had ended


def source_images(data: DataConfig) -> Images:
    """The decoded training split of a source, with the classes that ``data`` chooses."""
    return decoded_split(data, "train")[0]


def encoder_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of an encoder's training. Returns, on rank 0, the packed weights, the losses and the seconds.

    ``plain`` holds ``training`` (the plain values of an :class:`EncoderTraining`), ``images`` (a function that loads the
    images), ``seed``, ``threads`` and, where somebody reads it, ``board``.
    """
    config = EncoderTraining.model_validate(plain["training"])
    return _by_epochs(plain, lambda images, *rest: EncoderTrainer(config, images, *rest), "encoder.epochs")


def autoencoder_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker of an autoencoder's training. ``plain``, with the values of an :class:`AutoencoderTraining`, and the returned
    values are those of :func:`encoder_loop`."""
    config = AutoencoderTraining.model_validate(plain["training"])

    def trainer(images: Images, *rest: Any) -> AutoencoderTrainer:
        return AutoencoderTrainer(config, CleanImages.of_pixels(*images[:2], config.flip), *rest)

    return _by_epochs(plain, trainer, "autoencoding.epochs")


def _by_epochs(plain: dict[str, Any], make: Callable[..., EpochTrainer[Any]], key: str) -> dict[str, Any]:
    """Train to the end, with a checkpoint after each epoch, from the last one if there is one. ``make(images, seed, device,
    rank, world, wrap)`` builds the trainer; ``key`` is the number of epochs in the config."""
    context = ray.train.get_context()
    torch.set_num_threads(plain["threads"])
    trainer = make(
        plain["images"](), int(plain["seed"]), ray.train.torch.get_device(), context.get_world_rank(),
        context.get_world_size(), prepare_model,
    )  # fmt: skip
    config = trainer.config
    state, steps = _last_checkpoint(trainer.device), config.epochs * trainer.steps_per_epoch
    spent = state["seconds"] if state else 0.0
    if state:
        if (done := len(state["losses"])) > steps:
            raise _too_short(f"{done} steps", f"{key} asks for {steps} steps")
        trainer.restore(state)
    news = News(plain["board"], trainer.rank, trainer.losses, config.batch_size, spent) if "board" in plain else None
    began = time.monotonic() - spent
    for _ in trainer.epochs():
        spent = time.monotonic() - began
        if news:
            news.tell(trainer.losses, wait=True)
        _report(trainer, spent)
    return {
        "weights": trainer.weights(), "losses": trainer.losses, "seconds": spent, "images": len(trainer.labels),
        "steps": trainer.steps,
    }  # fmt: skip
