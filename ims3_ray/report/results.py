"""The results of a finished job as plain values: accuracies of each set, seconds of each stage, images that were left out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ims3_ray.config import merge
from ims3_ray.engine.stage import Stage
from ims3_ray.io.storage import Storage
from ims3_ray.plan.layout import Config, Plan, Scored
from ims3_ray.provenance import PRIVATE, provenance
from ims3_ray.stages.evaluate import confusion

Results = dict[str, Any]
"""The content of ``results.json``."""


@dataclass(frozen=True)
class RunResult:
    """The results of a finished job. ``results`` is the content of ``results.json``."""

    folder: str
    """Folder or URI of the run, which holds ``report.html``, ``results.json`` and more."""
    results: Results

    @property
    def report(self) -> str:
        return f"{self.folder}/report.html"

    def accuracy(self, name: str, row: str | None = None, which: str = "last") -> float:
        """Mean test accuracy, in per cent, of a set (for a distillation, the name of its arm) in ``row`` of the table, or in
        the first row; ``which`` is ``last``, ``best`` or ``val``."""
        rows = self.results["sets"][name]["rows"]
        return float(rows[row or next(iter(rows))][which]["mean"])


KINDS = ("last", "best", "val")
"""The accuracies of a student: with its final weights, at the epoch that is best on the test split, and at the epoch that is
best on held-out training images."""


def gather(plan: Plan[Config], storage: Storage) -> Results:
    """Accuracies of every set in every row of the table, seconds of each stage, and the images that could not be decoded."""
    skipped = [
        broken
        for stage in plan.stages
        for entry in (stage.manifest(storage) or {}).get("units", {}).values()
        for broken in entry.get("broken", [])
    ]
    more: dict[str, Any] = {}
    for stage in plan.stages:
        more = merge(more, stage.results(storage))
    return {
        "name": plan.config.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric": _metric(plan.config.evaluation.seeds, dict.fromkeys(scored.draw for scored in plan.sets.values())),
        "provenance": provenance_of(plan, storage),
        "sets": {name: _score(scored, storage) for name, scored in plan.sets.items()},
        "stages": [stage_row(stage, storage) for stage in plan.stages],
        "skipped_images": list(dict.fromkeys(skipped)),
        **more,
    }


def _metric(seeds: Iterable[int], draws: Collection[int]) -> str:
    """A phrase that says what the accuracies are, and what ± is."""
    listed = f"student seeds {', '.join(map(str, seeds))}"
    if len(draws) <= 1:
        return f"top-1 accuracy in % on the real test split, mean ± standard deviation over {listed}"
    return (
        f"top-1 accuracy in % on the real test split, mean over {listed} and run seeds {', '.join(map(str, draws))} ± standard "
        "error over the sets of the run seeds (standard deviation over students where all run seeds give the same set)"
    )


def provenance_of(plan: Plan[Config], storage: Storage) -> dict[str, Any]:
    """Versions, hardware, command, and hashes of data and weights."""
    machines = {
        json.dumps(entry["hardware"], sort_keys=True): entry["hardware"]
        for stage in plan.stages
        for entry in (stage.manifest(storage) or {"units": {}})["units"].values()
        if entry.get("hardware")
    }
    return provenance(plan.fingerprints, plan.weights, machines.values(), PRIVATE)


def _score(scored: Scored, storage: Storage) -> dict[str, Any]:
    """The results of a set: its title, the hash and the number of its images, and its accuracies in each row."""
    manifest = scored.images.manifest(storage) or {}
    return {
        "title": scored.title, "content": manifest["content"],
        "images": sum(entry["images"] for entry in manifest["units"].values()),
        "rows": {row: _row(stage, storage) for row, stage in scored.rows.items()},
    }  # fmt: skip


def _row(stage: Stage, storage: Storage) -> dict[str, Any]:
    """Summaries of ``last``, ``best`` and ``val``, the accuracy of each class, and the mean learning curve, over the students
    of a row."""
    units = (stage.manifest(storage) or {})["units"]
    students = [units[unit] for unit in stage.units]
    table = confusion(stage.artifact(storage), stage.units)
    found: dict[str, Any] = {kind: summary([s[kind] for s in students]) for kind in KINDS if students[0][kind] is not None}
    curve = []
    for checks in zip(*(s["curve"] for s in students), strict=True):
        loss, test = (summary([check[key] for check in checks]) for key in ("loss", "test"))
        curve.append({"epoch": checks[0]["epoch"], "loss": loss["mean"], "test": test["mean"], "std": test["std"]})
    shares = 100 * table.diagonal() / table.sum(dim=1)
    return {**found, "per_class": [round(share, 2) for share in shares.tolist()], "curve": curve}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The values with their mean, sample standard deviation (0 for one value) and standard error of the mean (none for one)."""
    several = len(values) > 1
    std = statistics.stdev(values) if several else 0.0
    sem = std / math.sqrt(len(values)) if several else None
    return {"seeds": list(values), "mean": statistics.fmean(values), "std": std, "sem": sem}


def summary_text(value: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation as in ``72.2 ± 0.9``; only the mean for a single value, and empty text for None."""
    if not value:
        return ""
    return f"{value['mean']:.1f}" + ("" if value["sem"] is None else f" ± {value['std']:.1f}")


def stage_row(stage: Stage, storage: Storage) -> dict[str, Any]:
    """Title, key, seconds and images of a committed stage."""
    manifest = stage.manifest(storage) or {}
    images = sum(entry.get("images", 0) for entry in manifest["units"].values())
    return {
        "stage": stage.name, "title": stage.title, "key": stage.key(storage), "seconds": manifest["seconds"],
        "images": images,
    }  # fmt: skip
