"""What a finished job found, as plain values: accuracies of each set, seconds of each stage, what was left out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ims3_ray.artifacts import Storage
from ims3_ray.plan import Config, Plan, Scored
from ims3_ray.stages.base import Stage
from ims3_ray.stages.evaluate import confusion
from ims3_ray.tracking import slug

Results = dict[str, Any]
"""The content of ``results.json``."""

KINDS = ("last", "best", "val")
"""Accuracies of a student: of its final weights, at the best epoch on the test split, at the one that is best on held-out
training images."""


def gather(plan: Plan[Config], storage: Storage) -> Results:
    """Accuracies of every set by every row of the table, seconds of each stage, what could not be decoded."""
    skipped = [
        broken
        for stage in plan.stages
        for entry in (stage.manifest(storage) or {}).get("units", {}).values()
        for broken in entry.get("broken", [])
    ]
    return {
        "name": plan.config.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric": "top-1 accuracy in % on the real test split, mean ± standard deviation over student seeds "
        + ", ".join(map(str, plan.config.evaluation.seeds)),
        "sets": {name: _score(scored, storage) for name, scored in plan.sets.items()},
        "stages": [stage_row(stage, storage) for stage in plan.stages],
        "skipped_images": skipped,
        **_instability(plan, storage),
    }


def _score(scored: Scored, storage: Storage) -> dict[str, Any]:
    """A set: its title, the hash of its images, and what each row says of it."""
    manifest = scored.images.manifest(storage) or {}
    return {
        "title": scored.title, "content": manifest["content"],
        "images": sum(entry["images"] for entry in manifest["units"].values()),
        "rows": {row: _row(stage, storage) for row, stage in scored.rows.items()},
    }  # fmt: skip


def _row(stage: Stage, storage: Storage) -> dict[str, Any]:
    """Spreads of ``last``, ``best`` and ``val``, accuracy of each class and mean learning curve, over the students of a row."""
    units = (stage.manifest(storage) or {})["units"]
    students = [units[unit] for unit in stage.units]
    table = confusion(stage.artifact(storage), stage.units)
    found: dict[str, Any] = {kind: spread([s[kind] for s in students]) for kind in KINDS if students[0][kind] is not None}
    curve = []
    for checks in zip(*(s["curve"] for s in students), strict=True):
        values = {key: statistics.fmean(check[key] for check in checks) for key in ("loss", "test")}
        curve.append({"epoch": checks[0]["epoch"], **values})
    shares = 100 * table.diagonal() / table.sum(dim=1)
    return {**found, "per_class": [round(share, 2) for share in shares.tolist()], "curve": curve}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The values with their mean, sample standard deviation (0 for one value) and standard error of the mean (none for one)."""
    several = len(values) > 1
    std = statistics.stdev(values) if several else 0.0
    sem = std / math.sqrt(len(values)) if several else None
    return {"seeds": list(values), "mean": statistics.fmean(values), "std": std, "sem": sem}


def spread_text(value: Mapping[str, Any] | None) -> str:
    """As in ``72.2 ± 0.9``, without deviation for a single value; empty for none."""
    if not value:
        return ""
    return f"{value['mean']:.1f}" + ("" if value["sem"] is None else f" ± {value['std']:.1f}")


def stage_row(stage: Stage, storage: Storage) -> dict[str, Any]:
    """Title, key, seconds and images of a committed stage."""
    manifest = stage.manifest(storage) or {}
    images = sum(entry.get("images", 0) for entry in manifest["units"].values())
    return {
        "stage": stage.kind, "title": stage.title, "key": stage.key(storage), "seconds": manifest["seconds"],
        "images": images,
    }  # fmt: skip


def stage_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """A stage's seconds and images/s under names that MLflow takes."""
    label = slug(row["title"])
    rate = {f"images_per_s/{label}": row["images"] / row["seconds"]} if row["seconds"] and row["images"] else {}
    return {f"seconds/{label}": row["seconds"], **rate}


def _instability(plan: Plan[Config], storage: Storage) -> dict[str, Any]:
    """The geometric means of Eq. 12 over images, and the factor by which fine-tuning changed each; empty if not measured."""
    for stage in plan.stages:
        if stage.kind == "instability":
            logs = json.loads(stage.artifact(storage).read("instability.json"))
            logs["change"] = [after - before for before, after in zip(logs["before"], logs["after"], strict=True)]
            spreads = {name: spread(values) for name, values in logs.items()}
            return {
                "instability": {
                    name: {"coefficient": math.exp(value["mean"]), "log_mean": value["mean"], "log_std": value["std"]}
                    for name, value in spreads.items()
                }
            }
    return {}
