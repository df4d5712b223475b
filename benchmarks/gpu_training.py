"""The step ``training`` of ``benchmarks/gpu.py``: generators of small images, trained by the clock, judged and drawn from."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_steps import DEVICE, GPU, Clock, Emit
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ims3_ray.config import PretrainConfig
from ims3_ray.errors import UserError
from ims3_ray.evaluation import Labelled
from ims3_ray.judging import judge_generator, splits_of
from ims3_ray.loading import load_config
from ims3_ray.training.generator import GeneratorTrainer
from ims3_ray.training.pace import ByClock

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "pretrain"
SETS = {"cifar10": 0.6, "fashion-mnist": 0.4}
"""Data sets, each with its share of the time. A recipe is ``configs/pretrain/NAME-minutes.yaml``."""
COOLDOWN = 0.3
"""Share of the time over which the learning rate falls."""
SAVE_S = 45.0
"""Seconds of training that are lost at most where the process is ended from outside."""
JUDGE_S = 40.0 if GPU else 12.0
"""What judging and drawing take, about, which comes off a data set's time. It is cut where less is there."""
CURVE_ROWS = 60
"""Rows of the loss curve in each call."""
SMALL = (
    "generator={hidden_size: 32, depth: 2, num_heads: 2, patch_size: 4, batch_size: 32, warmup_steps: 5, precision: fp32}",
    "generator.compile=false",
    "quality={images_per_class: 4, sampling: {steps: 3, unit_size: 4}, judge: {width: 8, epochs: 1, precision: fp32}}",
    f"quality.threads={torch.get_num_threads()}",
)
"""What a rehearsal on CPUs changes."""
SMALL_IMAGES = 1000


@dataclass(frozen=True)
class Earlier:
    """What an earlier call left: its averaged weights, and how far it had come."""

    weights: dict[str, Tensor]
    steps: int
    seconds: float


def train_all(out: Path, data: Path | None, clock: Clock, emit: Emit) -> None:
    """Every data set that is there; what one leaves of its time goes to the next."""
    sources = {name: source for name in SETS if (source := source_of(name, data)) is not None}
    if not sources:
        raise UserError("no data set was found; give --data FOLDER")
    failed = []
    for name, overrides in sources.items():
        later = list(sources)[list(sources).index(name) :]
        seconds = clock.left * SETS[name] / sum(SETS[each] for each in later)
        try:
            train_one(name, overrides, out, seconds, emit)
        except (UserError, torch.OutOfMemoryError) as error:  # the other data set can still be trained
            emit({"set": name, "error": str(error).splitlines()[0]})
            failed.append(name)
    if failed:
        raise SystemExit(f"training failed for {', '.join(failed)}")


def source_of(name: str, data: Path | None) -> list[str] | None:
    """Overrides of the recipe that say where the images are; None if they are nowhere."""
    train, test = (data / f"{name}-{split}.parquet" if data else None for split in ("train", "test"))
    if train is not None and test is not None and train.is_file():
        return [f"data.path={train}", *([f"data.test_path={test}"] if test.is_file() else ["data.test_path=embedded:" + name])]
    return [f"data.path=embedded:{name}"] if name == "fashion-mnist" else None


def train_one(name: str, overrides: list[str], out: Path, seconds: float, emit: Emit) -> None:
    """``OUT/NAME-dit.safetensors`` and ``OUT/NAME-dit.png``; rows of the loss curve, then one of the result."""
    began = time.monotonic()
    config = load_config(PretrainConfig, CONFIGS / f"{name}-dit-minutes.yaml", [*overrides, *([] if GPU else SMALL)])
    train, test, class_names = splits_of(config.data)
    if not GPU:
        train, test = fewer(train), fewer(test)
    loading_s = time.monotonic() - began
    path = out / f"{name}-dit.safetensors"
    earlier = read(path)
    trainer = GeneratorTrainer(config.generator, train, len(class_names), config.seed, DEVICE)
    if earlier is not None:
        trainer.start_from(earlier.weights, earlier.steps)
    trained, first = earlier.seconds if earlier else 0.0, trainer.steps
    length = max(1.0, seconds - loading_s - min(JUDGE_S, 0.4 * seconds))
    started = shown = saved = time.monotonic()
    shown_step = first
    for step in trainer.run(ByClock(length, config.generator.warmup_steps, COOLDOWN)):
        now = time.monotonic()
        if step == first + 1:
            emit({"set": name, "first_step_s": round(now - started, 2), "loading_s": round(loading_s, 2)})
            shown, shown_step = now, step
        elif now - shown > length / CURVE_ROWS:
            trainer.read_losses()
            recent = trainer.losses[shown_step - step :]
            speed = (step - shown_step) * config.generator.batch_size / (time.monotonic() - shown)
            point = {"step": step, "seconds": round(trained + now - started, 1), "loss": round(sum(recent) / len(recent), 5)}
            emit({"set": name, **point, "images_per_s": round(speed, 1)})
            shown, shown_step = time.monotonic(), step
        if now - saved > SAVE_S:
            write(path, trainer, class_names, trained + now - started)
            saved = time.monotonic()
    spent = time.monotonic() - started
    write(path, trainer, class_names, trained + spent)
    quality = judge_generator(config, path, (train, test, class_names), DEVICE)
    (out / f"{name}-dit.png").write_bytes(sheet(quality.samples))
    batch, shape = config.generator.batch_size, trainer.model.config
    images = (trainer.steps - first) * batch
    row = {
        "set": name, "result": True, "steps": trainer.steps, "seconds": round(trained + spent, 1), "images": len(train[1]),
        "images_per_s": round(images / spent, 1), "epochs": round(trainer.steps * batch / len(train[1]), 1),
        "tflop_per_s": round(3 * images * shape.forward_flops() / spent / 1e12, 3), "mb": round(path.stat().st_size / 1e6, 2),
    }  # fmt: skip
    emit({**row, **{key: round(value, 2) for key, value in quality.figures.items()}, "quality": quality.lines})


def fewer(images: Labelled) -> Labelled:
    """Some of the images, for a rehearsal."""
    some = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(0))[:SMALL_IMAGES]
    return images[0][some], images[1][some]


def write(path: Path, trainer: GeneratorTrainer, class_names: tuple[str, ...], seconds: float) -> None:
    """The averaged weights with how far they are, whole or not at all."""
    progress = json.dumps({"steps": trainer.steps, "seconds": round(seconds, 1)})
    partial = path.with_suffix(".partial")
    partial.write_bytes(trainer.weights(class_names, training=progress))
    os.replace(partial, path)


def read(path: Path) -> Earlier | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        progress = json.loads((file.metadata() or {}).get("training", "{}"))
    weights = {key: value.float() for key, value in load_file(path).items()}
    return Earlier(weights, int(progress.get("steps", 0)), float(progress.get("seconds", 0.0)))


def sheet(samples: Tensor | None) -> bytes:
    """Ten samples of each class, a row each."""
    from ims3_ray.data.contact_sheet import contact_sheet

    assert samples is not None
    return contact_sheet(samples, 10 if len(samples) % 10 == 0 else math.isqrt(len(samples)))
