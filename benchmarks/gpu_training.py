"""The step ``training`` of ``benchmarks/gpu.py``: trains generators of small images by the clock and judges their samples."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_steps import DEVICE, GPU, Clock, Emit, one_line
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ims3_ray.cluster.speed import matmul_rate
from ims3_ray.config import PretrainConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.data.sources.embedded import embedded_names
from ims3_ray.errors import UserError
from ims3_ray.pretraining.quality import judge_generator, splits_of
from ims3_ray.training.accuracy import Labelled
from ims3_ray.training.generator import GeneratorTrainer, in_bf16
from ims3_ray.training.pace import ByClock

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
SETS = {"cifar10": 0.65, "fashion-mnist": 0.35}
"""Name of each data set → its share of the time. Its recipe is ``configs/pretrain/NAME-dit-minutes.yaml``."""
SAVE_S = 45.0
"""Seconds between saves: the most training time that is lost if the process is killed."""
JUDGE_S = 40.0 if GPU else 12.0
"""Seconds reserved for drawing and judging samples of each generator; at most 40 % of its time is reserved."""
CURVE_ROWS = 60
"""Approximate number of rows of a loss curve."""
SMALL = (
    "generator={hidden_size: 32, depth: 2, num_heads: 2, patch_size: 4, batch_size: 32, warmup: 0.1, precision: fp32}",
    "generator.compile=false",
    "quality={images_per_class: 4, sampling: {steps: 3, unit_size: 4}, judge: {width: 8, epochs: 1, precision: fp32}}",
    f"quality.threads={torch.get_num_threads()}",
)
"""Config overrides of a rehearsal on CPUs."""
SMALL_IMAGES = 1000
"""Number of images per split in a rehearsal."""


def train_all(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Train on every available data set. Time that one does not use goes to the next; a failure does not stop the next."""
    sources = {name: source for name in SETS if (source := source_of(name, data)) is not None}
    for name in SETS.keys() - sources.keys():
        emit({"left out": f"{name}: there is no --data FOLDER with its files"})
    failed = []
    for position, (name, overrides) in enumerate(sources.items()):
        share = SETS[name] / sum(SETS[each] for each in list(sources)[position:])
        end = time.monotonic() + clock.left * share
        try:
            train_one(name, overrides, out, Clock(end), emit)
        except Exception as error:
            traceback.print_exc()
            emit({"set": name, "error": one_line(error)})
            failed.append(name)
    if failed:
        raise SystemExit(f"training failed for {', '.join(failed)}")


def source_of(name: str, data: Path | None) -> list[str] | None:
    """Overrides of the recipe with the location of the images; None if they are not available."""
    embedded = "embedded:" + name if name in embedded_names() else None
    train, test = ((data / f"{name}-{split}.parquet") if data else Path() for split in ("train", "test"))
    files = {"data.path": train, "data.test_path": test}
    where = {key: str(file) if file.is_file() else embedded for key, file in files.items()}
    return [f"{key}={value}" for key, value in where.items()] if all(where.values()) else None


def train_one(name: str, overrides: list[str], out: Path, clock: Clock, emit: Emit) -> None:
    """Write ``OUT/NAME-dit.safetensors`` and ``OUT/NAME-dit.png``; emit rows of the loss curve, then one with the result."""
    began, whole = time.monotonic(), clock.left
    config = load_config(PretrainConfig, CONFIGS / f"{name}-dit-minutes.yaml", [*overrides, *([] if GPU else SMALL)])
    if config.autoencoder is not None:
        raise UserError(f"{name}: this benchmark trains generators of pixels; take autoencoder out of the recipe")
    train, test, class_names, _ = splits_of(config.data)
    if not GPU:
        train, test = fewer(train), fewer(test)
    emit({"set": name, "loading_s": round(time.monotonic() - began, 2)})
    run = Run(name, out, class_names)
    earlier = run.earlier()
    recipe = config.generator
    while True:
        trainer = GeneratorTrainer(recipe, CleanImages.of_pixels(*train, recipe.flip), len(class_names), config.seed, DEVICE)
        if earlier is not None:
            trainer.start_from(earlier.weights, earlier.steps)
        try:
            row = train_by_the_clock(trainer, run, clock, min(JUDGE_S, 0.4 * whole), earlier.seconds if earlier else 0.0, emit)
            break
        except Exception as error:
            if not recipe.compile or isinstance(error, UserError):
                raise
            traceback.print_exc()
            emit({"set": name, "not compiled": one_line(error)})
            recipe = recipe.model_copy(update={"compile": False})
    quality = judge_generator(config, run.weights, (train, test, class_names), DEVICE)
    assert quality.samples is not None
    columns = 10 if config.quality.images_per_class >= 10 else config.quality.images_per_class
    (out / f"{name}-dit.png").write_bytes(contact_sheet(quality.samples, columns))
    figures = {key: round(value, 2) for key, value in quality.figures.items()}
    size = {"images": len(train[1]), "mb": round(run.weights.stat().st_size / 1e6, 2)}
    emit({"set": name, "result": True, **row, **size, **figures, "quality": quality.lines})


def train_by_the_clock(
    trainer: GeneratorTrainer, run: Run, clock: Clock, reserved: float, seconds_before: float, emit: Emit
) -> dict[str, Any]:
    """Train until ``reserved`` seconds are left; return the figures. Rates exclude the first step, which may compile."""
    recipe, first = trainer.config, trainer.steps
    length = max(1.0, clock.left - reserved)
    started = shown = saved = after_first = time.monotonic()
    shown_step = first
    for step in trainer.run(ByClock(length, recipe.warmup, recipe.cooldown)):
        now = time.monotonic()
        if step == first + 1:
            trainer.read_losses()  # waits until the device has finished
            after_first = shown = time.monotonic()
            shown_step = step
        elif now - shown > length / CURVE_ROWS:
            trainer.read_losses()
            recent = trainer.losses[shown_step - step :]
            speed = (step - shown_step) * recipe.batch_size / (time.monotonic() - shown)
            point = {"step": step, "seconds": round(seconds_before + now - started, 1), "loss": sum(recent) / len(recent)}
            emit({"set": run.name, **point, "images_per_s": round(speed, 1)})
            shown, shown_step = time.monotonic(), step
        if now - saved > SAVE_S:
            run.save(trainer, seconds_before + now - started, finished=False)
            saved = time.monotonic()
    end = time.monotonic()
    run.save(trainer, seconds_before + end - started, finished=True)
    images_per_s = max(0, trainer.steps - first - 1) * recipe.batch_size / max(end - after_first, 1e-9)
    rate = 3 * images_per_s * trainer.model.config.forward_flops()
    possible = matmul_rate(DEVICE, torch.bfloat16 if in_bf16(recipe, torch.device(DEVICE)) else torch.float32)
    return {
        "steps": trainer.steps, "seconds": round(seconds_before + end - started, 1), "images_per_s": round(images_per_s, 1),
        "share": round(rate / possible, 3), "first_step_s": round(after_first - started, 1), "compiled": recipe.compile,
        "epochs": round(trainer.steps * recipe.batch_size / len(trainer.images.labels), 1),
    }  # fmt: skip


@dataclass(frozen=True)
class Earlier:
    """The averaged weights of an earlier call, with the steps and seconds of training behind them."""

    weights: dict[str, Tensor]
    steps: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """The weights files of a data set. While training runs, it writes unfinished weights to a separate file, so that finished
    weights of an earlier call, whose cool-down is complete, are kept until this training ends as well."""

    name: str
    out: Path
    class_names: tuple[str, ...]

    @property
    def weights(self) -> Path:
        return self.out / f"{self.name}-dit.safetensors"

    @property
    def unfinished(self) -> Path:
        return self.out / f"{self.name}-dit-unfinished.safetensors"

    def save(self, trainer: GeneratorTrainer, seconds: float, finished: bool) -> None:
        """Save the averaged weights and their progress atomically. Raises :class:`UserError` if a loss was not finite."""
        trainer.read_losses()
        progress = json.dumps({"steps": trainer.steps, "seconds": round(seconds, 1)})
        path = self.weights if finished else self.unfinished
        partial = path.with_suffix(".partial")
        partial.write_bytes(trainer.weights(self.class_names, training=progress))
        os.replace(partial, path)
        if finished:
            self.unfinished.unlink(missing_ok=True)

    def earlier(self) -> Earlier | None:
        """The weights with the most training, if any. Raises :class:`UserError` if one of their values is not finite."""
        path = next((path for path in (self.unfinished, self.weights) if path.is_file()), None)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            progress = json.loads((file.metadata() or {}).get("training", "{}"))
        weights = {key: value.float() for key, value in load_file(path).items()}
        if not all(value.isfinite().all() for value in weights.values()):
            raise UserError(f"'{path}' holds values that are not finite; delete it")
        return Earlier(weights, int(progress.get("steps", 0)), float(progress.get("seconds", 0.0)))


def fewer(images: Labelled) -> Labelled:
    """A random part of the images, for a rehearsal."""
    some = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(0))[:SMALL_IMAGES]
    return images[0][some], images[1][some]
