"""The captions of the real images that stages are made from."""

from __future__ import annotations

import numpy as np

from ims3_ray.config import RunConfig
from ims3_ray.data.captions import Captions
from ims3_ray.data.sources import open_source
from ims3_ray.engine.planner import Planner
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.stages.encode import Encode


def captions_hash(planner: Planner, config: RunConfig, key: str) -> str:
    """A hash of the captions of all training images, which the setting ``key`` asks for. Raises :class:`UserError` if there are
    none, or if one is missing."""
    if config.data.captions is None:
        raise UserError(
            f"{key}=captions needs the captions of the training images; name them by data.captions, or leave the arm out "
            "(arms.ddvlcp=null)"
        )
    return planner.data.captions_hash(config.data.captions)


def captions_by_class(images: Encode, config: RunConfig, storage: Storage) -> dict[int, list[str]]:
    """Source label of each class → the captions of its images that could be decoded, in their order."""
    assert config.data.captions is not None
    source = open_source(*images.place)
    captions, entries = Captions(config.data.captions, source), (images.manifest(storage) or {})["units"]
    broken = [text for unit in images.units for text in entries[unit]["broken"]]  # "name: reason"

    def decoded(label: int) -> list[int]:
        mine = np.flatnonzero(source.labels == label).tolist()
        return [index for index in mine if not any(text.startswith(f"{source.identify(index)}: ") for text in broken)]

    return {label: captions.of(decoded(label)) for label in images.labels}
