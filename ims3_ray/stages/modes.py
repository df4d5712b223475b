"""Modes of each class's real images, towards which the sampling of candidates is guided (MGD3) or where it starts (D4M,
DDVLCP)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch

from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.data.captions import caption_of_clusters
from ims3_ray.data.prompts import words_of_name
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.steering.modes import ByModes, Clustering, find_modes
from ims3_ray.engine.images import ImageStore
from ims3_ray.engine.per_class import each_unit
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import by_class, commit_units, note, pack_tensors
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.io.artifacts import Artifact
from ims3_ray.seeds import seed_for
from ims3_ray.stages.captions import captions_by_class, captions_hash
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.latents import EncodeLatents, read_latents


@dataclass(frozen=True)
class _Search:
    pixels: ImageStore
    latents: Artifact | None
    modes: Artifact
    k: int
    seed: int
    threads: int
    how: Clustering
    common: float | None


@dataclass(frozen=True)
class _Class:
    """A class whose modes are looked for."""

    label: int
    units: list[str]
    """The units of its real images."""
    words: str = ""
    """Words that name the class."""
    captions: list[str] | None = None
    """The caption of each image, if captions are asked for."""


@dataclass(eq=False)
class FindModes(Stage):
    """Finds the modes of each class. Every class has a shard ``class-NNNN.safetensors`` with ``modes`` [K, C, h, w] in the
    space that the generator works in, ``counts`` int64 [K], the number of real images in each one's cluster, and, if captions
    are asked for, ``captions`` uint8 [n], the JSON list of the K texts."""

    name, version = "modes", 2

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> FindModes:
        """Plan to find K modes of each class's training images."""
        k = config.selection.images_per_class
        how, common = clustering_of(config), common_words_of(config)
        images = Encode.plan(planner, "train", planner.models(config).data_at_its_size, how.needed(k))
        inputs: dict[str, Stage] = {"images": images}
        if latents := EncodeLatents.plan(planner, config):
            inputs["latents"] = latents
        params: dict[str, Any] = {"k": k, "seed": config.seed, "classes": list(planner.classes.names)}
        params |= {name: value for name, value in asdict(how).items() if value != getattr(Clustering(), name)}
        if common is not None:
            words = [words_of_name(name) for name in planner.classes.names]
            captions = captions_hash(planner, config, "sampling.prototypes.words")
            params |= {"common": common, "captions": captions, "words": words}
        return planner.add(
            cls(f"find {k} modes", params, inputs, units=planner.class_units(), images=images.images, config=config)
        )

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus)

    def run(self, context: Context) -> None:
        began, latents, storage = time.monotonic(), self.inputs.get("latents"), context.storage
        images = cast(Encode, self.inputs["images"])
        search = _Search(
            images.store(storage), latents.artifact(storage) if latents else None, self.artifact(storage), self.params["k"],
            self.params["seed"], context.config.actors.threads, clustering_of(self.run_config),
            common_words_of(self.run_config),
        )  # fmt: skip
        units = by_class(images.units)
        rows = {unit: _Class(label, units[label]) for unit, label in zip(self.units, images.labels, strict=True)}
        if search.common is not None:
            captions = captions_by_class(images, self.run_config, storage)
            for (unit, each), words in zip(rows.items(), self.params["words"], strict=True):
                rows[unit] = replace(each, words=words, captions=captions[each.label])
        commit_units(search.modes, each_unit(context, self, find_in_classes, search, rows), time.monotonic() - began)


def clustering_of(config: RunConfig) -> Clustering:
    """How the steering of an arm finds its modes."""
    steering = config.sampling.steering
    return steering.clustering(config.sampling.of(steering)) if steering and issubclass(steering, ByModes) else Clustering()


def common_words_of(config: RunConfig) -> float | None:
    """The share of captions by which words are told apart, if the samples of an arm are told captions."""
    steering = config.sampling.steering
    return steering.common_words(config.sampling.of(steering)) if steering and issubclass(steering, ByModes) else None


def find_in_classes(search: _Search, classes: Sequence[tuple[str, _Class]]) -> None:
    """Cluster each class's images: the means of their unmirrored latents, or their pixels if there are no latents."""
    torch.set_num_threads(search.threads)
    for unit, each in classes:
        if search.latents is None:
            latents = to_signed(search.pixels.read_units(each.units))
        else:
            latents = read_latents(search.latents, each.units)["mean"][:, 0].float()
        found = find_modes(latents, search.k, seed_for(search.seed, "modes", each.label), search.how)
        tensors = {"modes": found.centres, "counts": found.counts}
        if each.captions is not None and search.common is not None:
            if len(each.captions) != len(latents):
                raise ValueError(f"{len(each.captions)} captions of {len(latents)} images")
            chosen = caption_of_clusters(each.captions, found.clusters.tolist(), search.k, each.words, search.common)
            tensors["captions"] = torch.tensor(list(json.dumps(chosen).encode()), dtype=torch.uint8)
        packed = pack_tensors(**tensors)
        entry: dict[str, Any] = {"sha256": search.modes.write(f"{unit}.safetensors", packed)}
        note(search.modes, unit, {**entry, "images": len(latents)})
