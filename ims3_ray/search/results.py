"""The results of a search as plain values, and the estimate of what it will cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from ims3_ray.config import SweepConfig
from ims3_ray.config.sweep import Range, symbol, title_of
from ims3_ray.engine.stage import Stage
from ims3_ray.io.storage import Storage
from ims3_ray.plan.estimate import hours_between
from ims3_ray.plan.sweep import SweepPlan
from ims3_ray.report.results import Results, provenance_of, stage_row
from ims3_ray.search.records import Tried, points_of


def gather_sweep(plan: SweepPlan, trials: Sequence[Tried], storage: Storage) -> Results:
    """The results of a search that has ended."""
    config = plan.config
    points = [point for tried in trials for point in points_of(config, tried)]
    candidates = [point for point in points if point["draws"] == len(config.draws) and point["objective"] is not None]
    return {
        "name": config.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric": metric(plan),
        "provenance": provenance_of(plan, storage),
        "keys": plan.keys(storage),
        "planned": planned(plan),
        "counts": counts(plan, trials),
        "trials": [_trial(config, tried) for tried in trials],
        "failed": [{"settings": tried.settings, "error": tried.error} for tried in trials if tried.error],
        "points": points,
        "best": max(candidates, key=lambda point: point["objective"], default=None),
        "sets": {},
        "stages": [*(stage_row(stage, storage) for stage in plan.stages), *_stages(trials)],
        "skipped_images": _skipped(plan, storage),
    }  # fmt: skip


def metric(plan: SweepPlan) -> str:
    """A phrase that describes the measure by which the search decides."""
    config = plan.config
    draws = f", run seeds {', '.join(map(str, config.draws))}" if len(config.draws) > 1 else ""
    if not config.search.trains_students:
        return f"the terms of Eq. 10 at the run's own α : β and encoder decide{draws}; no student was trained"
    held_out = config.evaluation.held_out(len(plan.classes.names))
    return (
        f"final top-1 accuracy in % on {held_out} held-out training images a class decides "
        f"({config.row}), mean over student seeds {', '.join(map(str, config.evaluation.seeds))}{draws}; the test split is "
        "only reported"
    )


def _trial(config: SweepConfig, tried: Tried) -> dict[str, Any]:
    found = [point for point in points_of(config, tried) if point["objective"] is not None]
    best = max(found, key=lambda point: point["objective"], default=None)
    return {
        "settings": tried.settings, "status": tried.status(config), "error": tried.error,
        "keys": {record["draw"]: record["keys"] for record in tried.records},
        "selections": [len(record["selections"]) for record in tried.records],
        "objective": best and best["objective"], "best": best and best["settings"],
    }  # fmt: skip


def _stages(trials: Sequence[Tried]) -> Iterator[dict[str, Any]]:
    """Rows of the stages of all trials, each stage once."""
    seen = set()
    for tried in trials:
        for record in tried.records:
            for row in record["stages"]:
                if row["key"] not in seen:
                    seen.add(row["key"])
                    where = title_of(tried.settings) + (f", draw {record['draw']}" if record["draw"] else "")
                    yield {**row, "title": f"{where}: {row['title']}" if where else row["title"]}


def _skipped(plan: SweepPlan, storage: Storage) -> list[str]:
    entries = [e for stage in plan.stages for e in (stage.manifest(storage) or {}).get("units", {}).values()]
    return [broken for entry in entries for broken in entry.get("broken", [])]


def counts(plan: SweepPlan, trials: Sequence[Tried]) -> dict[str, int]:
    """The number of points, and of the fine-tunings, pools, selections and students that were made for them."""
    rows = list(_stages(trials))
    made = Counter(Stage.registry[row["stage"]].counted for row in rows)
    students = made["evaluations"] * len(plan.config.evaluation.seeds)
    contents = {found["content"] for tried in trials for record in tried.records for found in record["selections"]}
    return {
        "points": sum(1 for tried in trials for _ in points_of(plan.config, tried)),
        "fine_tunes": made["fine_tunes"], "pools": made["pools"],
        "distinct_selections": sum(len(record["selections"]) for tried in trials for record in tried.records),
        "evaluated": len(contents - {None}), "students": students,
    }  # fmt: skip


def planned(plan: SweepPlan) -> dict[str, float]:
    """The numbers of :func:`counts` as estimated before the start, with FLOPs. Values named ``most_…`` are upper limits."""
    config, scale = plan.config, plan.scale
    own = {id(stage): stage for trial in plan.trials for stage in trial.stages if stage not in plan.stages}.values()
    tuning = [stage for stage in own if stage.exclusive]
    tunes = scale if any(key.startswith("finetune.") for key in config.values) else len(config.draws) / max(1, len(tuning))
    finetunes, pools = len(tuning) * tunes, sum(stage.counted == "pools" for stage in own) * scale
    made = sum(stage.flops * (tunes if stage in tuning else scale) for stage in own)
    made += sum(stage.flops for stage in plan.stages)
    return {
        "points": plan.points, "fine_tunes": round(finetunes), "pools": round(pools),
        "most_selections": round(plan.most_selections), "most_evaluated": round(plan.most_evaluated),
        "flops": made, "most_flops": made + plan.most_evaluated * plan.evaluation_flops,
    }  # fmt: skip


def describe_sweep(plan: SweepPlan) -> str:
    """The plan as text, at the start and for ``--dry-run``."""
    config, p = plan.config, planned(plan)
    storage = Storage.at(config.storage)
    factors = [
        f"{symbol(key)} {'a range' if isinstance(values, Range) else len(values)}" for key, values in config.values.items()
    ]
    draws = f", {len(config.draws)} draws each" if len(config.draws) > 1 else ""
    stages = {stage.key(storage): stage for trial in plan.trials for stage in trial.stages}
    there = Counter(stage.counted for stage in stages.values() if not stage.missing(storage))
    candidates = max((stage.images for stage in stages.values() if stage.counted == "pools"), default=0)
    rows, seeds = len(config.evaluation.rows), len(config.evaluation.seeds)
    most = f"at most {p['most_evaluated']:,}·{rows * seeds}"
    students = f"students: {'none' if not config.search.trains_students else most}"
    return "\n".join(
        [
            f"{p['points']:,} points ({' × '.join(factors)}{draws}), {config.search.method}",
            f"fine-tunes: {p['fine_tunes']} ({there['fine_tunes']} there), pools of {candidates:,} candidates: {p['pools']} "
            f"({there['pools']} there)",
            f"distinct selections: at most {p['most_selections']:,}, {students}",
            f"{p['flops'] / 1e9:,.4g} GFLOP, with all students {p['most_flops'] / 1e9:,.4g}: "
            + hours_between(config, p["flops"], p["most_flops"]),
            metric(plan),
            f"results: {storage.address(config.name)}",
        ]
    )
