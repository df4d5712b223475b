"""What every part of a config has in common."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""What may be part of a file's name and of a metric's."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def reserved(cpus: float, gpus: float) -> dict[str, float]:
    """What Ray reserves for a worker with so many of each."""
    return {kind: n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}


class Section(BaseModel):
    """Base of every part of the tree: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def canonical(section: BaseModel) -> dict[str, Any]:
    """Plain JSON values of a section, the form that is hashed and stored."""
    plain: dict[str, Any] = json.loads(section.model_dump_json())
    return plain


def differing(section: BaseModel, without: Collection[str] = ()) -> dict[str, Any]:
    """Plain JSON values of the fields that differ from their defaults, leaving out those named in ``without``.

    This is what an artifact's key holds of a section, so an option that is added later changes no key until it is used. A
    section inside the section is compared field by field with the default that the outer one has for it. Fields without a
    default are always there.
    """
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(section).model_fields.items()
        if not field.is_required()
    }
    return _differing(section, defaults, without)


def _differing(section: BaseModel, defaults: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    plain, found = canonical(section), {}
    for name, value in section:
        default = defaults.get(name, _ABSENT)
        if name in without or value == default:
            continue
        if isinstance(value, BaseModel) and type(default) is type(value):
            found[name] = _differing(value, dict(default))
        else:
            found[name] = plain[name]
    return found


_ABSENT = object()


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: mappings merge key by key, all else replaces, tables by number (of epochs, say) too."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        numbered = isinstance(value, Mapping) and any(isinstance(name, int) for name in value)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping) and not numbered
        merged[key] = merge(inner or {}, value) if both else value
    return merged
