"""The settings of a config class as rows (key, default, meaning) and as a tree of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ims3_ray.component import descriptions_of
from ims3_ray.config.base import Section, canonical


def options_of(tree: type[Section]) -> list[tuple[str, str, str]]:
    """:func:`rows_of` a config class, without the options that have no effect in its command."""
    return [row for row in rows_of(tree()) if row[0] not in tree.replaced]


def rows_of(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default (as YAML) and meaning of every setting of a section; ``NAME`` stands for names that a config chooses."""
    for name, description in descriptions_of(section).items():
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield from rows_of(value, f"{key}.")
        elif isinstance(value, dict) and value and all(isinstance(inner, Section) for inner in value.values()):
            yield f"{key}.NAME", ", ".join(value), description
            yield from rows_of(_typical(next(iter(value.values()))), f"{key}.NAME.")
        else:
            shown = yaml.safe_dump(canonical(section)[name], default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            yield key, shown, description
            if value is None and (optional := _optional(section, name)) is not None:
                yield from rows_of(optional, f"{key}.")


def _optional(section: BaseModel, name: str) -> Section | None:
    """The section, with its defaults, that the field may have in place of None; None if it is of another kind."""
    kinds = [kind for kind in get_args(type(section).model_fields[name].annotation) if isinstance(kind, type)]
    sections = [kind for kind in kinds if issubclass(kind, Section)]
    try:
        return sections[0]() if sections else None
    except ValidationError:  # some of its fields have no defaults
        return None


def _typical(section: Section) -> Section:
    """A section of the same class with default values, or ``section`` itself if some field has no default."""
    try:
        return type(section)()
    except ValidationError:
        return section


def key_tree(section: BaseModel) -> dict[str, Any]:
    """Key → the keys below it, where ``*`` stands for names that a config chooses; None if the value is not checked for
    keys."""
    found: dict[str, Any] = {}
    for name in descriptions_of(section):
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found[name] = key_tree(value)
        elif value is None and (optional := _optional(section, name)) is not None:
            found[name] = key_tree(optional)
        elif isinstance(value, dict) and value and all(isinstance(inner, Section) for inner in value.values()):
            found[name] = {"*": key_tree(next(iter(value.values())))}
        else:
            found[name] = None
    return found
