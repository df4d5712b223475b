"""The generator's instability coefficient (Eq. 12) at real images, before and after fine-tuning."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import ray
import torch

from ims3_ray.cluster import own_device, placed, results
from ims3_ray.config import InstabilityConfig
from ims3_ray.diffusion.instability import log_instability
from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.sampling import guided
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.progress import Progress
from ims3_ray.room import wait_for_room
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels
from ims3_ray.stages.base import Context, Stage, commit_units, units_of
from ims3_ray.stages.finetune import read_images
from ims3_ray.stages.weights import Weights

SHARD = "instability.json"


def run(context: Context, stage: Stage) -> None:
    """Measure both generators at the same images and commit log Ē of each."""
    config, actors, storage = stage.run.instability, context.config.actors, context.storage
    latents = stage.inputs.get("latents")
    chosen = np.linspace(0, len(context.classes.names) - 1, min(config.images, len(context.classes.names))).round().astype(int)
    counts = np.bincount(np.arange(config.images) % len(chosen))
    classes = [
        (context.classes.generator_labels[i], units_of(context.classes.source_labels[i], 1, 1), int(n))
        for i, n in zip(chosen, counts, strict=True)
    ]
    cluster = context.config.cluster
    measure = ray.remote(_measure).options(num_cpus=actors.cpus, num_gpus=actors.gpus, **placed(cluster, "pool"))
    presence = wait_for_room(cluster, "pool", stage.title, [actors.resources])
    with Progress(stage.title, config.images, "images") as progress:
        task = measure.remote(
            config, stage.run.seed, stage.weights["generator"], Adapters.of(stage.inputs["finetune"], storage),
            stage.inputs["encode"].artifact(storage), latents.artifact(storage) if latents else None, classes, actors.threads,
        )  # fmt: skip
        result = results(presence.first_done([task]))
        progress.done = config.images
    artifact = stage.artifact(storage)
    artifact.write(SHARD, json.dumps(result).encode())
    context.spend(stage, progress.seconds)
    commit_units(artifact, {"result": {"images": config.images}}, progress.seconds)


def _measure(
    config: InstabilityConfig, seed: int, weights: Weights, adapters: Adapters, pixels: Any, latents: Any,
    classes: list[tuple[int, list[str], int]], threads: int,
) -> dict[str, list[float]]:  # fmt: skip
    """log Ē of each image, ``before`` and ``after``; class by class, since each may have an adapter of its own."""
    torch.set_num_threads(threads)
    device = own_device()
    found: dict[str, list[float]] = {"before": [], "after": []}
    path = weights.path()
    for name, models in (("before", GroupModels(path, None, device)), ("after", GroupModels(path, adapters, device))):
        for label, units, count in classes:
            model = models.of_class(label).requires_grad_(False)
            images = read_images(pixels, latents, [(label, units)], flip=False)
            rng = generator_for(seed, "instability", label)
            z0 = images.batch(torch.randperm(len(images.labels), generator=rng)[:count], rng).to(device)
            predict, schedule = guided(model, torch.full((len(z0),), label, device=device), 0, 1.0), NoiseSchedule()
            last = schedule.respaced(config.steps)[-1]
            noise = invert(predict, z0, last.expand(len(z0)).to(device), schedule, config.steps, 0)
            values = log_instability(
                predict, noise, schedule, config.steps, exact=z0[0].numel() <= config.exact_up_to, probes=config.probes,
                lanczos_steps=config.lanczos_steps, generator=rng,
            )  # fmt: skip
            found[name] += values.tolist()
    return found
