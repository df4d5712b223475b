"""Sets of images that somebody else made."""

from __future__ import annotations

import time

import numpy as np
import torch

from ims3_ray.data.classes import folder_name
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_pixels
from ims3_ray.errors import UserError
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.sets import commit_set, write_class


def run(context: Context, stage: Stage) -> None:
    """Read the images, scaled and cropped as the real ones are, class by class.

    Classes are found by name, or by the name that a folder of theirs gets; :class:`UserError` for one without images, one that
    the real data do not have, and an image that cannot be decoded.
    """
    began, data, artifact = time.monotonic(), context.config.data, stage.artifact(context.storage)
    source = open_source(stage.places["path"], "train")
    labels = match_classes(context.classes.names, source.class_names, stage.places["path"])
    entries = {}
    for unit, name, label in zip(stage.units, context.classes.names, labels, strict=True):
        indices = np.flatnonzero(source.labels == label).tolist()
        if not indices:
            raise UserError(
                f"set '{stage.places['path']}' has no image of class '{name}'; add some, or leave it out of data.classes"
            )
        pixels = []
        for index in indices:
            try:
                pixels.append(to_pixels(source.image(index), data.size, data.channels))
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"set '{stage.places['path']}': {source.identify(index)} cannot be decoded ({reason}); replace it"
                ) from error
        entries[unit] = write_class(artifact, unit, torch.from_numpy(np.stack(pixels)))
    commit_set(artifact, entries, time.monotonic() - began)


def match_classes(wanted: tuple[str, ...], found: tuple[str, ...], where: str) -> list[int]:
    """Position in ``found`` of each class that is ``wanted``: by name, or by the name that its folder has."""
    positions = {name: position for position, name in enumerate(found)}
    labels = []
    for name in wanted:
        label = positions.get(name, positions.get(folder_name(name)))
        if label is None:
            raise UserError(
                f"set '{where}' has no class '{name}'; it has {', '.join(found[:10])}{' …' if len(found) > 10 else ''}"
            )
        labels.append(label)
    if extra := set(found) - {found[label] for label in labels}:
        raise UserError(
            f"set '{where}' has a class '{min(extra)}' that the real data do not have; remove it or set data.classes"
        )
    return labels
