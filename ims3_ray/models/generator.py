"""The pretrained generator: a DiT with the class table it was trained with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ims3_ray.data.files import local_copy
from ims3_ray.errors import UserError
from ims3_ray.models.checkpoints import weights_path
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.dit_files import find_diffusers, open_dit
from ims3_ray.models.hub import fetch, is_hub_id


def generator_path(reference: str) -> Path:
    """The weights file behind ``embedded:NAME``, a file, a diffusers pipeline folder, or a hub id (fetched to its cache).

    Raises :class:`UserError` where there is none.
    """
    folder = local_copy(reference)
    if not folder.exists() and is_hub_id(reference):
        folder = fetch(reference, ["model_index.json", "transformer/*"], "generator")
    if not folder.is_dir():
        return weights_path(reference)
    if (path := find_diffusers(folder)) is None:
        raise UserError(
            f"generator '{reference}' is a folder without a diffusers DiT (transformer/config.json and its weights)"
        )
    return path


def generator_config(path: Path) -> DiTConfig:
    return open_dit(path).config


def check_generator(path: Path) -> None:
    """:class:`UserError` naming the first tensor that does not fit the model; reads no weights."""
    open_dit(path).state(meta=True)


def load_generator(path: Path) -> DiT:
    """The DiT in ``path`` with its weights, float32, in evaluation mode."""
    file = open_dit(path)
    model = DiT(file.config)
    model.load_state_dict({name: tensor.float() for name, tensor in file.state().items()})
    return model.eval()


def class_indices(path: Path, class_names: Sequence[str]) -> list[int]:
    """The generator's label of each class, by name and never by position.

    Raises :class:`UserError` naming the nearest known class for one that the generator was not trained with.
    """
    known = open_dit(path).classes
    if not known:
        raise UserError(f"generator '{path.name}' does not name its classes; convert it with jobs/convert.py classes=FILE")
    indices = []
    for name in class_names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UserError(f"the generator '{path.name}' knows no class '{name}'; nearest: {', '.join(near)}")
        indices.append(known.index(name))
    return indices
