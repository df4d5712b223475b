"""Reads an existing set of images, made by another program or by this one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ims3_ray.config import DataConfig
from ims3_ray.data.classes import match_classes
from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources import Source, copies_noticed, open_source, shared_file
from ims3_ray.data.transforms import to_pixels
from ims3_ray.engine.inputs import source_params
from ims3_ray.engine.per_class import map_classes
from ims3_ray.engine.planner import Planner, pixel_bytes
from ims3_ray.engine.sets import commit_set, write_class
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.artifacts import Artifact


@dataclass(eq=False)
class ReadGiven(Stage):
    """Reads all images of a set, class by class, scaled and cropped like the real images."""

    name, version, makes_set = "given", 2, True

    data: DataConfig = field(default_factory=DataConfig)
    most: int = 0
    """Number of images of the largest class."""

    @classmethod
    def plan(cls, planner: Planner, title: str, path: str, data: DataConfig, k: int | None = None) -> ReadGiven:
        """Plan to read the set at ``path``. Every class must have ``k`` images, or any number above 0 if ``k`` is None."""
        source, names = open_source(path, "train"), planner.classes.names
        planner.data.tell(source.notices)
        if shared := shared_file(planner.data.test, source):
            raise UserError(
                f"set '{path}' has the test images ('{shared}'), so that students would be tested on what they were trained "
                "on; name a set of other images"
            )
        planner.data.tell(copies_noticed(source, planner.data.test, f"images of set '{path}'"))
        labels = match_classes(names, source.class_names, path)
        logits = source.extras([0]).get("logits")
        if logits is not None and logits.shape[1] != len(source.class_names):
            raise UserError(
                f"set '{path}' has soft labels of {logits.shape[1]} classes but names {len(source.class_names)}; correct them"
            )
        for name, label in zip(names, labels, strict=True):
            count = int((source.labels == label).sum())
            if not count:
                raise UserError(f"set '{path}' has no image of class '{name}'; add some, or leave it out of data.classes")
            if k is not None and count != k:
                raise UserError(
                    f"set '{path}' has {count} images of class '{name}', where {k} are compared; name a set of {k} a class, "
                    "with {k} in the path where there are several"
                )
        params = {
            **source_params(source, source.fingerprint), "names": list(source.class_names), "classes": list(names),
            "size": data.size, "channels": data.channels, **data.background_params,
        }  # fmt: skip
        return planner.add(
            cls(
                f"read {title}", params, units=planner.class_units(), images=len(source.labels), label=title,
                stored=pixel_bytes(len(source.labels), planner.work), data=data, has_logits=logits is not None,
                data_source=source,
                most=max(int((source.labels == label).sum()) for label in labels),
            )
        )  # fmt: skip

    def run(self, context: Context) -> None:
        """Decode and store all images. Raises :class:`UserError` for an image that cannot be decoded."""
        source = self.opened
        labels = match_classes(context.classes.names, source.class_names, source.location)
        indices = [np.flatnonzero(source.labels == label).tolist() for label in labels]
        pick(context, self, self.data, source, indices, labels)


@dataclass(frozen=True)
class _Picking:
    """Where images are read and where their shards are written."""

    data: DataConfig
    source: Source
    artifact: Artifact
    labels: Sequence[int] | None
    """Of a set: the source's label of each class, in the order of the classes. Every image must then be decodable, and its
    soft labels and weights are kept. None for images that are only tested on."""


def pick(
    context: Context, stage: Stage, data: DataConfig, source: Source, indices: Sequence[list[int]],
    labels: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Decode the images ``indices`` of each class of ``source`` and commit them as a set."""
    began, artifact = time.monotonic(), stage.artifact(context.storage)
    picking = _Picking(data, source, artifact, labels)
    entries = map_classes(context, stage.title, pick_classes, picking, list(zip(stage.units, indices, strict=True)))
    commit_set(artifact, dict(zip(stage.units, entries, strict=True)), time.monotonic() - began)


def pick_classes(picking: _Picking, classes: Sequence[tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Decode the images of some classes, given as (unit, indices), and write a shard for each class."""
    source, data = picking.source, picking.data
    entries = []
    for unit, indices in classes:
        pixels, broken = [], []
        for index in indices:
            try:
                pixels.append(to_pixels(source.image(index), data.size, data.channels, background=data.colour))
            except Undecodable as error:
                name, reason = source.identify(index), first_line(error)
                if picking.labels is not None:
                    raise UserError(f"set '{source.location}': {name} cannot be decoded ({reason}); replace it") from error
                broken.append(f"{name}: {reason}")
        empty = np.zeros((0, data.channels, data.size, data.size), np.uint8)
        more = {}
        if picking.labels is not None:
            more = {name: torch.from_numpy(values) for name, values in source.extras(indices).items()}
            if "logits" in more:  # in the order of the run's classes, which the source may have in another
                more["logits"] = more["logits"][:, list(picking.labels)]
        entry = write_class(picking.artifact, unit, torch.from_numpy(np.stack(pixels) if pixels else empty), **more)
        entries.append({**entry, "broken": broken} if broken else entry)
    return entries
