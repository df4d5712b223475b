"""Opens the pretrained generator that a reference names, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ims3_ray.errors import UserError
from ims3_ray.io.files import local_copy
from ims3_ray.io.hub import fetch, is_hub_id
from ims3_ray.models.checkpoints import weights_path
from ims3_ray.models.generators.base import Generator
from ims3_ray.models.generators.dit import OWN_GENERATOR
from ims3_ray.models.generators.stable_diffusion import INDEX, StableDiffusion


def generator_path(reference: str) -> Path:
    """The weights file that a reference names: ``embedded:NAME``, a file, a folder as its family stores it, or a hub id
    (downloaded to the hub's cache).

    Raises :class:`UserError` if there is none.
    """
    families = list(Generator.registry.values())
    folder = local_copy(reference)
    if not folder.exists() and is_hub_id(reference):
        folder = fetch(reference, [INDEX, OWN_GENERATOR], "generator")
        chosen = [family for family in families if family.find(folder)] or [each for each in families if not each.takes_words]
        folder = fetch(reference, [pattern for family in chosen for pattern in family.hub_files], "generator")
    if not folder.is_dir():
        return weights_path(reference)
    for family in families:
        if (path := family.find(folder)) is not None:
            return path
    raise UserError(
        f"generator '{reference}' is a folder without {OWN_GENERATOR}, a diffusers DiT (transformer/config.json and its "
        f"weights) and a pipeline of Stable Diffusion 1 or 2{StableDiffusion.describe(folder)}"
    )


def open_generator(path: Path) -> Generator:
    """The description of the generator in ``path``. If no family can read it, raises the :class:`UserError` of the family whose
    layout its folder has, or else of the first family."""
    errors = {}
    for family in Generator.registry.values():
        try:
            return family.open(path)
        except UserError as error:
            errors[family] = error
    raise next((error for family, error in errors.items() if family.find(path.parent) == path), next(iter(errors.values())))


def generator_files(path: Path) -> Sequence[Path]:
    """The files that the generator in ``path`` depends on."""
    return open_generator(path).parts


def load_generator(path: Path) -> nn.Module:
    """The network in ``path`` with its weights, float32, in evaluation mode."""
    return open_generator(path).load()
