"""Images picked from a source: sets that somebody else made, and the training images that are held out of a set to choose its
students' epoch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ims3_ray.artifacts import Artifact
from ims3_ray.config import DataConfig
from ims3_ray.data.classes import match_classes
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_pixels
from ims3_ray.errors import UserError
from ims3_ray.seeds import generator_for
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.sets import commit_set, spread, write_class


@dataclass(frozen=True)
class Source:
    """Where images are picked and where they go; ``whole`` says that each of them must be decodable."""

    data: DataConfig
    path: str
    split: str
    artifact: Artifact
    whole: bool


def run_given(context: Context, stage: Stage) -> None:
    """All images of a set, class by class, scaled and cropped as the real ones are. :class:`UserError` for one that cannot be
    decoded."""
    source = open_source(stage.places["path"], stage.places["split"])
    labels = match_classes(context.classes.names, source.class_names, stage.places["path"])
    _pick(context, stage, [np.flatnonzero(source.labels == label).tolist() for label in labels], whole=True)


def run_held_out(context: Context, stage: Stage) -> None:
    """Some training images of each class, the same for every run, so that equal sets are worth the same."""
    source, classes = open_source(stage.places["path"], stage.places["split"]), context.classes
    picked = []
    for position, label in enumerate(classes.source_labels):
        indices = np.flatnonzero(source.labels == label)
        drawn = torch.randperm(len(indices), generator=generator_for(0, "validation", position))
        picked.append(indices[drawn[: stage.params["per_class"]].numpy()].tolist())
    _pick(context, stage, picked, whole=False)


def _pick(context: Context, stage: Stage, indices: Sequence[list[int]], whole: bool) -> None:
    began, artifact = time.monotonic(), stage.artifact(context.storage)
    way = Source(context.config.data, stage.places["path"], stage.places["split"], artifact, whole)
    entries = spread(pick_classes, way, list(zip(stage.units, indices, strict=True)))
    commit_set(artifact, dict(zip(stage.units, entries, strict=True)), time.monotonic() - began)


def pick_classes(way: Source, classes: Sequence[tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Decode the images of some classes, (unit, indices) each, and write a shard for each class."""
    source, data = open_source(way.path, way.split), way.data
    entries = []
    for unit, indices in classes:
        pixels = []
        for index in indices:
            try:
                pixels.append(to_pixels(source.image(index), data.size, data.channels))
            except OSError as error:
                if way.whole:
                    name, reason = source.identify(index), str(error).splitlines()[0]
                    raise UserError(f"set '{way.path}': {name} cannot be decoded ({reason}); replace it") from error
        empty = np.zeros((0, data.channels, data.size, data.size), np.uint8)
        entries.append(write_class(way.artifact, unit, torch.from_numpy(np.stack(pixels) if pixels else empty)))
    return entries
