"""The command `ims3 schema`: the JSON schema of a config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ims3_ray.commands.table import COMMANDS, named
from ims3_ray.errors import UserError, not_there

EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Configs over which this file is laid.",
}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of the config of the command ``name``. Raises :class:`UserError` for one that has none."""
    known = [each for each, command in COMMANDS.items() if isinstance(command.tree, str)]
    if name not in known:
        raise UserError(not_there("command with a config", name, known))
    found: dict[str, Any] = named(COMMANDS[name].tree).model_json_schema()
    for section in (found, *found.get("$defs", {}).values()):
        section.pop("required", None)  # what a file leaves out may stand in one that it extends
        for field in section.get("properties", {}).values():
            for pattern, value in field.get("patternProperties", {}).items():  # a name of the mapping is removed by null
                field["patternProperties"][pattern] = {"anyOf": [value, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": f"ims3 {name}",
        "properties": {"extends": EXTENDS, **found["properties"]},
    }  # fmt: skip


def print_schema(words: Sequence[str]) -> None:
    """Print the schema of the command that the one word names; of ``distill`` without a word."""
    if len(words) > 1:
        raise UserError(f"'{words[1]}' is one word too many: ims3 schema takes the name of one command")
    print(json.dumps(schema_of(words[0] if words else "distill"), indent=2, ensure_ascii=False))
