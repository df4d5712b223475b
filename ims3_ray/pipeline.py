"""Runs a plan: skips what is committed, runs the rest, gathers results, writes report and tracking."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from ims3_ray.artifacts import Storage
from ims3_ray.cluster import connected
from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig, WorkConfig, canonical
from ims3_ray.errors import UserError
from ims3_ray.estimate import account, expect
from ims3_ray.plan import DERIVED, Config, Plan, make_comparison, make_evaluation, make_plan
from ims3_ray.results import Results, gather, stage_metrics, stage_row
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.s3 import Listener
from ims3_ray.tracking import Tracker


@dataclass(frozen=True)
class RunResult:
    """What a finished job leaves. ``results`` is the content of ``results.json``."""

    folder: str
    """Folder or URI of the run: ``report.html``, ``results.json`` and more."""
    results: Results

    @property
    def report(self) -> str:
        return f"{self.folder}/report.html"

    def accuracy(self, name: str, row: str | None = None, which: str = "last") -> float:
        """Mean test accuracy in per cent of a set (an arm's name), by the first row of the table or by ``row``; ``which`` is
        ``last``, ``best`` or ``val``."""
        rows = self.results["sets"][name]["rows"]
        return float(rows[row or next(iter(rows))][which]["mean"])


def distill(config: RunConfig | None = None) -> RunResult:
    """Run a distillation to its end, or continue one that was interrupted.

    Raises :class:`UserError` for bad input, a cluster too small for the plan, a tracking server that does not answer and
    a run folder that holds another config, each before anything is computed.
    """
    from ims3_ray.report.publish import publish

    return _complete(make_plan(config or RunConfig()), publish)


def evaluate(config: EvaluateConfig) -> RunResult:
    """Score sets of images that lie somewhere; continues and raises as :func:`distill`."""
    from ims3_ray.report.publish import publish_scores

    return _complete(make_evaluation(config), publish_scores)


def compare(config: CompareConfig) -> RunResult:
    """Run all arms at all numbers of images per class from shared artifacts; continues and raises as :func:`distill`."""
    from ims3_ray.report.publish import publish_comparison

    return _complete(make_comparison(config), publish_comparison)


Publish = Callable[[Context, Plan[Any], Results, Tracker], None]


def _complete(plan: Plan[Config], publish: Publish) -> RunResult:
    config = plan.config
    storage = Storage.at(config.storage)
    check_folder(config, storage)
    if not is_finished(plan, storage):
        if any(stage.missing(storage) for stage in plan.stages):
            warn_if_lost_with_job(config)
            with connected(config.cluster, plan.needed()):
                _run(plan, storage, publish)
        else:
            _run(plan, storage, publish)
    return RunResult(storage.address(config.name), json.loads(storage.read(f"{config.name}/results.json")))


def is_finished(plan: Plan[Config], storage: Storage) -> bool:
    """Whether the run folder holds the results of these very stages (of the same images, weights and code), and MLflow too."""
    name = plan.config.name
    if not (storage.exists(f"{name}/results.json") and storage.exists(f"{name}/report.html")):
        return False
    results = json.loads(storage.read(f"{name}/results.json"))
    same = [row["key"] for row in results["stages"]] == [stage.key(storage) for stage in plan.stages]
    return same and bool(results.get("mlflow", {}).get("complete"))


def _run(plan: Plan[Config], storage: Storage, publish: Publish) -> None:
    """Take the run folder, run what is missing, publish; MLflow knows how it ended."""
    config = plan.config
    tracker = Tracker(config, storage)
    context, expected = Context(config, storage, plan.classes, tracker), expect(plan, storage)
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(canonical(config), sort_keys=False).encode())
    try:
        run_stages(context, plan.stages)
        estimate = account(expected, context.spent, config.cluster)
        publish(context, plan, {**gather(plan, storage), "estimate": estimate}, tracker)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def check_folder(config: WorkConfig, storage: Storage) -> None:
    """:class:`UserError` if the run folder holds a run with another config. Where and how fast it runs does not matter."""
    path = f"{config.name}/config.yaml"
    if not storage.exists(path):
        return
    mine, theirs = (_what_matters(plain) for plain in (canonical(config), _completed(config, storage.read(path))))
    if theirs != mine:
        key, old, new = first_difference(theirs, mine)
        raise UserError(
            f"run folder '{storage.address(config.name)}' holds another config ({key}: {old!r} there, {new!r} here); "
            f"choose another name (name={config.name}-2) or delete the folder"
        )


def _completed(config: WorkConfig, stored: bytes) -> dict[str, Any]:
    """A stored config with the defaults of the options that have been added since it was written, at any depth."""
    plain: dict[str, Any] = yaml.safe_load(stored)
    try:
        return canonical(type(config).model_validate(plain))
    except ValidationError:  # it has options that are no more: they count as differences
        return plain


DETAILS = {
    "pool": ("mix_hardware",),
    "search": ("concurrent",),
    "evaluation": ("cpus_per_task", "gpus_per_task", "threads_per_task"),
}
"""Keys of sections that say where and how fast a run runs."""


def _what_matters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what may change between two commands that continue one run."""
    kept = {key: value for key, value in plain.items() if key not in ("storage", "cluster", "actors", "tracking")}
    for section, details in DETAILS.items():
        kept[section] = {key: value for key, value in plain.get(section, {}).items() if key not in details}
    return kept


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any]:
    """(dotted key, old value, new value) of the first place where two trees differ."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if a != b:
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                return first_difference(a, b, f"{prefix}{key}.")
            return prefix + key, a, b
    raise ValueError("the trees do not differ")


def run_stages(context: Context, stages: list[Stage]) -> None:
    """Run every stage that is not complete, in order; the evaluations, which depend on all else, at once in the end."""
    from ims3_ray.stages import evaluate, export, finetune, instability, modes, picked, refine, select, teacher
    from ims3_ray.stages.pool import check_decoded, produce

    single = {
        "modes": modes.run, "teacher": teacher.run, "instability": instability.run, "given": picked.run_given,
        "held_out": picked.run_held_out, "select": select.run, "refine": refine.run, "export": export.run,
    }  # fmt: skip
    storage = context.storage
    listeners: dict[Stage, list[Listener]] = {}  # held until the end, and with them the S3 actors
    for stage in stages:
        done = [stage]
        alike = [s for s in stages if s.kind == stage.kind]
        if stage.kind in ("encode", "generate", "finetune") and stage is not alike[-1]:
            continue  # those of a kind depend on nothing of each other: one pass makes them all
        if stage.kind in ("encode", "generate"):
            derived = {s: [d for d in stages if d.kind in DERIVED and d.inputs["images"] is s] for s in alike}
            if stage.kind == "generate":
                listeners = select.listen(context, stages)
            produce(context, derived, listeners)
            done = [*alike, *(d for found in derived.values() for d in found)]
            for encoded in alike if stage.kind == "encode" else []:
                check_decoded(context, encoded, _needed(stages) if encoded.label == "train" else 1)
        elif stage.kind in DERIVED or stage.kind == "evaluate":
            continue
        elif stage.kind == "finetune":
            finetune.run(context, alike)
            done = alike
        elif stage.missing(storage):
            single[stage.kind](context, stage)
        _log(context, done)
    waiting = [stage for stage in stages if stage.kind == "evaluate" and stage.missing(storage)]
    if waiting:
        evaluate.run_all(context, waiting)
        _log(context, waiting)


def _needed(stages: list[Stage]) -> int:
    """Real images that every class must have."""
    return max([stage.params["k"] for stage in stages if stage.kind in ("select", "modes")], default=1)


def _log(context: Context, stages: list[Stage]) -> None:
    for stage in stages:
        if not stage.missing(context.storage):
            context.tracker.metrics(stage_metrics(stage_row(stage, context.storage)))


def warn_if_lost_with_job(config: WorkConfig) -> None:
    if "://" not in config.storage and not os.path.isabs(config.storage) and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        print(
            f"warning: storage '{config.storage}' is relative, so results stay in the job's temporary folder on the head node; "
            "give storage=/absolute/path or s3://…",
            flush=True,
        )
