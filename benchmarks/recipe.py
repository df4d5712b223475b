"""Which small generator learns most in a given time, as JSON: each case changes the recipe in one way and trains equally long.

    python benchmarks/recipe.py data.path=/data/cifar10 data.size=32 data.channels=3
    python benchmarks/recipe.py 'cases=[as it is, half the batch]' seconds=600
    python benchmarks/recipe.py encoder=embedded:fashion-mnist-phi 'decays=[0.99,0.9999]'    samples and other averages too
    python benchmarks/recipe.py 'generator={hidden_size: 192, depth: 6}'     another recipe to change

`validation` is the mean error of ε over held-out training images (2,000, with fixed noise and evenly spread timesteps) under
the averaged weights. It is comparable across shapes, batches and learning rates, since the task is the same. Across weightings
of timesteps `frechet` is: the distance of samples from the held-out images in the space of `encoder`. The test split is not
used. `warm-up again` trains for half of the time, discards everything but the averaged weights, and trains for the other half
with a new optimizer. It shows the cost of resuming from a weights file.

Needs torch, numpy, pillow, pyarrow, pydantic, pyyaml and safetensors, and no Ray.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.cli import main
from ims3_ray.cluster.hardware import hardware
from ims3_ray.config import DataConfig, GeneratorTraining, Section
from ims3_ray.data.batches import load_pixels
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.diffusion.prediction import epsilon_of
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.errors import UserError
from ims3_ray.models.ema import Ema
from ims3_ray.models.encoder import encoder_path, load_encoder
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.objectives.diffusion import diffusion_loss
from ims3_ray.seeds import generator_for
from ims3_ray.selection.coverage import frechet
from ims3_ray.training.generator import GeneratorTrainer
from ims3_ray.training.pace import ByClock

HELD_OUT = 2000
"""Number of training images that are held out for validation."""
GPU = torch.cuda.is_available()


class BenchmarkConfig(Section):
    data: DataConfig = DataConfig()
    generator: GeneratorTraining = GeneratorTraining(
        patch_size=2, hidden_size=64, depth=4, batch_size=32, lr=1e-3, warmup=0.04, precision="fp32"
    )
    """The recipe that the cases change."""
    seconds: float = Field(default=480, gt=0)
    """Training time of each case in seconds."""
    cooldown: float = Field(default=0.25, gt=0, le=1)
    """Share of the time at the end over which the learning rate falls to zero."""
    decays: tuple[float, ...] = ()
    """Decays of further moving averages, which are measured at the end of the same training."""
    encoder: str | None = None
    """φ for the Fréchet distance of samples; without it there is none."""
    samples: int = Field(default=100, ge=2)
    """Number of samples of each class for the distance, by DPM-Solver++ in 10 steps."""
    cfg_scale: float = Field(default=1.25, ge=1)
    """Guidance of these samples."""
    threads: int = Field(default=1, ge=1)
    seed: int = 0
    cases: tuple[str, ...] = ()
    """Names of the cases to run; all cases when empty."""


@dataclass(frozen=True)
class Case:
    """One change of the recipe."""

    factors: dict[str, float] = field(default_factory=dict)
    """Name of a number in the recipe → the factor by which it is multiplied."""
    toggled: tuple[str, ...] = ()
    """Names of the switches of the recipe that are reversed."""
    replaced: dict[str, Any] = field(default_factory=dict)
    """Name of an option of the recipe → its value."""
    cooldown: float | None = None
    """Share of the time for the cool-down, if it differs from the config's."""
    again: bool = False
    """Whether training restarts from the averaged weights after half of the time."""


CASES = {
    "as it is": Case(),
    "patch twice as large": Case({"patch_size": 2}),
    "patch and width twice as large": Case({"patch_size": 2, "hidden_size": 2}),
    "1.5 times the width": Case({"hidden_size": 1.5}),
    "1.5 times the depth": Case({"depth": 1.5}),
    "half the learning rate": Case({"lr": 0.5}),
    "twice the learning rate": Case({"lr": 2}),
    "half the batch": Case({"batch_size": 0.5}),
    "twice the batch": Case({"batch_size": 2}),
    "no cool-down": Case(cooldown=0.0),
    "cool-down over half of the time": Case(cooldown=0.5),
    "mirroring switched": Case(toggled=("flip",)),
    "v instead of ε": Case(replaced={"prediction": "v"}),
    "min-SNR 5": Case(replaced={"min_snr": 5.0}),
    "v, min-SNR 5": Case(replaced={"prediction": "v", "min_snr": 5.0}),
    "compiled": Case(toggled=("compile",)),
    "warm-up again": Case(again=True),
}


def measure(
    config: BenchmarkConfig, name: str, images: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    case, base = CASES[name], config.generator
    cooldown = config.cooldown if case.cooldown is None else case.cooldown
    changes: dict[str, Any] = {
        key: type(getattr(base, key))(factor * getattr(base, key)) for key, factor in case.factors.items()
    }
    changes |= {key: not getattr(base, key) for key in case.toggled} | case.replaced
    recipe = GeneratorTraining.model_validate({**base.model_dump(), **changes})
    classes = int(images[1].max()) + 1
    device = "cuda" if GPU else "cpu"
    clean = CleanImages.of_pixels(*images, recipe.flip)
    trainer = GeneratorTrainer(recipe, clean, classes, config.seed, device)
    parts = 2 if case.again else 1
    for part in range(parts):
        if part:
            rounded = {key: value.half().float() for key, value in trainer.ema.average.items()}
            before, trainer = trainer.steps, GeneratorTrainer(recipe, clean, classes, config.seed, device)
            trainer.start_from(rounded, before)
        averages = {decay: Ema(trainer.model.named_parameters(), decay) for decay in config.decays}
        began = time.monotonic()
        for _ in trainer.run(ByClock(config.seconds / parts, recipe.warmup, cooldown)):
            for average in averages.values():
                average.update(trainer.model.named_parameters())
        seconds = time.monotonic() - began
    steps, values = trainer.steps, sum(p.numel() for p in trainer.model.parameters())
    recent = trainer.losses[-50:]
    others = {f"{decay:g}": quality(trainer, average, held_out, config) for decay, average in averages.items()}
    return {
        "case": name, "steps": steps, "seconds": round(seconds * parts, 1),
        "images_per_s": round(steps * recipe.batch_size / seconds / parts, 1),
        "gflop_per_image": round(3 * trainer.model.config.forward_flops() / 1e9, 3), "million_values": round(values / 1e6, 2),
        "train": round(sum(recent) / len(recent), 5), **quality(trainer, trainer.ema, held_out, config), "decays": others,
    }  # fmt: skip


@torch.inference_mode()
def quality(
    trainer: GeneratorTrainer, average: Ema, held_out: tuple[Tensor, Tensor], config: BenchmarkConfig
) -> dict[str, float]:
    """The error of the averaged weights and, with an encoder, the distance of their samples from held-out images."""
    trainer.model.load_state_dict({**trainer.model.state_dict(), **average.average})
    rng, schedule, kind, found = generator_for(0, "validation"), trainer.schedule, trainer.config.prediction, []
    t = torch.arange(len(held_out[0])) * schedule.num_steps // len(held_out[0])
    noise = torch.randn(held_out[0].shape, generator=rng)
    for part in zip(*(tensor.split(250) for tensor in (*held_out, t, noise)), strict=True):
        pixels, y, t_B, eps = (tensor.to(trainer.device) for tensor in part)
        z_t = schedule.add_noise(to_signed(pixels), eps, t_B)
        predicted = epsilon_of(trainer.model(z_t, t_B, y), z_t, t_B, schedule, kind)
        found.append(diffusion_loss(predicted, eps).item())
    measured = {"validation": round(sum(found) / len(found), 5)}
    if config.encoder is not None:
        measured["frechet"] = round(distance(trainer, held_out, config), 4)
    return measured


def distance(trainer: GeneratorTrainer, held_out: tuple[Tensor, Tensor], config: BenchmarkConfig) -> float:
    """Mean over classes of the Fréchet distance of samples from held-out images, in φ's space."""
    assert config.encoder is not None
    phi = load_encoder(encoder_path(config.encoder)).to(trainer.device).eval()

    def features(signed: Tensor) -> Tensor:
        parts = [phi(part.to(trainer.device)).double().cpu() for part in signed.split(250)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    generator, found = DiTGenerator.of_shape(trainer.model.config), []
    for label in range(trainer.model.config.num_classes):
        predict = generator.predictor(trainer.model, label, 1, config.cfg_scale)
        rngs = [generator_for(0, "image", label, index) for index in range(config.samples)]
        drawn = sample(
            predict, generator.latent, rngs, trainer.schedule, 10, sampler="dpm++2m", clip=True, device=trainer.device
        )
        real = to_signed(held_out[0][held_out[1] == label])
        found.append(frechet(features(to_signed(to_uint8(drawn).cpu())), features(real)))
    return sum(found) / len(found)


def benchmark(config: BenchmarkConfig) -> None:
    if unknown := set(config.cases) - set(CASES):
        raise UserError(f"there is no case '{min(unknown)}'; choose from: {'; '.join(CASES)}")
    torch.set_num_threads(config.threads)
    source = open_source(*config.data.place("train"))
    pixels, labels, _ = load_pixels(source, config.data.size, config.data.channels)
    order = torch.randperm(len(labels), generator=generator_for(config.seed, "held out"))
    held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
    rows = []
    for name in config.cases or CASES:
        rows.append(measure(config, name, (pixels[kept], labels[kept]), (pixels[held_out], labels[held_out])))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine: dict[str, Any] = hardware("cuda" if GPU else "cpu") | {"threads": config.threads}
    print(json.dumps({"machine": machine, "recipe": config.generator.model_dump(), "seconds": config.seconds, "cases": rows}))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
