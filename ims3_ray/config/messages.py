"""Sentences that say what is wrong with a value of a config, in place of pydantic's, which speak of Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ims3_ray.component import defaults_of, first_error
from ims3_ray.config.base import canonical
from ims3_ray.config.keys import nearest, unknown_key
from ims3_ray.errors import masked

LISTS, SECTIONS = ("tuple_type", "list_type"), ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
KIND = re.compile(r"constrained-\w+|(function|dict|list|tuple|literal|nullable|model|lax)\b.*|int|float|str|bool|none|\[key\]")
"""Parts of the place of an error that name one of several kinds of value that a key takes, or a key of a table."""


def one_line(section: type[BaseModel], error: ValidationError) -> str:
    """The message for a config of the class ``section`` with an error."""
    kind, _, place, value = first_error(error)
    key = ".".join(_named(place))
    if kind == "extra_forbidden":
        return unknown_key(key, list(keys_of(section)))
    wrong = {".".join(_named(tuple(map(str, each["loc"])))) for each in error.errors()}
    shown = "" if isinstance(value, dict | BaseModel) else f"={'null' if value is None else repr(value)}"
    others = sum(not key.startswith(each) for each in wrong)
    more = f" (and {others} more)" if others else ""
    return masked(f"config {key}{shown}: {_sentence(error)}{more}" if key else f"config: {_sentence(error)}{more}")


def inner(section: type[BaseModel], error: ValidationError, *place: str) -> str:
    """The message for a part of a config, of the class ``section`` and at this ``place``, that is checked by itself."""
    return f"{'.'.join([*place, *_named(first_error(error)[2])])}: {reason(section, error)}"


def reason(section: type[BaseModel], error: ValidationError) -> str:
    """The message for an error in a config of the class ``section``, without its place."""
    kind, _, place, _ = first_error(error)
    if kind != "extra_forbidden":
        return _sentence(error)
    near = nearest(".".join(_named(place)), list(keys_of(section)))
    return f"there is no such key{f'; did you mean {near!r}?' if near else ''}"


def keys_of(section: type[BaseModel]) -> Iterator[str]:
    """The dotted keys of all settings of a section."""
    return _flat({**dict.fromkeys(section.model_fields), **defaults_of(section)})


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        below = canonical(value) if isinstance(value, BaseModel) else value
        if isinstance(below, Mapping):
            yield from _flat(below, f"{prefix}{key}.")


def _named(place: tuple[str, ...]) -> tuple[str, ...]:
    """A place without the parts that are no keys."""
    while len(place) > 1 and KIND.fullmatch(place[-1]):
        place = place[:-1]
    return place


def _sentence(error: ValidationError) -> str:
    kind, message, place, value = first_error(error)
    if kind in LISTS:
        return f"write a list, as in [{value}]"
    if kind == "dict_type" and not isinstance(value, list):
        return f"it holds values by name: write a name after it, as in {'.'.join(_named(place))}.NAME={value}"
    if kind in SECTIONS:
        return "it has keys of its own: write them under it, or leave it out"
    if kind == "string_type":
        return "must be a single text"
    if kind == "too_short" and (least := re.search(r"at least \d+", message)):
        return f"needs {least[0]}"
    if kind == "string_pattern_mismatch":
        return "use letters, digits, '.', '_' and '-', and begin with a letter or a digit"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "finite_number":
        return "must be a finite number"
    return message[:1].lower() + message[1:]
