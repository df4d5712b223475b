"""The base of all config sections, and functions that convert, compare and merge their values."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from ims3_ray.component import Section as Section
from ims3_ray.component import defaults_of, sections_of

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is valid as part of a file name and of the name of a metric."""
Text = Annotated[str, Field(min_length=1)]
"""A path or a title, which is not empty."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """``values``, for the validators of configs: ``ValueError`` for one that stands twice, since what is made for each of them
    would count twice."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value} stands twice; name each once")
    return values


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(distinct)]
"""Distinct seeds of random numbers."""


def reserved(cpus: float, gpus: float) -> dict[str, float]:
    """The resources that Ray reserves for a worker with ``cpus`` CPUs and ``gpus`` GPUs."""
    return {kind: n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}


def canonical(section: BaseModel) -> dict[str, Any]:
    """Plain JSON values of a section, the form that is hashed and stored."""
    plain: dict[str, Any] = json.loads(section.model_dump_json())
    return plain


def differing(section: BaseModel, without: Collection[str] = ()) -> dict[str, Any]:
    """Plain JSON values of the fields that differ from their defaults, leaving out those named in ``without``.

    The key of an artifact holds these values of a section, so an option that is added later changes no key until it is used. A
    nested section is compared field by field with the default that the outer section has for it. Fields without a default are
    always included.
    """
    return _differing(section, defaults_of(type(section)), without)


def _differing(section: BaseModel, defaults: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    plain, found = canonical(section), {}
    for name, value in section:
        default = defaults.get(name, _ABSENT)
        if name in without or value == default:
            continue
        if isinstance(value, BaseModel) and type(default) is type(value):
            # A default that was built before a plugin was loaded lacks the section of the plugin's component.
            if inner := _differing(value, {**sections_of(type(value)), **dict(default)}):
                found[name] = inner
        else:
            found[name] = plain[name]
    return found


_ABSENT = object()


def with_length(values: Any, given: str, other: str) -> Any:
    """The values of a section, with ``other`` null where ``given`` alone says the length of a training."""
    if isinstance(values, dict) and values.get(given) is not None and other not in values:
        return {**values, other: None}
    return values


WHOLE = ("space", "model_args")
"""Keys, at any depth, whose value replaces another one as a whole, instead of being merged with it."""
ALTERNATIVES = ("steps", "epochs", "minutes")
"""Keys that say the length of a training in different ways. Where one of them is given, the others of its section become
null."""


def is_given(value: Any) -> bool:
    """Whether a value is not null, as such or as a user has written it."""
    return getattr(value, "value", value) is not None


def _of_numbers(table: Mapping[Any, Any]) -> bool:
    """Whether keys of a table are numbers. A number as the name of an arm, whose value is a section or null, is a name."""
    return any(isinstance(key, int) and is_given(value) and not isinstance(value, Mapping) for key, value in table.items())


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated by ``over``: mappings merge key by key; any other value replaces the one in ``base``, and so do a table
    from numbers (of images per class, say) to single values and the mappings of :data:`WHOLE`. A length of a training replaces
    one of another kind (:data:`ALTERNATIVES`), and a network that is named without arguments has none of the one in
    ``base``."""
    merged = dict(base)
    if "model" in over and "model_args" in base:
        merged["model_args"] = {}
    if any(is_given(over.get(key)) for key in ALTERNATIVES):
        merged |= {key: None for key in ALTERNATIVES if is_given(merged.get(key)) and key not in over}
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping) and key not in WHOLE and not _of_numbers(value)
        merged[key] = merge(inner or {}, value) if both else value
    return merged
