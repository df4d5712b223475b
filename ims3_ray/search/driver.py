"""The Ray Tune driver of a search."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune import Callback

from ims3_ray.artifacts import Storage
from ims3_ray.cluster import connected, results
from ims3_ray.config import SweepConfig, canonical
from ims3_ray.config.sweep import Range, Settings, title_of
from ims3_ray.errors import IncompletePool
from ims3_ray.pipeline import RunResult, check_folder, run_stages, warn_if_lost_with_job
from ims3_ray.plan.layout import Plan
from ims3_ray.plan.sweep import SweepPlan, generator_of, id_of, make_sweep
from ims3_ray.progress import Progress
from ims3_ray.report.sweep import publish_sweep, tell
from ims3_ray.search.results import Tried, describe_sweep, gather_sweep, objective_of
from ims3_ray.search.trial import Board, Record, Shared, on_this_node, record_path, trials_actor
from ims3_ray.stages.base import Context
from ims3_ray.tracking import Tracker

QUIET = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interruption is an interruption
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one has no silent mode
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
TINY_CPU = 0.01
"""What a trial reserves itself: Tune takes no less, and what it starts reserves its own."""
READ_EVERY_S = 2.0
DEATHS = 3
"""Times that a trial starts its actor again."""


def sweep(config: SweepConfig | None = None) -> RunResult:
    """Search, or continue a search that was interrupted.

    Raises as :func:`ims3_ray.pipeline.distill`, and in the end :class:`IncompletePool` if trials failed; the others are done
    and their results published.
    """
    config = config or SweepConfig()
    plan, storage = make_sweep(config), Storage.at(config.storage)
    check_folder(config, storage)
    print(describe_sweep(plan), flush=True)
    if not is_finished(plan, storage):
        warn_if_lost_with_job(config)
        needed = {kind: value * (config.search.concurrent or 1) for kind, value in needs(plan).items()}
        with connected(config.cluster, needed):
            _run(plan, storage)
    found = json.loads(storage.read(f"{config.name}/results.json"))
    if found["failed"]:
        first = found["failed"][0]
        raise IncompletePool(
            f"{len(found['failed'])} of {plan.count} trials failed, e.g. {title_of(first['settings'])}: {first['error']}; "
            f"{storage.address(config.name)}/report.html has the others, the same command tries again"
        )
    return RunResult(storage.address(config.name), found)


def needs(plan: SweepPlan) -> dict[str, float]:
    """The largest share of the cluster that a trial takes at a time."""
    stages = [*plan.stages, *(stage for trial in plan.trials for stage in trial.stages)]
    return Plan(plan.config, plan.classes, stages).needed()


def is_finished(plan: SweepPlan, storage: Storage) -> bool:
    """Whether the folder holds all trials, of the same data, weights and code, none failed, and MLflow knows."""
    path = f"{plan.config.name}/results.json"
    if not (storage.exists(path) and storage.exists(f"{plan.config.name}/report.html")):
        return False
    results = json.loads(storage.read(path))
    known = {(id_of(trial["settings"]), int(draw)): keys for trial in results["trials"] for draw, keys in trial["keys"].items()}
    expected = {(id_of(trial.settings), trial.draw): trial.keys(storage) for trial in plan.trials}
    same = all(known.get(which, keys) == keys for which, keys in expected.items())
    whole = not results["failed"] and len(results["trials"]) == plan.count and results["mlflow"]["complete"]
    return bool(whole and same and results["keys"] == [stage.key(storage) for stage in plan.stages])


def _run(plan: SweepPlan, storage: Storage) -> None:
    config = plan.config
    tracker = Tracker(config, storage)
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(canonical(config), sort_keys=False).encode())
    try:
        run_stages(Context(config, storage, plan.classes, tracker), plan.stages)
        search = Search(plan, storage, tracker)
        search.run()
        publish_sweep(plan, gather_sweep(plan, search.trials, storage), storage, tracker)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


class Search(Callback):
    """Hands settings to Ray Tune and hears of each trial's end. All it knows can be read again from the storage."""

    def __init__(self, plan: SweepPlan, storage: Storage, tracker: Tracker) -> None:
        self.plan, self.config, self.storage, self.tracker = plan, plan.config, storage, tracker
        self.trials: list[Tried] = []
        self.read = time.monotonic()
        self.progress = Progress("sweep", plan.count, "trials")

    def __getstate__(self) -> dict[str, Any]:
        """Tune stores what it is given, to continue by; a search continues by its records."""
        return {}

    def run(self) -> None:
        """Try all. A trial that fails stops no other."""
        search, folder = self.config.search, tempfile.mkdtemp(prefix="ims3-tune-")
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told here, in a line each
        self.board = on_this_node(Board).remote()
        concurrent = self._concurrent()
        shared = Shared(self.config, self.storage, self.plan.fingerprints, self.board, self._students(concurrent))
        node = f"node:{ray.util.get_node_ip_address()}"  # it fails with the driver alone
        resources = tune.PlacementGroupFactory([{"CPU": TINY_CPU, node: 0.0001}])
        space, algorithm = self._space()
        try:
            with self.progress:
                tune.Tuner(
                    tune.with_resources(tune.with_parameters(trainable, shared=shared), resources),
                    param_space=space,
                    tune_config=tune.TuneConfig(
                        metric="objective", mode="max", search_alg=algorithm, scheduler=self._scheduler(),
                        num_samples=search.trials if algorithm else 1, max_concurrent_trials=concurrent,
                        trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
                    ),
                    run_config=tune.RunConfig(name="tune", storage_path=folder, callbacks=[self], verbose=0),
                ).fit()  # fmt: skip
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.trials.sort(key=lambda tried: json.dumps(tried.settings, sort_keys=True))

    def _concurrent(self) -> int:
        if self.config.search.concurrent:
            return self.config.search.concurrent
        have = ray.cluster_resources()
        return max(1, min(math.floor(have.get(kind, 0) / value) for kind, value in needs(self.plan).items()))

    def _students(self, concurrent: int) -> int:
        """That fit into a trial's share of the cluster."""
        e, have, least = self.config.evaluation, ray.cluster_resources(), needs(self.plan)
        each = {"CPU": e.cpus_per_task, "GPU": e.gpus_per_task}
        share = {kind: max(have.get(kind, 0) / concurrent, least.get(kind, 0)) for kind in each}
        return max(1, min(math.floor(share[kind] / value) for kind, value in each.items() if value))

    def _space(self) -> tuple[dict[str, Any], Any]:
        """Tune's space, and what chooses from it if not the space itself."""
        config = self.config
        if config.search.method != "optuna":
            return {"settings": tune.grid_search(config.outer())}, None
        from ray.tune.search.optuna import OptunaSearch

        outer = {key: values for key, values in config.values.items() if key in config.outer()[0]}
        known = [
            json.loads(self.storage.read(f"{config.name}/trials/{name}"))["settings"]
            for name in sorted(self.storage.names(f"{config.name}/trials"))
            if name.endswith(".json")
        ]
        distinct = list({id_of(settings): settings for settings in known}.values())  # begins with what it knows
        algorithm = OptunaSearch(
            metric="objective", mode="max", seed=config.search.seed, points_to_evaluate=distinct[: config.search.trials] or None
        )
        return {key: _domain(values) for key, values in outer.items()}, algorithm

    def _scheduler(self) -> Any:
        search = self.config.search
        if not search.early_stopping:
            return None
        from ray.tune.schedulers import ASHAScheduler

        return ASHAScheduler(
            time_attr="draws", max_t=len(self.config.draws), grace_period=1, reduction_factor=search.reduction
        )  # fmt: skip

    # What Tune tells

    def on_step_end(self, iteration: int, trials: Sequence[Any], **_: Any) -> None:
        if time.monotonic() - self.read > READ_EVERY_S:
            self.read = time.monotonic()
            for line in ray.get(self.board.read.remote()):
                self.progress.line(line)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        self._note(trial, "")

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **_: Any) -> None:
        path = error_path(self.config, settings_of(trial.config))
        known = self.storage.exists(path)  # not if the trial's process has died
        self._note(trial, self.storage.read(path).decode() if known else "its process has died")

    def _note(self, trial: Any, error: str) -> None:
        settings = settings_of(trial.config)
        paths = [record_path(self.config, settings, draw) for draw in self.config.draws]
        records = [json.loads(self.storage.read(path)) for path in paths if self.storage.exists(path)]
        tried = Tried(settings, records[: trial.last_result.get("draws", 0)] if not error else [], error)
        self.trials.append(tried)
        tell(self.plan, tried, self.tracker)
        found = f"failed: {error}"
        if not error:
            stopped = "" if len(records) == len(self.config.draws) else f", stopped after {len(tried.records)} draws"
            found = f"{objective_of(self.config, tried.records):.2f}{stopped}"
        self.progress.line(f"trial {len(self.trials)}/{self.plan.count}, {title_of(settings)}: {found}")
        self.progress.at(len(self.trials))


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The outer setting that Tune gave a trial."""
    return dict(config.get("settings", config))


def trainable(chosen: dict[str, Any], shared: Shared) -> None:
    """What Tune runs: the draws of a setting one after another, each with the mean so far."""
    config, settings, records = shared.config, settings_of(chosen), []
    try:
        for draw in config.draws:
            records.append(_record(shared, settings, draw))
            tune.report({"objective": objective_of(config, records), "draws": len(records)})
    except Exception as error:  # Tune tells its driver that there was one, not which
        shared.storage.write(error_path(config, settings), _reason(error).encode())
        raise


def error_path(config: SweepConfig, settings: Settings) -> str:
    return f"{config.name}/trials/{id_of(settings)}.error"


def _record(shared: Shared, settings: Settings, draw: int) -> Record:
    name = f"trials-{generator_of(settings, draw)}-{id_of({'at': shared.storage.address(shared.config.name)})}"
    deaths = 0
    while True:
        try:
            record: Record = results(trials_actor(name, shared).run.remote(settings, draw))
            return record
        except ray.exceptions.RayActorError as error:
            deaths += "owner" not in str(error)  # it ends with the trial that started it, which is no failure
            if deaths > DEATHS:
                raise


def _domain(values: list[Any] | Range) -> Any:
    """As Tune draws it."""
    if isinstance(values, list):
        return tune.choice(values)
    if values.integer:
        return tune.randint(round(values.low), round(values.high) + 1)
    return tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)


def _reason(error: BaseException) -> str:
    """The last line of what a trial died of, without the name of its class."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return re.sub(r"^(\w+\.)*\w+(Error|Pool): ", "", last)
