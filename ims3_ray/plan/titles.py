"""Titles of stages that differ where the stages do: metrics, progress and reports name stages by their titles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ims3_ray.engine.stage import Stage
from ims3_ray.tracking.entries import flat

LONGEST = 30
"""Largest number of characters of a value that a title names, unless only a longer one tells two stages apart."""


def distinguish(stages: Sequence[Stage]) -> None:
    """Add to equal titles of ``stages`` in what the stages differ, such as the seed or a learning rate."""
    alike: dict[str, list[Stage]] = {}
    for stage in stages:
        alike.setdefault(stage.title, []).append(stage)
    for group in alike.values():
        if len(group) > 1:
            for stage, text in zip(group, _differences(group), strict=True):
                stage.title += f", {text}" if text else ""


def _differences(stages: Sequence[Stage]) -> list[str]:
    """For each stage, the values that tell it from the others; a default is not named."""
    values = [_settings(stage) for stage in stages]
    differing = [key for key in dict.fromkeys(key for each in values for key in each) if len(_distinct(values, [key])) > 1]
    chosen: list[str] = []
    for key in sorted(differing, key=lambda key: (key != "seed", max(len(str(each.get(key))) for each in values) > LONGEST)):
        if len(_distinct(values, [*chosen, key])) > len(_distinct(values, chosen)):
            chosen.append(key)
    return [
        ", ".join(f"{key.rpartition('.')[2].replace('_', ' ')} {each[key]}" for key in chosen if each.get(key) is not None)
        for each in values
    ]


def _distinct(values: Sequence[dict[str, Any]], keys: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(str(each.get(key)) for key in keys) for each in values}


def _settings(stage: Stage) -> dict[str, Any]:
    """What the results of a stage depend on: its parameters, and those of the stages before it."""
    found: dict[str, Any] = {}
    for other in stage.inputs.values():
        found |= _settings(other)
    return found | dict(flat(stage.params))
