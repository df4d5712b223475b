"""What is known of the keys before anything slow is loaded, so that help and the error for a misspelt key appear at once.

``known_keys.json`` and ``described_keys.json`` hold it; ``python -m ims3_ray.commands.reference`` writes them from the classes.
Values, and the keys of plugins, are checked when the config is built.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ims3_ray.errors import UserError

KNOWN_KEYS, DESCRIBED_KEYS = "known_keys.json", "described_keys.json"


def described_keys(tree: str) -> list[tuple[str, str, str]]:
    """Key, default and meaning of every setting of the config class ``tree``; an empty list for a class that is not on
    record."""
    found = json.loads(Path(__file__).with_name(DESCRIBED_KEYS).read_text("utf-8"))
    main = next(iter(found.values()))
    return [tuple(main[row] if isinstance(row, int) else row) for row in found.get(tree, ())]


def check_keys(tree: str, values: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` for a key of ``values`` that the config class ``tree`` does not have.

    Nothing is checked if ``values`` name plugins, because their components may have keys of their own, nor for a class that is
    not on record.
    """
    known = json.loads(Path(__file__).with_name(KNOWN_KEYS).read_text("utf-8")).get(tree)
    if known is not None and not values.get("plugins"):
        _check(known, known, values, "")


def _check(whole: Mapping[str, Any], known: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        if key not in known and "*" not in known:
            raise UserError(unknown_key(f"{prefix}{key}", list(_flat(whole, prefix.split(".")))))
        below = known[key] if key in known else known["*"]
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            _check(whole, below, value, f"{prefix}{key}.")


def _flat(known: Mapping[str, Any], path: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of ``known``. A ``*`` stands for a name that a config chooses; it becomes the name at the same
    position in ``path`` if there is one, otherwise ``NAME``."""
    for key, below in known.items():
        name = (path[0] if path and path[0] else "NAME") if key == "*" else key
        yield f"{prefix}{name}"
        if isinstance(below, Mapping):
            rest = path[1:] if path and path[0] == name else []
            yield from _flat(below, rest, f"{prefix}{name}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The error message for a key that is not in ``known``. It suggests the most similar known key."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    parent = key.rpartition(".")[0]
    siblings = [each for each in known if each.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6) or near
    return f"unknown config key '{key}'; did you mean '{near[0]}'?"
