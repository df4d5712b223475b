"""The tables and figures of the paper as runs of this program: the files of ``configs/paper/``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ims3_ray.config import CompareConfig, SweepConfig
from ims3_ray.config.base import is_given, merge
from ims3_ray.config.files import CONFIGS, read_runs, read_values, with_overrides
from ims3_ray.config.loading import build
from ims3_ray.config.written import typed
from ims3_ray.errors import UserError

FOLDER = CONFIGS / "paper"
SMALL = "small.yaml"
"""File with the stand-ins for data, weights and GPUs."""
JOBS: dict[str, type[CompareConfig] | type[SweepConfig]] = {
    "compare": CompareConfig, "sweep": SweepConfig, "times": CompareConfig,
}  # fmt: skip
"""What a run is: a comparison, a search, or a comparison of which the times are wanted."""
CHOSEN = ("arms", "evaluation.protocols")
"""Mappings of which stand-ins change entries that a run has, and add none."""


@dataclass(frozen=True)
class Reproduction:
    """One table or figure of the paper."""

    name: str
    title: str
    notes: tuple[str, ...]
    """What the paper leaves open or contradicts, and what differs here."""
    runs: dict[str, CompareConfig | SweepConfig]
    minutes: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """Runs of which the times are wanted → arm → fine-tuning or sampling → the printed minutes."""
    small: bool = False
    """Whether the runs have stand-ins for data and weights, so that their accuracies mean nothing."""


def names(folder: Path = FOLDER) -> list[str]:
    """The tables and figures that can be reproduced, in the order of the paper."""
    found = [file.stem for file in folder.glob("*-*.yaml") if file.stem.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda name: (name.startswith("figure"), int(name.rpartition("-")[2])))


def described_names(folder: Path = FOLDER) -> str:
    """A line for each table and figure with its title. Raises :class:`UserError` if there is none."""
    if not names(folder):
        raise UserError(f"{folder} holds no tables; install the package again")
    return "\n".join(f"{name:10} {typed(str, read_runs(folder / f'{name}.yaml')[0]['title'])}" for name in names(folder))


def read_reproduction(name: str, overrides: Iterable[str] = (), small: bool = False, folder: Path = FOLDER) -> Reproduction:
    """The table or figure ``name`` with overrides for all of its runs; ``small`` puts stand-ins in place of data and weights.

    Raises :class:`UserError` for an unknown name and for values that are no config.
    """
    if name not in names(folder):
        raise UserError(f"there is no '{name}' in {folder}; there is: {', '.join(names(folder))}")
    overrides = list(overrides)
    if any(override.partition("=")[0] == "name" for override in overrides):
        raise UserError("name=… would give all runs of a table one folder; give another storage=… instead")
    about, runs = read_runs(folder / f"{name}.yaml")
    if set(about) - {"notes"} != {"title"}:
        raise UserError(f"{folder / name}.yaml needs a title, and may have notes and runs, and nothing else")
    stand_ins, found = read_values(folder / SMALL) if small else {}, dict[str, CompareConfig | SweepConfig]()
    minutes = dict[str, dict[str, dict[str, float]]]()
    for run, values in runs.items():
        job, own = typed(str, values.pop("job", "compare")), values.pop("small", {})
        if job not in JOBS:
            raise UserError(f"{folder / name}.yaml: job '{job}' of run '{run}' is none of {', '.join(JOBS)}")
        if job == "times":
            minutes[run] = typed(dict[str, dict[str, float]], values.pop("minutes", {}))
        if small:
            values = merge(merge(values, _fitting(stand_ins, values)), own)
        named = {**values, "name": f"paper-{name}-{run}" + ("-small" if small else "")}
        found[run] = build(JOBS[job], with_overrides(named, overrides))
    return Reproduction(
        name, typed(str, about["title"]), tuple(typed(list[str], about.get("notes", []))), found, minutes, small
    )


def _fitting(stand_ins: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The stand-ins without the entries of :data:`CHOSEN` that the run does not have."""
    found: dict[str, Any] = {}
    for key, value in stand_ins.items():
        if prefix.removesuffix(".") in CHOSEN and not is_given(values.get(key)):
            continue
        inner = values.get(key)
        nested = isinstance(value, Mapping) and (isinstance(inner, Mapping) or f"{prefix}{key}" in CHOSEN)
        found[key] = _fitting(value, inner or {}, f"{prefix}{key}.") if nested else copy.deepcopy(value)
    return found
