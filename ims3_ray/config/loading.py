"""Builds a config from what a user writes, the defaults and the settings of plugins, with errors of one line that name the
fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ims3_ray import plugins
from ims3_ray.component import first_error
from ims3_ray.config import Section, canonical, merge
from ims3_ray.config.files import check_moved, read_values
from ims3_ray.config.keys import unknown_key
from ims3_ray.config.written import typed
from ims3_ray.errors import UserError, masked

Tree = TypeVar("Tree", bound=Section)


def load_config(tree: type[Tree], file: str | Path | Sequence[str] | None = None, overrides: Iterable[str] = ()) -> Tree:
    """Build ``tree`` from YAML files and ``dotted.key=value`` overrides, each merged over those before it and all over the
    defaults.

    Raises :class:`UserError` with one line for an unreadable file, an unknown key or an impossible value.
    """
    return build(tree, read_values(file, overrides))


def build(tree: type[Tree], values: Mapping[str, Any]) -> Tree:
    """Build ``tree`` from nested mappings, merged over the defaults; it raises the errors of :func:`load_config`.

    The plugins that ``values`` name are loaded first, so that ``tree`` has the settings of their components.
    """
    check_moved(values)
    named = typed(str | list[str] | None, values.get("plugins")) or []
    if isinstance(named, str):
        named = [named]
        values = {**values, "plugins": named}
    plugins.load(named)
    values = typed(tree, values)
    merged = _without_removed(_with_whole(merge(_defaults(tree), values), values))
    try:
        return tree.model_validate(merged)
    except ValidationError as error:
        raise UserError(_one_line(tree, error)) from error


NAMED = ("arms", "cluster.place", "evaluation.protocols", "sets")
"""Mappings whose keys are names that a config chooses; the value null removes a name."""


WHOLE = ("space", "model_args")
"""Keys, at any depth, whose value replaces the default as a whole, instead of being merged with it."""


def _with_whole(merged: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``merged`` with the values of :data:`WHOLE`, without the default arguments of a network where ``values`` name another
    one."""
    found = {**merged, **({"model_args": {}} if "model" in values and "model_args" in merged else {})}
    for key, value in values.items():
        if key in WHOLE:
            found[key] = value
        elif isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            found[key] = _with_whole(merged[key], value)
    return found


def as_yaml(config: Section) -> str:
    """The values in which ``config`` differs from the defaults, as YAML. :func:`load_config` builds an equal config from it."""
    changed = _changes(canonical(config), _defaults(type(config)))
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


def _changes(plain: Mapping[str, Any], default: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in plain.items():
        inner = default.get(key)
        if key == "model_args" and plain.get("model") != default.get("model"):
            changed[key] = value
        elif isinstance(value, dict) and isinstance(inner, dict) and key not in WHOLE:
            if found := _changes(value, inner, f"{prefix}{key}."):
                changed[key] = found
        elif key not in default or value != inner:
            changed[key] = value
    removed = [key for key in default if key not in plain] if prefix.removesuffix(".") in NAMED else []
    return changed | dict.fromkeys(removed)


def _without_removed(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        inner = _without_removed(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        if inner is not None or prefix.removesuffix(".") not in NAMED:
            kept[key] = inner
    return kept


def _defaults(tree: type[Section]) -> dict[str, Any]:
    return canonical(tree())


def _one_line(tree: type[Section], error: ValidationError) -> str:
    kind, message, place, value = first_error(error)
    key = ".".join(place)
    if kind == "extra_forbidden":
        return unknown_key(key, list(_keys(_defaults(tree))))
    message = message[:1].lower() + message[1:]
    shown = "" if isinstance(value, dict | BaseModel) else f"={value!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return masked(f"config {key}{shown}: {message}{more}" if key else f"config: {message}{more}")


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
