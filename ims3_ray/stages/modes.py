"""Modes of each class's real images, towards which the sampling of candidates is guided (MGD3) or where it starts (D4M)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.steering.mode_guidance import find_modes
from ims3_ray.engine.per_class import each_unit
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import by_class, commit_units, note, pack_tensors, read_class
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.io.artifacts import Artifact
from ims3_ray.seeds import seed_for
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.latents import EncodeLatents, read_latents


@dataclass(frozen=True)
class _Search:
    pixels: Artifact
    latents: Artifact | None
    modes: Artifact
    k: int
    seed: int
    threads: int


@dataclass(eq=False)
class FindModes(Stage):
    """Finds the modes of each class. Every class has a shard ``class-NNNN.safetensors`` with ``modes`` [K, C, h, w] in the
    space that the generator works in, and ``counts`` int64 [K], the number of real images in each one's cluster."""

    name, version = "modes", 2

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> FindModes:
        """Plan to find K modes of each class's training images."""
        k = config.selection.images_per_class
        images = Encode.plan(planner, "train", config.data, k)
        inputs: dict[str, Stage] = {"images": images}
        if latents := EncodeLatents.plan(planner, config):
            inputs["latents"] = latents
        params = {"k": k, "seed": config.seed, "classes": list(planner.classes.names)}
        return planner.add(cls(f"find {k} modes", params, inputs, units=planner.class_units(), images=images.images))

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus)

    def run(self, context: Context) -> None:
        began, latents, storage = time.monotonic(), self.inputs.get("latents"), context.storage
        images = cast(Encode, self.inputs["images"])
        search = _Search(
            images.artifact(storage), latents.artifact(storage) if latents else None, self.artifact(storage), self.params["k"],
            self.params["seed"], context.config.actors.threads,
        )  # fmt: skip
        units = by_class(images.units)
        rows = {unit: (label, units[label]) for unit, label in zip(self.units, images.labels, strict=True)}
        commit_units(search.modes, each_unit(context, self, find_in_classes, search, rows), time.monotonic() - began)


def find_in_classes(search: _Search, classes: Sequence[tuple[str, tuple[int, list[str]]]]) -> None:
    """Cluster each class's images: the means of their unmirrored latents, or their pixels if there are no latents."""
    torch.set_num_threads(search.threads)
    for unit, (label, units) in classes:
        if search.latents is None:
            latents = to_signed(read_class(search.pixels, units, "pixels"))
        else:
            latents = read_latents(search.latents, units)["mean"][:, 0].float()
        modes, counts = find_modes(latents, search.k, seed_for(search.seed, "modes", label))
        packed = pack_tensors(modes=modes, counts=counts)
        entry: dict[str, Any] = {"sha256": search.modes.write(f"{unit}.safetensors", packed)}
        note(search.modes, unit, {**entry, "images": len(latents)})
