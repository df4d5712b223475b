"""Runs a plan: skips what is committed, runs the rest, gathers results, writes report and tracking."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from ims3_ray.artifacts import Storage
from ims3_ray.cluster import connected
from ims3_ray.config import RunConfig, canonical
from ims3_ray.errors import UserError
from ims3_ray.plan import Plan, make_plan
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.s3 import Listener
from ims3_ray.tracking import Tracker

DERIVED = ("embed", "latents")
"""Stages that run together with the images they look at."""


@dataclass(frozen=True)
class DistillResult:
    """What a finished run leaves. ``results`` is the content of ``results.json``."""

    folder: str
    """Folder or URI of the run: ``report.html``, ``results.json``, ``distilled/``."""
    results: dict[str, Any]

    @property
    def report(self) -> str:
        return f"{self.folder}/report.html"


def distill(config: RunConfig | None = None) -> DistillResult:
    """Run a distillation to its end, or continue one that was interrupted.

    Raises :class:`UserError` for bad input, a cluster too small for the plan, a tracking server that does not answer and
    a run folder that holds another config, each before anything is computed.
    """
    config = config or RunConfig()
    plan = make_plan(config)
    storage = Storage.at(config.storage)
    check_folder(config, storage)
    if not is_finished(plan, storage):
        if any(stage.missing(storage) for stage in plan.stages):
            _warn_if_lost_with_job(config)
            with connected(config.cluster, plan.needed()):
                _run(config, plan, storage)
        else:
            _run(config, plan, storage)
    return DistillResult(storage.address(config.name), json.loads(storage.read(f"{config.name}/results.json")))


def is_finished(plan: Plan, storage: Storage) -> bool:
    """Whether the run folder holds the results of these very stages: of the same images, weights and code."""
    name = plan.config.name
    if not (storage.exists(f"{name}/results.json") and storage.exists(f"{name}/report.html")):
        return False
    rows = json.loads(storage.read(f"{name}/results.json"))["stages"]
    return [row["key"] for row in rows] == [stage.key(storage) for stage in plan.stages]


def _run(config: RunConfig, plan: Plan, storage: Storage) -> None:
    """Take the run folder, run what is missing, publish; MLflow knows how it ended."""
    from ims3_ray.report.publish import publish

    context = Context(config, storage, plan.classes, Tracker(config, storage))
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(canonical(config), sort_keys=False).encode())
    try:
        run_stages(context, plan)
        publish(context, plan, gather(plan, storage))
    except BaseException as error:
        context.tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    context.tracker.finish("FINISHED")


def check_folder(config: RunConfig, storage: Storage) -> None:
    """:class:`UserError` if the run folder holds a run with another config. Where and how fast it runs does not matter."""
    path = f"{config.name}/config.yaml"
    if not storage.exists(path):
        return
    mine, theirs = _what_matters(canonical(config)), _what_matters(yaml.safe_load(storage.read(path)))
    theirs = {key: value for key, value in theirs.items() if key in mine}
    if theirs != mine:
        key, old, new = first_difference(theirs, mine)
        raise UserError(
            f"run folder '{storage.address(config.name)}' holds another config ({key}: {old!r} there, {new!r} here); "
            f"choose another name (name={config.name}-2) or delete the folder"
        )


def _what_matters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what may change between two commands that continue one run."""
    kept = {key: value for key, value in plain.items() if key not in ("storage", "cluster", "actors")}
    return {**kept, "pool": {key: value for key, value in plain.get("pool", {}).items() if key != "mix_hardware"}}


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any]:
    """(dotted key, old value, new value) of the first place where two trees differ."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if a != b:
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                return first_difference(a, b, f"{prefix}{key}.")
            return prefix + key, a, b
    raise ValueError("the trees do not differ")


def run_stages(context: Context, plan: Plan) -> None:
    """Run every stage that is not complete, in order."""
    from ims3_ray.stages import evaluate, export, finetune, instability, select
    from ims3_ray.stages.pool import check_decoded, produce

    storage = context.storage
    listeners: dict[str, list[Listener]] = {}  # held until the end, and with them the S3 actors
    for stage in plan.stages:
        done = [stage]
        if stage.kind in ("encode", "generate"):
            alike = [s for s in plan.stages if s.kind == stage.kind]
            if stage is not alike[-1]:  # those of a kind depend on nothing of each other: one pass makes them all
                continue
            derived = {s: [d for d in plan.stages if d.kind in DERIVED and d.inputs["images"] is s] for s in alike}
            if stage.kind == "generate":
                listeners = select.listen(context, plan.stages)
            produce(context, derived, listeners)
            done = [*alike, *(d for stages in derived.values() for d in stages)]
            for encoded in alike if stage.kind == "encode" else []:
                check_decoded(context, encoded)
        elif stage.kind in DERIVED:
            continue
        elif stage.kind == "finetune" and stage.missing(storage):
            finetune.run(context, stage)
        elif stage.kind == "instability" and stage.missing(storage):
            instability.run(context, stage)
        elif stage.kind == "select" and stage.missing(storage):
            select.run(context, stage)
        elif stage.kind == "export" and stage.missing(storage):
            export.run(context, stage)
        for finished in done:
            if not finished.missing(storage):
                context.tracker.metrics(stage_metrics(stage_row(finished, storage)))
    waiting = [stage for stage in plan.evaluations.values() if stage.missing(storage)]
    if waiting:
        evaluate.run_all(context, waiting)
        for stage in waiting:
            context.tracker.metrics(stage_metrics(stage_row(stage, storage)))


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
    label = re.sub(r"\W+", "_", row["title"].replace("+", "and")).strip("_")
    rate = {f"images_per_s/{label}": row["images"] / row["seconds"]} if row["seconds"] and row["images"] else {}
    return {f"seconds/{label}": row["seconds"], **rate}


def gather(plan: Plan, storage: Storage) -> dict[str, Any]:
    """The content of ``results.json``: accuracies of each arm, seconds of each stage, what was left out."""
    arms = {}
    for name, stage in plan.evaluations.items():
        units = (stage.manifest(storage) or {})["units"]
        students = [units[unit] for unit in stage.units]
        last, best = [s["last"] for s in students], [s["best"] for s in students]
        arms[name] = {
            "title": plan.config.arms[name].title,
            "seeds": last, **_spread(last), "best": {"seeds": best, **_spread(best)},
            "student_seeds": list(plan.config.evaluation.seeds),
            "content": stage.inputs["select"].identity(storage),
        }  # fmt: skip
    skipped = [
        broken
        for stage in plan.stages
        for entry in (stage.manifest(storage) or {}).get("units", {}).values()
        for broken in entry.get("broken", [])
    ]
    return {
        "name": plan.config.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "metric": f"top-1 test accuracy in %, last epoch, ConvNet-{plan.config.evaluation.depth}",
        "arms": arms,
        "stages": [stage_row(stage, storage) for stage in plan.stages],
        "skipped_images": skipped,
        **_instability(plan, storage),
    }


def _instability(plan: Plan, storage: Storage) -> dict[str, Any]:
    """The geometric means of Eq. 12 over images, and the factor by which fine-tuning changed each; empty if not measured."""
    for stage in plan.stages:
        if stage.kind == "instability":
            logs = json.loads(stage.artifact(storage).read("instability.json"))
            logs["change"] = [after - before for before, after in zip(logs["before"], logs["after"], strict=True)]
            spread = {name: _spread(values) for name, values in logs.items()}
            return {
                "instability": {
                    name: {"coefficient": math.exp(value["mean"]), "log_mean": value["mean"], "log_std": value["std"]}
                    for name, value in spread.items()
                }
            }
    return {}


def _spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def describe(config: RunConfig) -> str:
    """The plan as text, for ``--dry-run``."""
    plan, storage = make_plan(config), Storage.at(config.storage)
    lines = [f"{'stage':34}{'there':>12}{'images':>10}{'GFLOP':>12}"]
    for stage in plan.stages:
        missing = len(stage.missing(storage))
        have = len(stage.units) - missing
        there = "done" if not missing else f"{have}/{len(stage.units)} units"
        lines.append(f"{stage.title:34}{there:>12}{stage.images:>10}{stage.flops / 1e9:>12,.4g}")
    left = sum(stage.flops * len(stage.missing(storage)) / len(stage.units) for stage in plan.stages)
    needed = ", ".join(f"{v:g} {k}" for k, v in plan.needed().items())
    lines += [
        f"left to compute: {left / 1e9:,.4g} GFLOP; needs at a time: {needed}",
        f"results: {storage.address(config.name)}",
    ]
    return "\n".join(lines)


def _warn_if_lost_with_job(config: RunConfig) -> None:
    if "://" not in config.storage and not os.path.isabs(config.storage) and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        print(
            f"warning: storage '{config.storage}' is relative, so results stay in the job's temporary folder on the head node; "
            "give storage=/absolute/path or s3://…",
            flush=True,
        )
