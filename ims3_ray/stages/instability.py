"""The generator's instability coefficient (Eq. 12) at real images, before and after fine-tuning."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
import torch

from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.joining import own_device, placed
from ims3_ray.config import InstabilityConfig, RunConfig, WorkConfig, differing
from ims3_ray.diffusion.instability import log_instability
from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.schedule import spacing_version
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import commit_units, units_of
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.tasks import awaited
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage, as_json
from ims3_ray.models.generators.base import Generator
from ims3_ray.progress import Progress
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels, Pretrained
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.finetune import Finetune
from ims3_ray.stages.latents import read_images

SHARD = "instability.json"


@dataclass(eq=False)
class MeasureInstability(Stage):
    """Measures the coefficient. The only shard holds log Ē of each image, ``before`` and ``after`` fine-tuning."""

    name, settings = "instability", InstabilityConfig

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> MeasureInstability:
        """Plan the measurement for the fine-tuning of ``config``."""
        measured, finetune, models = config.instability, Finetune.plan(planner, config), planner.models(config)
        params: dict[str, Any] = {
            "instability": differing(measured), "seed": config.seed, "classes": list(models.labels),
            **spacing_version(measured.steps, "leading"),
        }  # fmt: skip
        return planner.add(
            cls(
                "instability (Eq. 12)", params, {"finetune": finetune, **finetune.inputs}, images=measured.images,
                flops=measured.images * instability_flops(models.generator, measured), weights=finetune.weights, config=config,
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus, config.actors.gpus)

    def run(self, context: Context) -> None:
        """Measure the generator before and after fine-tuning at the same images."""
        config, actors, storage = self.run_config.instability, context.config.actors, context.storage
        encode, latents = cast(Encode, self.inputs["encode"]), self.inputs.get("latents")
        labels = self.params["classes"]
        chosen = np.linspace(0, len(labels) - 1, min(config.images, len(labels))).round().astype(int)
        counts = np.bincount(np.arange(config.images) % len(chosen))
        classes = [
            (labels[i], units_of(encode.labels[i], 1, 1), int(n)) for i, n in zip(chosen, counts, strict=True)
        ]  # fmt: skip
        cluster, tuned = context.config.cluster, self.inputs["finetune"]
        measure = ray.remote(_measure).options(num_cpus=actors.cpus, num_gpus=actors.gpus, **placed(cluster, "pool"))
        watch = wait_for_capacity(cluster, "pool", self.title, [actors.resources])
        with Progress(self.title, config.images, "images") as progress:
            task = measure.remote(
                config, self.run_config.seed, Pretrained.of(tuned, storage), Adapters.of(tuned, storage),
                encode.store(storage), latents.artifact(storage) if latents else None, classes, actors.threads,
            )  # fmt: skip
            (result,) = awaited([task], self.title, watch)
            progress.done = config.images
        artifact = self.artifact(storage)
        artifact.write(SHARD, as_json(result, self.title))
        context.spend(self, progress.seconds)
        commit_units(artifact, {"result": {"images": config.images}}, progress.seconds)

    @classmethod
    def lost(cls, artifact: Artifact) -> list[str]:
        return [] if SHARD in artifact.shards() else ["result"]

    def results(self, storage: Storage) -> dict[str, Any]:
        """Geometric means over images of the coefficient before and after fine-tuning, and of the factor of its change."""
        logs = self.artifact(storage).read_json(SHARD)
        logs["change"] = [after - before for before, after in zip(logs["before"], logs["after"], strict=True)]
        found = {}
        for name, values in logs.items():
            mean, std = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            found[name] = {"coefficient": math.exp(mean), "log_mean": mean, "log_std": std}
        return {"instability": found}


def _measure(
    config: InstabilityConfig, seed: int, pretrained: Pretrained, adapters: Adapters, pixels: Any, latents: Any,
    classes: list[tuple[int, list[str], int]], threads: int,
) -> dict[str, list[float]]:  # fmt: skip
    """log Ē of each image, ``before`` and ``after``. It is measured class by class, since each may have its own adapter."""
    torch.set_num_threads(threads)
    device = own_device()
    found: dict[str, list[float]] = {"before": [], "after": []}
    both = {"before": GroupModels(pretrained, None, device), "after": GroupModels(pretrained, adapters, device)}
    for name, models in both.items():
        for label, units, count in classes:
            models.of_class(label).requires_grad_(False)
            images = read_images(pixels, latents, [(label, units)], flip=False)
            rng = generator_for(seed, "instability", label)
            z0 = images.batch(torch.randperm(len(images.labels), generator=rng)[:count], rng).to(device)
            predict, schedule = models.predictor(label, len(z0)), models.generator.schedule
            last = schedule.respaced(config.steps)[-1]
            noise = invert(predict, z0, last.expand(len(z0)).to(device), schedule, config.steps, 0)
            values = log_instability(
                predict, noise, schedule, config.steps, exact=z0[0].numel() <= config.exact_up_to, probes=config.probes,
                lanczos_steps=config.lanczos_steps, generator=rng,
            )  # fmt: skip
            found[name] += values.tolist()
    return found


def instability_flops(generator: Generator, config: InstabilityConfig) -> float:
    """Floating-point operations for one image, before and after fine-tuning together: inversion, sampling, and the derivatives
    (a forward-mode derivative costs two passes)."""
    values = math.prod(generator.latent)
    derivatives = values if values <= config.exact_up_to else 4 * config.probes * config.lanczos_steps
    return 2 * config.steps * (4 + derivatives) * generator.forward_flops()
