"""Runs a plan: skips what is committed, runs the rest, gathers results, writes report and tracking."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import yaml

from ims3_ray.cluster.joining import connected
from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig, canonical
from ims3_ray.engine.executor import repairing, run_stages
from ims3_ray.engine.folder import check_folder, warn_if_lost_with_job
from ims3_ray.engine.lease import check_free, working_on
from ims3_ray.engine.stage import Context
from ims3_ray.io.storage import Storage
from ims3_ray.plan import Config, Plan, make_comparison, make_evaluation, make_plan
from ims3_ray.plan.estimate import account, expect
from ims3_ray.progress import Course
from ims3_ray.report.publish import CARD, publish, publish_comparison, publish_scores
from ims3_ray.report.results import Results, RunResult, gather
from ims3_ray.tracking import Tracker, follow_moved_folder


def distill(config: RunConfig | None = None) -> RunResult:
    """Run a distillation to its end, or continue one that was interrupted.

    Raises :class:`UserError` for bad input, a cluster too small for the plan, a tracking server that does not answer and
    a run folder that holds another config, each before anything is computed.
    """
    return _complete(make_plan(config or RunConfig()), publish)


def evaluate(config: EvaluateConfig) -> RunResult:
    """Score existing sets of images; continues and raises as :func:`distill` does."""
    return _complete(make_evaluation(config), publish_scores)


def compare(config: CompareConfig) -> RunResult:
    """Run all arms at all numbers of images per class from shared artifacts; continues and raises as :func:`distill` does."""
    return _complete(make_comparison(config), publish_comparison)


Publish = Callable[[Context, Plan[Any], Results, Tracker], None]


def _complete(plan: Plan[Config], publish: Publish) -> RunResult:
    config = plan.config
    storage = Storage.at(config.storage)
    check_folder(config, storage)
    if is_finished(plan, storage):
        follow_moved_folder(config, storage)
    else:
        check_free(storage, config.name)
        needs_ray = any(stage.missing(storage) for stage in plan.stages)
        if needs_ray:
            warn_if_lost_with_job(config)
        with connected(config.cluster, plan.needed()) if needs_ray else nullcontext(), working_on(storage, config.name):
            _run(plan, storage, publish)
    return RunResult(storage.address(config.name), storage.read_json(f"{config.name}/results.json") or {})


def is_finished(plan: Plan[Config], storage: Storage) -> bool:
    """Whether the run folder holds the results of exactly these stages (same images, weights and code) and sets with their
    report and the exported set, and MLflow has all of them."""
    name = plan.config.name
    results = storage.read_json(f"{name}/results.json")
    files = ["report.html", *([f"distilled/{CARD}"] if plan.export is not None else [])]
    if results is None or not all(storage.exists(f"{name}/{file}") for file in files):
        return False
    same_stages = [row["key"] for row in results.get("stages", [])] == plan.keys(storage)
    same_sets = list(results.get("sets", {})) == list(plan.sets)
    return same_stages and same_sets and bool(results.get("mlflow", {}).get("complete"))


def _run(plan: Plan[Config], storage: Storage, publish: Publish) -> None:
    """Write the config to the run folder, run the missing stages and publish the results. An error sets the status of the
    MLflow run to KILLED (if interrupted) or FAILED."""
    config = plan.config
    tracker = Tracker(config, storage, plan.first_keys(storage))
    expected = expect(plan, storage)
    course = Course({each.stage: each.wall_seconds(config) for each in expected if each.missing})
    context = Context(config, storage, plan.classes, tracker, course=course)
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(canonical(config), sort_keys=False).encode())

    def run_and_publish() -> None:
        run_stages(context, plan.stages)
        estimate = account(expected, context.spent, config.cluster)
        publish(context, plan, {**gather(plan, storage), "estimate": estimate}, tracker)

    try:
        repairing(storage, run_and_publish)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
