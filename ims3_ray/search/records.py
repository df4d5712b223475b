"""The records that trials leave on storage, and the points that follow from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ims3_ray.config import SweepConfig
from ims3_ray.config.sweep import Settings
from ims3_ray.io.storage import Storage
from ims3_ray.plan.sweep import id_of
from ims3_ray.report.comparison import pooled

Record = dict[str, Any]
"""What one draw of a trial found, as JSON: ``keys`` of its stages; the distinct ``selections`` (groups, ``score`` by the run's
own φ, references, α and β, hash of the images, accuracies); ``points`` (inner settings, the index of the selection of each,
its terms); rows of its ``stages``."""


def record_path(config: SweepConfig, settings: Settings, draw: int) -> str:
    return f"{config.name}/trials/{id_of(settings)}-{draw}.json"


def settings_path(config: SweepConfig, settings: Settings) -> str:
    """Path of the settings of a trial that has begun."""
    return f"{config.name}/trials/{id_of(settings)}.settings"


def error_path(config: SweepConfig, settings: Settings) -> str:
    return f"{config.name}/trials/{id_of(settings)}.error"


def read_records(config: SweepConfig, storage: Storage, settings: Settings, draws: Sequence[int]) -> list[Record]:
    """The records of those of ``draws`` that have one."""
    found = [storage.read_json(record_path(config, settings, draw)) for draw in draws]
    return [record for record in found if record is not None]


Point = dict[str, Any]
FINISHED = "finished"
"""Status of a trial of which all draws were run."""


@dataclass
class Tried:
    """An outer setting that was tried: the records of its draws, and the error if it failed."""

    settings: Settings
    records: list[Record]
    error: str = ""

    def status(self, config: SweepConfig) -> str:
        if self.error:
            return "failed"
        return FINISHED if len(self.records) == len(config.draws) else f"stopped after {len(self.records)}"


def farthest(trials: Sequence[Tried]) -> list[Tried]:
    """The trials with each setting once, in an order of their settings. Of a setting that Optuna has repeated, it is the trial
    that came farthest."""
    found: dict[str, Tried] = {}
    for tried in trials:
        name = json.dumps(tried.settings, sort_keys=True)
        if name not in found or (not tried.error, len(tried.records)) > (not found[name].error, len(found[name].records)):
            found[name] = tried
    return [found[name] for name in sorted(found)]


def points_of(config: SweepConfig, tried: Tried) -> Iterator[Point]:
    """One point per inner setting of a trial: means over its draws, and spreads over the students of all draws."""
    for position, inner in enumerate(config.inner()) if tried.records else ():
        points = [record["points"][position] for record in tried.records]
        selections = [record["selections"][p["selection"]] for record, p in zip(tried.records, points, strict=True)]
        rows = {}
        for row in selections[0]["rows"] if all(s["rows"] for s in selections) else ():
            kinds = selections[0]["rows"][row]
            rows[row] = {kind: pooled([s["rows"][row][kind] for s in selections]) for kind in kinds}
        score = statistics.fmean(s["score"] for s in selections)
        decides = score if not config.search.trains_students else rows[config.row]["held_out"]["mean"] if rows else None
        yield {
            "settings": {**tried.settings, **inner}, "trial": id_of(tried.settings), "draws": len(tried.records),
            "objective": decides, "score": score,
            "proximity": statistics.fmean(p["proximity"] for p in points),
            "repulsion": statistics.fmean(p["repulsion"] for p in points),
            "content": [s["content"] for s in selections], "rows": rows,
        }  # fmt: skip


def objective_of(config: SweepConfig, records: Sequence[Record]) -> float:
    """The objective of a trial's best inner setting; −∞ if none has an objective (accuracy needs students in every draw)."""
    found = (point["objective"] for point in points_of(config, Tried({}, list(records))))
    return float(max((value for value in found if value is not None), default=-math.inf))
