"""The Ray Tune driver of a search."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune import Callback

from ims3_ray.cluster.joining import connected, most_at_once
from ims3_ray.config import SweepConfig, canonical
from ims3_ray.config.sweep import Range, Settings, trial_title
from ims3_ray.engine.executor import run_stages
from ims3_ray.engine.folder import check_folder, warn_if_lost_with_job
from ims3_ray.engine.lease import check_free, working_on
from ims3_ray.engine.stage import Context
from ims3_ray.errors import IncompletePool
from ims3_ray.io.storage import Storage
from ims3_ray.plan.layout import Plan
from ims3_ray.plan.sweep import SweepPlan, id_of, make_sweep
from ims3_ray.progress import Progress
from ims3_ray.report.results import RunResult
from ims3_ray.search.publish import publish_sweep, tell
from ims3_ray.search.records import Record, Tried, error_path, farthest, objective_of, read_records
from ims3_ray.search.results import describe_sweep, gather_sweep
from ims3_ray.search.shell import settings_of, wait_for_trial
from ims3_ray.search.trial import Shared, TrialBoard, on_this_node
from ims3_ray.tracking import Tracker, follow_moved_folder

QUIET = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # SIGINT interrupts the search and is not handled by Tune
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output has no silent mode
}
READ_EVERY_S = 2.0


def sweep(config: SweepConfig | None = None) -> RunResult:
    """Run a search, or continue one that was interrupted.

    Raises the errors of :func:`ims3_ray.commands.distill.distill`, and at the end :class:`IncompletePool` if trials failed; all
    others have then run and their results are published.
    """
    plan = make_sweep(config or SweepConfig())
    config, storage = plan.config, Storage.at(plan.config.storage)
    check_folder(config, storage)
    print(describe_sweep(plan), flush=True)
    if (trials := trials_there(plan, storage)) is None:
        warn_if_lost_with_job(config)
        check_free(storage, config.name)
        with connected(config.cluster, needed(plan)), working_on(storage, config.name):
            _run(plan, storage, None)
    elif not _is_told(config, storage):
        with working_on(storage, config.name):
            _run(plan, storage, trials)
    else:
        follow_moved_folder(config, storage)
    found = storage.read_json(f"{config.name}/results.json") or {}
    if found.get("failed"):
        first = found["failed"][0]
        raise IncompletePool(
            f"{len(found['failed'])} of {plan.count} trials failed, e.g. {trial_title(first['settings'])}: {first['error']}; "
            f"{storage.address(config.name)}/report.html has the others, the same command tries again"
        )
    return RunResult(storage.address(config.name), found)


def needs(plan: SweepPlan) -> dict[str, float]:
    """The largest amount of each resource that a trial takes at a time."""
    stages = [*plan.stages, *(stage for trial in plan.trials for stage in trial.stages)]
    return Plan(plan.config, plan.classes, stages).needed()


def needed(plan: SweepPlan) -> dict[str, float]:
    """The largest amount of each resource that the search takes at a time, with as many trials as the config asks for."""
    return {kind: value * (plan.config.search.concurrent or 1) for kind, value in needs(plan).items()}


def trials_there(plan: SweepPlan, storage: Storage) -> list[Tried] | None:
    """The trials of a search that has ended; None if it has not, if a trial failed, or if data, weights or code differ."""
    config, path = plan.config, f"{plan.config.name}/results.json"
    results = storage.read_json(path)
    if results is None:
        return None
    trials = [
        Tried(found["settings"], read_records(config, storage, found["settings"], config.draws)[: len(found["keys"])])
        for found in results["trials"]
    ]
    same = all(
        record["keys"] == plan.trial(tried.settings, record["draw"]).keys(storage)
        for tried in trials
        for record in tried.records
    )
    whole = not results["failed"] and all(tried.records for tried in trials)
    return trials if whole and same and results["keys"] == plan.keys(storage) else None


def _is_told(config: SweepConfig, storage: Storage) -> bool:
    """Whether MLflow has received everything, and the report and the config of the best point still exist."""
    results = storage.read_json(f"{config.name}/results.json") or {}
    files = ["report.html", *(["best.yaml"] if results.get("best") else [])]
    there = all(storage.exists(f"{config.name}/{file}") for file in files)
    return bool(results.get("mlflow", {}).get("complete") and there)


def _run(plan: SweepPlan, storage: Storage, trials: list[Tried] | None) -> None:
    """Run the trials, unless they are given, and publish the results."""
    config = plan.config
    tracker = Tracker(config, storage, plan.first_keys(storage))
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(canonical(config), sort_keys=False).encode())
    try:
        if trials is None:
            run_stages(Context(config, storage, plan.classes, tracker), plan.stages)
            trials = Search(plan, storage, tracker).run()
        else:
            for tried in trials:
                tell(plan, tried, tracker)
        publish_sweep(plan, gather_sweep(plan, trials, storage), storage, tracker)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


class Search(Callback):
    """Runs the trials on Ray Tune, which calls it when a trial ends. All its state can be read again from the storage."""

    def __init__(self, plan: SweepPlan, storage: Storage, tracker: Tracker) -> None:
        self.plan, self.config, self.storage, self.tracker = plan, plan.config, storage, tracker
        self.trials: list[Tried] = []
        self.read = time.monotonic()
        self.progress = Progress("sweep", plan.count, "trials")

    def __getstate__(self) -> dict[str, Any]:
        """Tune stores its callbacks in order to resume; nothing is stored, since a search resumes from its records."""
        return {}

    def run(self) -> list[Tried]:
        """Run all trials. A trial that fails does not stop the others."""
        search, folder = self.config.search, tempfile.mkdtemp(prefix="ims3-tune-")
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported here, in one line each
        concurrent = self._concurrent()
        assert self.plan.planner is not None
        shared = Shared(
            self.config, self.storage, self.plan.planner.data.fingerprints, self._shared_stages(), self._students(concurrent)
        )  # fmt: skip
        self.board = on_this_node(TrialBoard).remote(shared)
        shell = tune.with_parameters(wait_for_trial, board=self.board, draws=self.config.draws)
        # The processes of trials run on the driver's node, so that no other node's failure ends them. They reserve no CPU, not
        # even a fraction: on a small cluster no room would be left for the workers of their stages, and all would hang.
        resources = tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.0001}])
        space, algorithm = self._space()
        try:
            with self.progress:
                tune.Tuner(
                    tune.with_resources(shell, resources),
                    param_space=space,
                    tune_config=tune.TuneConfig(
                        metric="objective", mode="max", search_alg=algorithm, scheduler=self._scheduler(),
                        num_samples=search.trials if algorithm else 1, max_concurrent_trials=concurrent,
                        reuse_actors=True, trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
                    ),
                    run_config=tune.RunConfig(name="tune", storage_path=folder, callbacks=[self], verbose=0),
                ).fit()  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found, last = farthest(self.trials), {id_of(tried.settings): tried for tried in self.trials}
        for tried in found:
            if tried is not last[id_of(tried.settings)]:
                tell(self.plan, tried, self.tracker)  # what was told last is of a repetition
        return found

    def _shared_stages(self) -> bool:
        """Whether trials share a stage that two of them must not make at once."""
        if self.config.search.method == "optuna":  # its later settings are not known yet
            return any(stage.exclusive for trial in self.plan.trials for stage in trial.stages)
        keys = [stage.key(self.storage) for trial in self.plan.trials for stage in trial.stages if stage.exclusive]
        return len(set(keys)) < len(keys)

    def _concurrent(self) -> int:
        if self.config.search.concurrent:
            return self.config.search.concurrent
        have = ray.cluster_resources()
        return max(1, min(math.floor(have.get(kind, 0) / value) for kind, value in needs(self.plan).items()))

    def _students(self, concurrent: int) -> int:
        """Number of students that fit into a trial's share of the cluster."""
        e, have, least = self.config.evaluation, ray.cluster_resources(), needs(self.plan)
        each = {"CPU": e.cpus_per_task, "GPU": e.gpus_per_task}
        share = {kind: max(have.get(kind, 0) / concurrent, least.get(kind, 0)) for kind in each}
        fit = max(1, min(math.floor(share[kind] / value) for kind, value in each.items() if value))
        limit = most_at_once(self.config.cluster, e.cpus_per_task)
        return fit if limit is None else min(fit, max(1, limit // concurrent))

    def _space(self) -> tuple[dict[str, Any], Any]:
        """Tune's search space, and the search algorithm that draws from it; None if the space is a grid."""
        config = self.config
        if config.search.method != "optuna":
            return {"settings": tune.grid_search(config.outer())}, None
        from ray.tune.search.optuna import OptunaSearch

        outer = {key: values for key, values in config.values.items() if key in config.outer()[0]}
        folder = f"{config.name}/trials"
        begun = sorted(name for name in self.storage.names(folder) if name.endswith(".settings"))
        read = [self.storage.read_json(f"{folder}/{name}") for name in begun]
        known = [settings for settings in read if settings is not None]  # settings of begun trials come first
        algorithm = OptunaSearch(
            metric="objective", mode="max", seed=config.search.seed + len(known),
            points_to_evaluate=known[: config.search.trials] or None,
        )  # fmt: skip
        return {key: _domain(values) for key, values in outer.items()}, algorithm

    def _scheduler(self) -> Any:
        search = self.config.search
        if not search.early_stopping:
            return None
        from ray.tune.schedulers import ASHAScheduler

        return ASHAScheduler(
            time_attr="draws", max_t=len(self.config.draws), grace_period=1, reduction_factor=search.reduction
        )  # fmt: skip

    # Callbacks of Tune

    def on_step_end(self, iteration: int, trials: Sequence[Any], **_: Any) -> None:
        if time.monotonic() - self.read > READ_EVERY_S:
            self.read = time.monotonic()
            for line in ray.get(self.board.read.remote()):
                self.progress.line(line)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        self._note(trial, "")

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        path = error_path(self.config, settings_of(trial.config))
        known = self.storage.exists(path)  # no file if the trial's process has died
        self._note(trial, self.storage.read(path).decode() if known else "its process has died")

    def _note(self, trial: Any, error: str) -> None:
        settings = settings_of(trial.config)
        tried = Tried(settings, [] if error else self._records(settings, trial.last_result.get("draws", 0)), error)
        self.trials.append(tried)
        tell(self.plan, tried, self.tracker)
        found = error or f"{objective_of(self.config, tried.records):.2f}"
        where = f"trial {len(self.trials)}/{self.plan.count}, {trial_title(settings)}"
        self.progress.line(f"{where}: {tried.status(self.config)}, {found}")
        self.progress.at(len(self.trials))

    def _records(self, settings: Settings, run: int) -> list[Record]:
        """The records of a trial that has run its first ``run`` draws: those of all draws if an earlier attempt has made the
        others from the same data, weights and code."""
        records = read_records(self.config, self.storage, settings, self.config.draws)
        others = records[run:] if len(records) == len(self.config.draws) else []
        same = all(record["keys"] == self.plan.trial(settings, record["draw"]).keys(self.storage) for record in others)
        return records if others and same else records[:run]


def _domain(values: list[Any] | Range) -> Any:
    """Tune's distribution of a list of values or of a range."""
    if isinstance(values, list):
        return tune.choice(values)
    if values.integer:
        draw = tune.lograndint if values.log else tune.randint
        return draw(round(values.low), round(values.high) + 1)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)
