"""Modes of each class's real images, to which candidates are guided (MGD3)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ims3_ray.artifacts import Artifact
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.mode_guidance import find_modes
from ims3_ray.seeds import seed_for
from ims3_ray.stages.base import Context, Stage, by_class, commit_units, pack_tensors, read_class
from ims3_ray.stages.derived import read_latents
from ims3_ray.stages.sets import each_class, note


@dataclass(frozen=True)
class _Search:
    pixels: Artifact
    latents: Artifact | None
    modes: Artifact
    k: int
    seed: int
    threads: int


def run(context: Context, stage: Stage) -> None:
    """A shard ``class-NNNN.safetensors`` each with ``modes`` [K, C, h, w] in the space that the generator works in."""
    began, latents, storage = time.monotonic(), stage.inputs.get("latents"), context.storage
    encode = stage.inputs["images"]
    shared = _Search(
        encode.artifact(storage), latents.artifact(storage) if latents else None, stage.artifact(storage), stage.params["k"],
        stage.params["seed"], context.config.actors.threads,
    )  # fmt: skip
    units = by_class(encode.units)
    rows = [(label, units[label]) for label in context.classes.source_labels]
    entries = each_class(context, stage, find_in_classes, shared, rows)
    commit_units(shared.modes, entries, time.monotonic() - began)


def find_in_classes(search: _Search, classes: Sequence[tuple[str, tuple[int, list[str]]]]) -> None:
    """Cluster each class's latents: the means of the autoencoder's, unmirrored, or pixels."""
    torch.set_num_threads(search.threads)
    for unit, (label, units) in classes:
        if search.latents is None:
            latents = to_signed(read_class(search.pixels, units, "pixels"))
        else:
            latents = read_latents(search.latents, units)["mean"][:, 0].float()
        modes = find_modes(latents, search.k, seed_for(search.seed, "modes", label))
        entry: dict[str, Any] = {"sha256": search.modes.write(f"{unit}.safetensors", pack_tensors(modes=modes))}
        note(search.modes, unit, {**entry, "images": len(latents)})
