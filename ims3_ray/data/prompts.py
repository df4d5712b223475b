"""What a generator that is told words is told of each class."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ims3_ray.data.classes import composed
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.files import local_copy

WNID = re.compile(r"n\d{8}")


def prompts_of(class_names: Sequence[str], file: str | None) -> tuple[str, ...]:
    """The prompt of each class: from ``file``, a YAML or JSON mapping of class names to prompts, or else by
    :func:`words_of_name`.

    Raises :class:`UserError` for a file that cannot be read, and for a class that it does not name.
    """
    given = _read(local_copy(file)) if file is not None else {name: words_of_name(name) for name in class_names}
    for name in class_names:
        if name not in given:
            near = difflib.get_close_matches(name, list(given), n=1, cutoff=0.6)
            hint = f" (it has '{near[0]}')" if near else ""
            raise UserError(f"data.prompts '{file}' has no prompt for class '{name}'{hint}; add a line '{name}: …'")
    return tuple(given[name] for name in class_names)


def words_of_name(name: str) -> str:
    """A prompt for a class of which nothing but the name is known: ImageNet's words for a wnid ("tench, Tinca tinca"), as D4M
    takes them, or the name with spaces between its words."""
    if WNID.fullmatch(name):
        from timm.data import ImageNetInfo

        try:
            return str(ImageNetInfo("imagenet-22k").label_name_to_description(name))
        except KeyError:
            return name
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").split())


def _read(path: Path) -> Mapping[str, str]:
    try:
        found = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader)  # names and texts as they are written
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"data.prompts '{path}' cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"data.prompts '{path}' must map the name of each class to a text")
    return {composed(name): text for name, text in found.items()}
