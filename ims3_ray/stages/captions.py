"""The captions of the real images that stages are made from."""

from __future__ import annotations

from ims3_ray.config import RunConfig
from ims3_ray.data.captions import Captions
from ims3_ray.engine.planner import Planner
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.stages.encode import Encode, decoded_indices


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
    captions = Captions(config.data.captions, images.opened)
    return {label: captions.of(indices) for label, indices in decoded_indices(images, storage).items()}
