"""What every part of a config has in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: mappings merge key by key, all else replaces, tables by number (of epochs, say) too."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        numbered = isinstance(value, Mapping) and any(isinstance(name, int) for name in value)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping) and not numbered
        merged[key] = merge(inner or {}, value) if both else value
    return merged
