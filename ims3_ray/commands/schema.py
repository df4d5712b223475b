"""The command `ims3 schema`: the JSON schema of a config."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ims3_ray.errors import UserError

EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Configs over which this file is laid.",
}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of the config of the command ``name``. Raises :class:`UserError` for one that has none."""
    from ims3_ray.commands.table import COMMANDS

    known = [each for each, command in COMMANDS.items() if isinstance(command.tree, str)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"no command with a config is called '{name}'; {meant}there is: {', '.join(known)}")
    module, _, tree = COMMANDS[name].tree.partition(":")
    found: dict[str, Any] = getattr(import_module(module), tree).model_json_schema()
    for section in (found, *found.get("$defs", {}).values()):
        section.pop("required", None)  # what a file leaves out may stand in one that it extends
        for field in section.get("properties", {}).values():
            for pattern, named in field.get("patternProperties", {}).items():  # a name of the mapping is removed by null
                field["patternProperties"][pattern] = {"anyOf": [named, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": f"ims3 {name}",
        "properties": {"extends": EXTENDS, **found["properties"]},
    }  # fmt: skip


def print_schema(words: Sequence[str], dry_run: bool = False) -> None:
    """Print the schema of the command that the one word names; of ``distill`` without a word."""
    if len(words) > 1:
        raise UserError(f"'{words[1]}' is one word too many: ims3 schema takes the name of one command")
    print(json.dumps(schema_of(words[0] if words else "distill"), indent=2, ensure_ascii=False))
