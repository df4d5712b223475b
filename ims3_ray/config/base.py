"""What every part of a config has in common."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every part of the tree: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def canonical(section: BaseModel) -> dict[str, Any]:
    """Plain JSON values of a section, the form that is hashed and stored."""
    plain: dict[str, Any] = json.loads(section.model_dump_json())
    return plain
