"""The command `ims3 configs`: the configs that come with the package."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from itertools import takewhile

from ims3_ray.config.files import CONFIGS, config_names
from ims3_ray.errors import UserError

NARROWEST = 80
"""Columns of a line, at least."""
TABLES = "paper/"
"""Where the tables of the paper are, which are not for ``--config`` but for ``ims3 reproduce``, which lists them."""


def described(beginning: str = "") -> list[tuple[str, str]]:
    """Name and first sentence of each config whose name has this ``beginning``. Raises :class:`UserError` if there is none."""
    names = [name for name in config_names() if name.startswith(beginning) and not name.startswith(TABLES)]
    if not names:
        raise UserError(f"no config has a name that begins with '{beginning}'; ims3 configs lists all of them")
    return [(name, _first_sentence((CONFIGS / f"{name}.yaml").read_text("utf-8"))) for name in names]


def _first_sentence(text: str) -> str:
    """The first sentence of the comment with which a config begins."""
    lines = (line.removeprefix("#") for line in takewhile(lambda line: line.startswith("#"), text.splitlines()))
    comment = " ".join(line.strip() for line in lines if not line.startswith("   "))  # such lines are commands
    return re.split(r"\.\s+(?=[A-Z]|docs/)|: docs/|: ims3 ", comment, maxsplit=1)[0].rstrip(".:")


def print_configs(words: Sequence[str]) -> None:
    """Print the configs whose names begin with the one word; all of them without a word."""
    if len(words) > 1:
        raise UserError(f"'{words[1]}' is one word too many: ims3 configs takes the beginning of a name")
    found = described(words[0] if words else "")
    left = max(len(name) for name, _ in found) + 2
    width = max(NARROWEST, shutil.get_terminal_size((120, 24)).columns)
    for name, meaning in found:
        print(textwrap.fill(meaning, width, initial_indent=name.ljust(left), subsequent_indent=" " * left))
