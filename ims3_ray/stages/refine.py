"""Refinement of the chosen images by the generator that they come from (CaO2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device
from ims3_ray.config import RefineConfig, SamplingConfig
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.diffusion.refinement import refine
from ims3_ray.diffusion.sampling import guided
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.autoencoder import load_autoencoder
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.images import DTYPES, Decoder, ImageStore
from ims3_ray.stages.select import class_units
from ims3_ray.stages.sets import commit_set, each_class, note, write_class
from ims3_ray.stages.weights import Weights


@dataclass(frozen=True)
class _Way:
    config: RefineConfig
    sampling: SamplingConfig
    generator: Weights
    autoencoder: Weights | None
    adapters: Adapters | None
    chosen: Artifact
    pool: Artifact | None
    """Where the latents of all candidates are; None if they are not kept."""
    refined: Artifact
    seed: int
    threads: int


def run(context: Context, stage: Stage) -> None:
    """Optimise the images of each class and commit them as a set of their own."""
    began, storage, actors = time.monotonic(), context.storage, context.config.actors
    source, tuned = stage.inputs["set"].inputs["images"], stage.inputs.get("finetune")
    kept = ImageStore.of(source, storage)
    way = _Way(
        stage.run.refine, stage.run.sampling, stage.weights["generator"], stage.weights.get("autoencoder"),
        Adapters.of(tuned, storage) if tuned else None, stage.inputs["set"].artifact(storage),
        kept.artifact if kept.form == "latents" else None, stage.artifact(storage), stage.run.seed, actors.threads,
    )  # fmt: skip
    rows = [(units.label, units.first) for units in class_units(context, source, stage.run.pool_size)]
    entries = each_class(context, stage, refine_classes, way, rows, actors.gpus)
    commit_set(way.refined, entries, time.monotonic() - began)


def refine_classes(way: _Way, classes: Sequence[tuple[str, tuple[int, dict[str, int]]]]) -> None:
    """Each image is refined with noise seeded by (run seed, class, index of the candidate) alone."""
    torch.set_num_threads(way.threads)
    device, schedule = own_device(), NoiseSchedule()
    models = GroupModels(way.generator.path(), way.adapters, device, DTYPES[way.sampling.precision])
    decoder = Decoder(way.autoencoder.path(), device, way.sampling.precision) if way.autoencoder else None
    how = dict(way.config)
    how.pop("batch_size")
    for unit, (label, first) in classes:
        chosen = load(way.chosen.read(f"{unit}.safetensors"))
        model = models.of_class(label).requires_grad_(False)
        refined = []
        starts, indices = _latents(way, chosen, first, device), chosen["indices"]
        for z0, part in zip(starts.split(way.config.batch_size), indices.split(way.config.batch_size), strict=True):
            predict = guided(model, torch.full((len(z0),), label, device=device), model.config.null_label, 1.0)
            rngs = [generator_for(way.seed, "refine", label, index) for index in part.tolist()]
            refined.append(refine(predict, z0.to(device), schedule, rngs, **how))
        z = torch.cat(refined)
        pixels = to_uint8(z).cpu() if decoder is None else decoder(z).cpu()
        note(way.refined, unit, write_class(way.refined, unit, pixels, indices=indices))


def _latents(way: _Way, chosen: dict[str, Tensor], first: dict[str, int], device: str) -> Tensor:
    """Of the chosen images: as they were sampled where those are kept, encoded again where not; pixels without autoencoder."""
    if way.autoencoder is None:
        return to_signed(chosen["pixels"])
    if way.pool is None:
        with torch.inference_mode():
            encode = load_autoencoder(way.autoencoder.path()).to(device).moments
            return torch.cat([encode(to_signed(part.to(device)))[0].cpu() for part in chosen["pixels"].split(8)]).clone()
    at = {start: unit for unit, start in first.items()}
    found = []
    for index in chosen["indices"].tolist():
        start = max(s for s in at if s <= index)
        found.append(load(way.pool.read(f"{at[start]}.safetensors"))["latents"][index - start])
    return torch.stack(found).float()
