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
            if "." in str(key):
                raise UserError(
                    f"config key '{prefix}{key}' is written with dots; in a file write each part under the one before"
                )
            raise UserError(
                unknown_key(f"{prefix}{key}", list(_flat(whole, prefix.split("."))) + ([] if prefix else ["extends"]))
            )
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


COMMANDS = {
    "RunConfig": "distill", "CompareConfig": "compare", "SweepConfig": "sweep", "EvaluateConfig": "evaluate",
    "PretrainConfig": "pretrain",
}  # fmt: skip
"""Config class → the command that takes it."""


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The error message for a key that is not in ``known``: it says how the key is written, which key was meant, or which
    command has such a key."""
    if near := nearest(key, known):
        return f"unknown config key '{key}'; did you mean '{near}'?"
    if (top := key.partition(".")[0]) not in known:
        trees = json.loads(Path(__file__).with_name(KNOWN_KEYS).read_text("utf-8"))
        if others := [command for tree, command in COMMANDS.items() if top in trees.get(tree, ())]:
            return f"unknown config key '{key}'; it is a key of ims3 {', ims3 '.join(others)}, and this is another command"
    return f"unknown config key '{key}'; the command's --help lists the keys"


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that ``key`` may be a misspelling of: the most similar one of the same section, or of all."""
    parent = key.rpartition(".")[0]
    siblings = [each for each in known if each.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1) or difflib.get_close_matches(key, known, n=1)
    last = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
    return next(iter([*near, *last]), None)
