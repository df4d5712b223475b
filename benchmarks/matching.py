"""What inversion matching does to samples: fine-tuning with several weights λ_IM, measured after several numbers of steps.

    python benchmarks/matching.py out=FOLDER                              λ from 0 to 0.8 on the embedded Fashion-MNIST
    python benchmarks/matching.py out=FOLDER lambdas=[0,0.2] steps=[120]  a part of it
    python benchmarks/matching.py out=FOLDER students=2                   and classifiers that are trained on the samples
    python benchmarks/matching.py out=FOLDER figure=matching.svg          and a figure

All runs start from the same generator and see the same batches, in the same order; a run `0 again` has other batches, and shows
how much of a difference is chance. Each measurement is of the averaged weights, which become the adapter:

    diffusion, matching   L_Diff and L_IM on held-out training images, with fixed timesteps and noise
    parallel              mean cosine between the inverted and the clean latent of these images
    frechet, precision, recall, density, coverage     samples against the training images of their class, in φ's space
    recognised, margin    share of samples whose class φ's own classifier names, and the median of the score of the class minus
                          the best other score
    instability           log of the instability coefficient (Eq. 12), mean over held-out images; after the last step only
    accuracy              accuracy of students on held-out training images, one value for each student

OUT/results.json has a row for each measurement, OUT/samples/ the samples. A second call with the same OUT adds what is
missing: measurements at more steps need the fine-tuning from its start, students only the samples. Prints the rows as JSON.
Needs torch, numpy, pyarrow, pydantic, pyyaml, pillow and safetensors (matplotlib for a figure), and no Ray. On a GPU, a step
is a CUDA graph.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from ims3_ray.cli import main
from ims3_ray.config import DataConfig, FinetuneConfig, InstabilityConfig, ProtocolConfig, SamplingConfig, Section
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.diffusion.instability import log_instability
from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.prediction import epsilon_of
from ims3_ray.diffusion.samplers.base import Sampler, sample
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.models.encoder import encoder_path, load_encoder
from ims3_ray.models.generator import generator_path, open_generator
from ims3_ray.models.generators.base import Generator
from ims3_ray.objectives.base import TrainingStep, add_up
from ims3_ray.objectives.diffusion import drop_conditions
from ims3_ray.objectives.inversion_matching import inversion_matching_loss
from ims3_ray.seeds import generator_for
from ims3_ray.selection.coverage import coverage, frechet
from ims3_ray.training.capture import Captured
from ims3_ray.training.finetuning import Finetuner, choose_trained
from ims3_ray.training.students import train_student

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRETRAINED, REAL = "pretrained", "real images"
"""Names of two rows that need no fine-tuning: the generator as it is, and training images in place of samples."""


class BenchmarkConfig(Section):
    out: str = "matching"
    """Folder for the results."""
    generator: str = "embedded:fashion-mnist-dit"
    """Weights of a generator of pixels."""
    encoder: str = "embedded:fashion-mnist-phi"
    data: DataConfig = DataConfig()
    lambdas: tuple[float, ...] = (0, 0.002, 0.02, 0.2, 0.8)
    """Weights λ_IM."""
    again: bool = True
    """Whether λ_IM = 0 is fine-tuned a second time, on other batches."""
    steps: tuple[int, ...] = (120, 600, 2000, 10000)
    """Numbers of steps after which each run is measured."""
    finetune: FinetuneConfig = FinetuneConfig(precision="bf16", compile=DEVICE == "cuda")
    sampling: SamplingConfig = SamplingConfig(sampler="dpm++2m", steps=10, cfg_scale=1.5, precision="bf16")
    guidances: tuple[float, ...] = (1.0, 1.25)
    """Other guidances with which the generator is measured without fine-tuning."""
    samples: int = Field(default=100, ge=2)
    """Number of samples of each class."""
    instability: InstabilityConfig = InstabilityConfig(images=20)
    students: int = Field(default=0, ge=0)
    """Number of students that are trained on the first `k` samples of each class of each measurement."""
    k: int = Field(default=50, ge=1)
    protocol: ProtocolConfig = ProtocolConfig(width=32, epochs={1: 300, 10: 150, 50: 60}, validations=1)
    processes: int = Field(default=2, ge=1)
    """Number of students that are trained at the same time, on CPUs."""
    held_out: int = Field(default=100, ge=1)
    """Number of training images of each class that are not used for fine-tuning."""
    limit_s: float = Field(default=1_000_000.0, gt=0)
    """Fine-tuning stops after so many seconds, and what is missing by then is left out."""
    figure: str | None = None
    """File for a figure, in the format that its name ends in."""


class Images:
    """The training images of each class, and those that are held out; labels are positions of classes."""

    def __init__(self, config: BenchmarkConfig) -> None:
        (pixels, labels, self.names), _ = decoded_split(config.data, "train")
        parts = []
        for position in range(len(self.names)):
            mine = pixels[labels == position]
            order = torch.randperm(len(mine), generator=generator_for(0, "held-out", position))
            parts.append((mine[order[config.held_out :]], mine[order[: config.held_out]]))
        self.train, self.held_out = ([part[which] for part in parts] for which in (0, 1))


class Run:
    """A fine-tuning that can be continued."""

    def __init__(
        self, name: str, weight: float, seed: int, generator: Generator, images: Images, config: BenchmarkConfig
    ) -> None:
        self.name, self.steps, self.seconds = name, 0, 0.0
        self.generator, self.batch_size, self.dropout = generator, config.finetune.batch_size, config.finetune.label_dropout
        inversion = {**config.finetune.model_dump()["objectives"]["inversion_matching"], "weight": weight}
        settings = {**config.finetune.model_dump(), "objectives": {"inversion_matching": inversion}}
        self.finetuner = Finetuner(generator.load().to(DEVICE), generator, FinetuneConfig.model_validate(settings), DEVICE)
        self.rng = torch.Generator(DEVICE).manual_seed(seed)
        self.pixels = torch.cat(images.train).to(DEVICE)
        of_class = torch.tensor(generator.labels(images.names))
        counts = torch.tensor([len(part) for part in images.train])
        self.labels = of_class.repeat_interleave(counts).to(DEVICE)
        self.optimizer = self.finetuner.engine.optimizer  # type: ignore[attr-defined]
        self.update = self._updated
        if DEVICE == "cuda":
            for group in self.optimizer.param_groups:
                group["capturable"] = True
            self.update = Captured(self._updated)  # type: ignore[method-assign,assignment]

    def advance(self, steps: int, until: float) -> bool:
        """Train up to so many steps; False if the clock reached ``until`` before."""
        began = time.monotonic()
        while self.steps < steps and time.monotonic() < until:
            index = torch.randint(len(self.labels), (self.batch_size,), generator=self.rng, device=DEVICE)
            t = torch.randint(self.generator.schedule.num_steps, (self.batch_size,), generator=self.rng, device=DEVICE)
            z0, y = to_signed(self.pixels[index]), self.labels[index]
            noise = torch.randn(z0.shape, generator=self.rng, device=DEVICE)
            dropped = drop_conditions(y, self.generator.null.to(DEVICE), self.dropout, self.rng)
            self.update(z0, y, dropped, t, noise)
            self.finetuner.ema.update(self.finetuner.trained)
            self.steps += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.monotonic() - began
        return self.steps == steps

    def _updated(self, z0: Tensor, y: Tensor, dropped: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        tuner = self.finetuner
        step = TrainingStep(
            tuner.engine.module, tuner.schedule, z0, y, dropped, t, noise, parametrisation=self.generator.parametrisation
        )
        loss = add_up(tuner.objectives, step).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def network(self) -> nn.Module:
        """The generator with the averaged parameters, in float32."""
        network = self.generator.load().to(DEVICE)
        choose_trained(self.generator, network, FinetuneConfig(parameters=self.finetuner.config.parameters))
        parameters = dict(network.named_parameters())
        with torch.no_grad():
            for name, value in self.finetuner.ema.average.items():
                parameters[name].copy_(value)
        return network.requires_grad_(False).eval()


class Kept:
    """The rows of ``OUT/results.json``, and the samples beside it."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.folder = Path(config.out)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def file(self, key: str) -> Path:
        return self.folder / "samples" / f"{key.replace(',', '').replace(' ', '-')}.safetensors"

    def add(self, key: str, row: dict[str, Any], images: list[Tensor] | None = None) -> None:
        if images is not None:
            save_file({"pixels": torch.stack(images).cpu()}, self.file(key))
        self.rows[key] = {**self.rows.get(key, {}), **row}
        self.path.write_text(json.dumps(self.rows, indent=1))
        shown = {name: value for name, value in row.items() if isinstance(value, float)}
        print(key, json.dumps(shown), file=sys.stderr, flush=True)


class Measure:
    """Measures networks and samples against the images."""

    def __init__(self, generator: Generator, images: Images, config: BenchmarkConfig) -> None:
        self.generator, self.images, self.config = generator, images, config
        self.phi = load_encoder(encoder_path(config.encoder)).to(DEVICE).eval().requires_grad_(False)
        self.real = [self._seen_by_phi(part)[0] for part in images.train]
        self.labels = generator.labels(images.names)

    def network(self, network: nn.Module, last: bool, guidance: float | None = None) -> tuple[dict[str, Any], list[Tensor]]:
        images = [self._sampled(network, label, guidance) for label in self.labels]
        instability = {"instability": self._instability(network)} if last and self.config.instability.images else {}
        return {**self.images_of_classes(images), **self._losses(network), **instability}, images

    def images_of_classes(self, images: list[Tensor]) -> dict[str, Any]:
        found: dict[str, list[float]] = {}
        for position, (pixels, real) in enumerate(zip(images, self.real, strict=True)):
            features, scores = self._seen_by_phi(pixels)
            measured = coverage(features, real)
            others = scores.clone()
            others[:, position] = -torch.inf
            margins = scores[:, position] - others.max(dim=1).values
            values = {
                "frechet": frechet(features, real), "precision": measured.precision, "recall": measured.recall or 0.0,
                "density": measured.density, "coverage": measured.coverage, "margin": margins.median().item(),
                "recognised": 100 * (margins > 0).double().mean().item(),
            }  # fmt: skip
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return {name: round(sum(values) / len(values), 5) for name, values in found.items()}

    @torch.inference_mode()
    def _seen_by_phi(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features and class scores, float64 on the CPU."""
        parts = [self.phi.look(to_signed(part.to(DEVICE))) for part in pixels.split(500)]
        features, scores = (torch.cat([part[which] for part in parts]).double().cpu() for which in (0, 1))
        return normalize(features, dim=1), scores

    @torch.inference_mode()
    def _sampled(self, network: nn.Module, label: int, guidance: float | None) -> Tensor:
        s, sampler = self.config.sampling, Sampler.registry[self.config.sampling.sampler]
        scale = s.cfg_scale if guidance is None else guidance
        predict = self.generator.predictor(network, label, 1, scale, s.cfg_channels, cfg_interval=s.cfg_interval)
        rngs = [generator_for(0, "image", label, index) for index in range(self.config.samples)]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=s.precision == "bf16"):
            found = [
                sample(
                    predict, self.generator.latent, part, self.generator.schedule, s.steps, sampler=sampler(s.of(sampler)),
                    clip=s.clip, device=DEVICE,
                )
                for part in (rngs[start : start + 100] for start in range(0, len(rngs), 100))
            ]  # fmt: skip
        return to_uint8(torch.cat(found)).cpu()

    def _held_out(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z_0, conditions, timesteps and noise for so many held-out images of each class."""
        z0 = to_signed(torch.cat([part[:number] for part in self.images.held_out])).to(DEVICE)
        y = torch.tensor(self.labels).repeat_interleave(number).to(DEVICE)
        t = (torch.linspace(0, 1, len(z0)) * (self.generator.schedule.num_steps - 1)).long()
        rng = generator_for(0, "held-out noise")
        t = t[torch.randperm(len(t), generator=rng)].to(DEVICE)
        return z0, y, t, torch.randn(z0.shape, generator=rng).to(DEVICE)

    @torch.no_grad()
    def _losses(self, network: nn.Module) -> dict[str, float]:
        z0, y, t, noise = self._held_out(min(50, self.config.held_out))
        step = TrainingStep(
            network, self.generator.schedule, z0, y, y, t, noise, parametrisation=self.generator.parametrisation
        )
        inversion = self.config.finetune.objectives.model_dump()["inversion_matching"]
        inverted = invert(step.predict, z0, t, self.generator.schedule, inversion["n_steps"], 0)
        found = {
            "diffusion": (step.predicted - step.target).square().mean(),
            "matching": inversion_matching_loss(inverted, step.z_t),
            "parallel": cosine_similarity(inverted.flatten(1), z0.flatten(1)).mean(),
        }
        return {name: round(value.item(), 5) for name, value in found.items()}

    def _instability(self, network: nn.Module) -> float:
        """Mean log of the instability coefficient over held-out images, which are measured as one batch."""
        c, schedule = self.config.instability, self.generator.schedule
        z0, y, _, _ = self._held_out(-(-c.images // len(self.labels)))
        z0, y = z0[: c.images], y[: c.images]

        def predict(z: Tensor, t_B: Tensor) -> Tensor:
            return epsilon_of(network(z, t_B, y), z, t_B, schedule, self.generator.parametrisation)

        last = schedule.respaced(c.steps)[-1].expand(len(z0)).to(DEVICE)
        with torch.no_grad():
            noise = invert(predict, z0, last, schedule, c.steps, 0)
        found = log_instability(
            predict, noise, schedule, c.steps, exact=False, probes=c.probes, lanczos_steps=c.lanczos_steps,
            generator=generator_for(0, "instability"),
        )  # fmt: skip
        return round(found.mean().item(), 5)


def benchmark(config: BenchmarkConfig) -> None:
    until = time.monotonic() + config.limit_s
    generator = open_generator(generator_path(config.generator))
    images, results = Images(config), Kept(config)
    measure = Measure(generator, images, config)
    wanted = {f"{name} {steps}": (name, steps) for steps in config.steps for name in names_of(config)}
    if REAL not in results.rows:
        real = [part[: config.samples] for part in images.train]
        results.add(REAL, measure.images_of_classes(real), real)
    plain = generator.load().to(DEVICE).requires_grad_(False)
    if PRETRAINED not in results.rows:
        results.add(PRETRAINED, *measure.network(plain, last=True))
    for guidance in config.guidances:
        if (key := f"{PRETRAINED}, guidance {guidance:g}") not in results.rows:
            results.add(key, *measure.network(plain, last=False, guidance=guidance))
    missing = {key: value for key, value in wanted.items() if key not in results.rows}
    runs = {
        name: Run(name, weight, seed, generator, images, config)
        for name, (weight, seed) in names_of(config).items()
        if name in [of for of, _ in missing.values()]
    }
    for key, (name, steps) in missing.items():
        if not runs[name].advance(steps, until):
            print(f"{key}: no time was left", file=sys.stderr, flush=True)
            continue
        row, samples = measure.network(runs[name].network(), last=steps == max(config.steps))
        results.add(key, {**row, "steps": steps, "run": name, "seconds": round(runs[name].seconds, 2)}, samples)
    if config.students:
        add_students(config, images, results)
    machine = {"device": DEVICE, "cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    settings = config.model_dump(mode="json", exclude={"data", "protocol", "figure", "out", "limit_s"})
    print(json.dumps({"machine": machine, "data": config.data.path, **settings, "results": results.rows}, indent=1))
    if config.figure:
        draw_figure(config, results.rows, config.figure)


def names_of(config: BenchmarkConfig) -> dict[str, tuple[float, int]]:
    """Name of each run → its λ_IM and the seed of its batches."""
    return {**{f"{weight:g}": (weight, 0) for weight in config.lambdas}, **({"0 again": (0.0, 1)} if config.again else {})}


def add_students(config: BenchmarkConfig, images: Images, results: Kept) -> None:
    """Train students on the samples of each measurement that has no accuracies, and test them on held-out training images."""
    missing = [key for key, row in results.rows.items() if len(row.get("accuracy", [])) < config.students]
    work = partial(accuracies, held_out=images.held_out, config=config)
    with multiprocessing.get_context("spawn").Pool(config.processes) as pool:
        for key, found in zip(missing, pool.imap(work, [results.file(key) for key in missing]), strict=True):
            results.add(key, {"accuracy": found})


def accuracies(path: Path, held_out: list[Tensor], config: BenchmarkConfig) -> list[float]:
    """Accuracy in per cent of each student that is trained on the samples in a file."""
    torch.set_num_threads(1)
    pixels = load_file(path)["pixels"][:, : config.k]
    chosen = pixels.flatten(0, 1), torch.arange(len(pixels)).repeat_interleave(pixels.shape[1])
    counts = torch.tensor([len(part) for part in held_out])
    test = torch.cat(held_out), torch.arange(len(counts)).repeat_interleave(counts)
    return [
        round(train_student("convnet-3", chosen, test, len(pixels), config.protocol, seed)[1].last, 2)
        for seed in range(config.students)
    ]


def draw_figure(config: BenchmarkConfig, rows: dict[str, dict[str, Any]], path: str) -> None:
    """Four measures against the number of steps, a line for each λ_IM."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ims3"  # the same bytes each time
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    titles = {
        "parallel": "cos(z_inv, z_0), held out", "frechet": "Fréchet distance of samples", "coverage": "coverage of samples",
        "recognised": "samples that φ recognises (%)",
    }  # fmt: skip
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        for name in names_of(config):
            points = [(row["steps"], row[measure]) for row in rows.values() if row.get("run") == name]
            axis.plot(*zip(*points, strict=True), "o-", label=f"λ = {name}", markersize=4)
        axis.axhline(rows[PRETRAINED][measure], color="black", linestyle=":", label="not fine-tuned")
        axis.set(title=title, xlabel="steps", xscale="log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
