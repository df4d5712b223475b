"""The pretrained generator: a DiT with the class table it was trained with."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from ims3_ray.errors import UserError
from ims3_ray.models.checkpoints import load_into, read_metadata
from ims3_ray.models.dit import DiT, DiTConfig


def generator_config(path: Path) -> DiTConfig:
    return DiTConfig.model_validate(json.loads(read_metadata(path, "dit")["config"]))


def load_generator(path: Path) -> DiT:
    """The DiT in ``path`` with its weights, in evaluation mode."""
    model = DiT(generator_config(path))
    load_into(model, path)
    return model.eval()


def class_indices(path: Path, class_names: Sequence[str]) -> list[int]:
    """The generator's label of each class, by name and never by position.

    Raises :class:`UserError` naming the nearest known class for one that the generator was not trained with.
    """
    known = read_metadata(path, "dit").get("classes", "").split("\n")
    indices = []
    for name in class_names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UserError(f"the generator '{path.name}' knows no class '{name}'; nearest: {', '.join(near)}")
        indices.append(known.index(name))
    return indices
