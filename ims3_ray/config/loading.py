"""Builds a config from what a user writes, the defaults and the settings of plugins, with errors of one line that name the
fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ims3_ray import plugins
from ims3_ray.config import Section, canonical, merge
from ims3_ray.config.base import WHOLE, is_given
from ims3_ray.config.files import check_moved, read_values
from ims3_ray.config.messages import one_line
from ims3_ray.config.written import Written, typed
from ims3_ray.errors import UserError, not_there

Tree = TypeVar("Tree", bound=Section)


def load_config(tree: type[Tree], file: str | Path | Sequence[str] | None = None, overrides: Iterable[str] = ()) -> Tree:
    """Build ``tree`` from YAML files and ``dotted.key=value`` overrides, each merged over those before it and all over the
    defaults.

    Raises :class:`UserError` with one line for an unreadable file, an unknown key or an impossible value.
    """
    overrides = list(overrides)
    check_effect(tree, overrides)
    return build(tree, read_values(file, overrides))


def check_effect(tree: type[Section], overrides: Iterable[str]) -> None:
    """Raises :class:`UserError` for an override of an option that has no effect in this kind of job. Files may set such
    options, since several kinds of job extend the same files."""
    for override in overrides:
        if (other := tree.replaced.get(key := override.partition("=")[0])) is not None:
            instead = f"where {other} takes the place of {key}; set {other}" if other else "since nothing uses it; leave it out"
            raise UserError(f"override '{override}' has no effect here, {instead}")


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
    values = typed(tree, _with_removed(values, _defaults(tree)))
    merged = _without_removed(merge(_defaults(tree), values))
    try:
        return tree.model_validate(merged)
    except ValidationError as error:
        raise UserError(one_line(tree, error)) from error


NAMED = {"arms": "arm", "cluster.place": "kind of work", "evaluation.protocols": "protocol", "sets": "set"}
"""Mappings whose keys are names that a config chooses; the value null removes a name. With each, what it has names of."""


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


def _with_removed(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``values`` with None for every name of :data:`NAMED` that is written to be null, which would else be a text. Raises
    :class:`UserError` for one on the command line that is not there to be removed."""
    found = dict(values)
    for key, value in values.items():
        if isinstance(value, Mapping):
            found[key] = _with_removed(value, _mapping(defaults.get(key)), f"{prefix}{key}.")
        elif prefix.removesuffix(".") in NAMED and isinstance(value, Written) and value.value is None:
            if value.nothing_there and key not in defaults:
                there = [name for name in {**defaults, **values} if is_given(values.get(name, True))]
                raise UserError(f"config {prefix}{key}=null: {not_there(NAMED[prefix.removesuffix('.')], key, there)}")
            found[key] = None
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _without_removed(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        inner = _without_removed(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        if inner is not None or prefix.removesuffix(".") not in NAMED:
            kept[key] = inner
    return kept


def _defaults(tree: type[Section]) -> dict[str, Any]:
    return canonical(tree())
