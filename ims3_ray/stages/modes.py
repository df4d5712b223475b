"""Modes of each class's real images, towards which the sampling of candidates is guided (MGD3) or where it starts (D4M,
DDVLCP)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.data.captions import Captions, caption_of_clusters
from ims3_ray.data.prompts import prompts_of
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.steering.modes import ByModes, Clustering, find_modes
from ims3_ray.engine.per_class import each_unit
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import by_class, commit_units, note, pack_tensors, read_class
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
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
    how: Clustering


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
        images = Encode.plan(planner, "train", planner.models(config).data, k)
        inputs: dict[str, Stage] = {"images": images}
        if latents := EncodeLatents.plan(planner, config):
            inputs["latents"] = latents
        params: dict[str, Any] = {"k": k, "seed": config.seed, "classes": list(planner.classes.names)}
        how = clustering_of(config)
        params |= {name: value for name, value in asdict(how).items() if value != getattr(Clustering(), name)}
        if how.common is not None:
            names = planner.classes.names
            params |= {"captions": captions_hash(planner, config), "words": list(prompts_of(names, config.data.prompts))}
        return planner.add(
            cls(f"find {k} modes", params, inputs, units=planner.class_units(), images=images.images, config=config)
        )

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus)

    def run(self, context: Context) -> None:
        began, latents, storage = time.monotonic(), self.inputs.get("latents"), context.storage
        images = cast(Encode, self.inputs["images"])
        search = _Search(
            images.artifact(storage), latents.artifact(storage) if latents else None, self.artifact(storage), self.params["k"],
            self.params["seed"], context.config.actors.threads, clustering_of(self.run_config),
        )  # fmt: skip
        units = by_class(images.units)
        rows = {unit: _Class(label, units[label]) for unit, label in zip(self.units, images.labels, strict=True)}
        if search.how.common is not None:
            captions = captions_by_class(images, self.run_config, storage)
            for (unit, each), words in zip(rows.items(), self.params["words"], strict=True):
                rows[unit] = replace(each, words=words, captions=captions[each.label])
        commit_units(search.modes, each_unit(context, self, find_in_classes, search, rows), time.monotonic() - began)


def clustering_of(config: RunConfig) -> Clustering:
    """How the steering of an arm finds its modes."""
    steering = config.sampling.steering
    return steering.clustering(config.sampling.of(steering)) if steering and issubclass(steering, ByModes) else Clustering()


def captions_hash(planner: Planner, config: RunConfig) -> str:
    """A hash of the captions of all training images. Raises :class:`UserError` if there are none, or too few."""
    if config.data.captions is None:
        raise UserError(
            "sampling.prototypes.words=captions needs the captions of the training images; name them by data.captions, or "
            "leave the arm out (arms.ddvlcp=null)"
        )
    source = planner.data.train
    wanted = np.flatnonzero(np.isin(source.labels, planner.classes.source_labels)).tolist()
    texts = Captions(config.data.captions, source).of(wanted)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def captions_by_class(images: Encode, config: RunConfig, storage: Storage) -> dict[int, list[str]]:
    """Source label of each class → the captions of its images that could be decoded, in their order."""
    assert config.data.captions is not None
    source = open_source(*images.place)
    captions, entries = Captions(config.data.captions, source), (images.manifest(storage) or {})["units"]
    broken = {text.partition(": ")[0] for unit in images.units for text in entries[unit]["broken"]}
    return {
        label: captions.of(
            [index for index in np.flatnonzero(source.labels == label).tolist() if source.identify(index) not in broken]
        )
        for label in images.labels
    }


def find_in_classes(search: _Search, classes: Sequence[tuple[str, _Class]]) -> None:
    """Cluster each class's images: the means of their unmirrored latents, or their pixels if there are no latents."""
    torch.set_num_threads(search.threads)
    for unit, each in classes:
        if search.latents is None:
            latents = to_signed(read_class(search.pixels, each.units, "pixels"))
        else:
            latents = read_latents(search.latents, each.units)["mean"][:, 0].float()
        found = find_modes(latents, search.k, seed_for(search.seed, "modes", each.label), search.how)
        tensors = {"modes": found.centres, "counts": found.counts}
        if each.captions is not None and search.how.common is not None:
            chosen = caption_of_clusters(each.captions, found.clusters.tolist(), search.k, each.words, search.how.common)
            tensors["captions"] = torch.tensor(list(json.dumps(chosen).encode()), dtype=torch.uint8)
        packed = pack_tensors(**tensors)
        entry: dict[str, Any] = {"sha256": search.modes.write(f"{unit}.safetensors", packed)}
        note(search.modes, unit, {**entry, "images": len(latents)})
