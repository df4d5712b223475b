"""The run of a job in MLflow: what is logged, by one thread of the driver."""

from __future__ import annotations

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ims3_ray.config import canonical
from ims3_ray.errors import masked
from ims3_ray.io.storage import Storage
from ims3_ray.tracking import database
from ims3_ray.tracking.entries import KIND, DistilledSet, datasets_of, digest_of, flat, hash_of, reason, refused, source_tags
from ims3_ray.tracking.places import CLIENT, Tracked, files_of, is_own, not_taken, note_of, tracking_uri

BATCH = 1000
"""Number of metrics that MLflow accepts in one call."""
LONGEST_PARAM = 6000
"""Maximum number of characters of a parameter's value that MLflow keeps."""
PARENT = "mlflow.parentRunId"
DIGEST = "ims3.digest"
"""Tag of a child run that holds a hash of its parameters and metrics."""
STAGES = "ims3.stages"
"""Tag of a run that holds a hash of the keys of its stages."""
WAIT_S = (1.0, 30.0)
"""Seconds between attempts to reach a lost server: initial value, maximum."""
Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Metric → its (step, value) pairs."""


class Untracked:
    """The interface through which running stages log, without effect: in a sweep, the driver later logs what they have
    stored."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log single values."""

    def losses(self, history: Sequence[Mapping[str, float]], prefix: str = "") -> None:
        """Log the rows of a fine-tuning as metrics ``{prefix}NAME``; steps that were logged before are skipped."""


class Tracker(Untracked):
    """The MLflow run of a run folder, created at first and continued after an interruption. ``keys`` are those of the stages
    that are known from the beginning: if the run in the folder was logged with other keys (other images, weights or code), a
    new run is created and the other one stays as it is.

    The methods that log return at once. Raises :class:`UserError` if a server does not accept a new run. A server that is lost
    later is tried again until the job ends; :attr:`complete` then says whether it has received everything.
    """

    def __init__(self, config: Tracked, storage: Storage, keys: Sequence[str | None] = ()) -> None:
        os.environ.update({name: os.environ.get(name, value) for name, value in CLIENT.items()})
        import mlflow

        for noisy in ("mlflow", "alembic"):  # hides messages about the creation of a database
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.config, self.storage, self.uri = config, storage, tracking_uri(config, storage)
        self.complete, self.run_id, self.experiment_id = True, "", ""
        self._stages = hash_of(list(keys))
        self._connect = partial(mlflow.MlflowClient, self.uri)  # not set_tracking_uri, which affects later runs too
        self._client: Any = None
        self._logged: dict[str, int] = {}
        """Metric of losses → the last of its steps that MLflow has."""
        self._children: dict[str, tuple[str, str, str]] | None = None
        self._note = note_of(config)
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._warned, self._away, self._leaving = False, False, threading.Event()
        if self.uri.startswith("sqlite"):
            storage.make_folder(config.name)
        if not is_own(config) and not storage.exists(self._note):
            try:
                self._begin()
            except Exception as error:
                raise not_taken(self.uri, error) from error
        self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def entry(self) -> dict[str, Any]:
        """What ``results.json`` says of the run: its id, whether MLflow has everything, the path of its page, and the tracking
        URI, which is None for a database in the run folder."""
        page = f"/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        uri = None if is_own(self.config) else masked(self.uri)
        return {"run": self.run_id, "complete": self.complete, "page": page, "uri": uri}

    @property
    def client(self) -> Any:
        """MLflow's client, after a wait until all logging calls are done."""
        self._calls.join()
        return self._client

    # Logging

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._tell(partial(self._log, None, {name: [(step, value)] for name, value in values.items()}))

    def losses(self, history: Sequence[Mapping[str, float]], prefix: str = "") -> None:
        self._tell(partial(self._log_losses, list(history), prefix))

    def child(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], curves: Curves, *, failed: str = ""
    ) -> None:
        """Log a finished child run, or a failed one if ``failed`` holds a reason, with its curves as metrics with steps. A
        finished child run with the same parameters and metrics is kept as it is."""
        self._tell(partial(self._log_child, name, dict(params), dict(metrics), dict(curves), failed))

    def forget_failure(self, name: str) -> None:
        """Delete the child run of that name if it failed."""
        self._tell(partial(self._delete_child, name, "FAILED"))

    def file(self, name: str, data: bytes) -> None:
        """Log a file; ``name`` may have folders in it."""
        self._tell(partial(self._log_file, name, data))

    def inputs(self, found: Mapping[str, Any], path: str, distilled: DistilledSet | None = None) -> None:
        """Log the data and the weights of :func:`ims3_ray.provenance.provenance` as MLflow's datasets and models, and the
        distilled set as a dataset; ``path`` is that of the data."""
        self._tell(partial(self._log_inputs, dict(found), path, distilled))

    def finish(self, status: str) -> None:
        """Set the status of the run: FINISHED, FAILED or KILLED. Waits for the remaining calls; calls that fail from now on are
        not repeated."""
        self._tell(lambda: self._client.set_terminated(self.run_id, status))
        self._leaving.set()
        self._calls.put(None)
        self._thread.join()
        if not self.complete:
            print(
                f"warning: MLflow at '{masked(self.uri)}' has not taken everything; nothing is lost, and the same command "
                "tells it the rest",
                flush=True,
            )

    def _tell(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    # Methods of the writing thread

    def _write(self) -> None:
        self._try(self._begin)
        while (call := self._calls.get()) is not None:
            if self.run_id and not self._away:
                self._try(call)
            self._calls.task_done()

    def _try(self, call: Callable[[], None]) -> None:
        """Repeat ``call`` until the server has accepted or refused it, but no longer once the job has ended."""
        wait, most = WAIT_S
        while True:
            try:
                call()
                return
            except Exception as error:
                final = refused(error)
                if not self._warned:
                    how = "refuses an entry" if final else "does not answer"
                    print(f"warning: MLflow at '{masked(self.uri)}' {how} ({reason(error)}); the run goes on", flush=True)
                self._warned = True
                if final or self._leaving.wait(wait):
                    self.complete, self._away = False, not final
                    return
                wait = min(2 * wait, most)

    def _begin(self) -> None:
        """Continue the run of an interrupted job of the same stages, or create a new one."""
        if self.run_id:
            return
        from mlflow.exceptions import MlflowException

        files = files_of(self.config, self.storage, self.uri)
        if is_own(self.config) and files is not None:
            database.prepare(files.with_name("mlflow.db"), files)
        self._client = self._connect()
        if self.storage.exists(self._note):
            known = self.storage.read(self._note).decode()
            try:
                found = self._client.get_run(known)
                if found.data.tags.get(STAGES, self._stages) == self._stages:  # earlier versions set no such tag
                    self._client.update_run(known, status="RUNNING")
                    self.experiment_id, self.run_id = found.info.experiment_id, known
                    return
            except MlflowException as error:
                if not refused(error):
                    raise
                # another server, or one that has lost its database: everything is logged to a new run
        self.experiment_id = self._experiment()
        tags = source_tags() | {STAGES: self._stages}
        run_id = self._client.create_run(self.experiment_id, run_name=self.config.name, tags=tags).info.run_id
        self._log_params(run_id, dict(flat(canonical(self.config))))
        self.storage.write(self._note, run_id.encode())
        self.run_id = run_id

    def _experiment(self) -> str:
        config = self.config
        found = self._client.get_experiment_by_name(config.tracking.experiment)
        if found is not None:
            if is_own(config) and not found.tags.keys() & KIND.keys():  # of an earlier version
                for key, value in KIND.items():
                    self._client.set_experiment_tag(found.experiment_id, key, value)
            return str(found.experiment_id)
        files = files_of(config, self.storage, self.uri)
        location = files.as_uri() if files is not None else None
        return str(self._client.create_experiment(config.tracking.experiment, artifact_location=location, tags=KIND))

    def _log_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in values.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])

    def _log(self, run_id: str | None, curves: Curves) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(key, value, now, step) for key, curve in curves.items() for step, value in curve]
        for start in range(0, len(entries), BATCH):
            self._client.log_batch(run_id or self.run_id, metrics=entries[start : start + BATCH])

    def _log_losses(self, history: Sequence[Mapping[str, float]], prefix: str) -> None:
        key = f"{prefix}loss"
        if key not in self._logged:  # an interrupted run may have logged some
            found = self._client.get_metric_history(self.run_id, key)
            self._logged[key] = max((metric.step for metric in found), default=0)
        rows = [row for row in history if row["step"] > self._logged[key]]
        names = {name for row in rows for name in row if name != "step"}
        self._log(None, {prefix + name: [(int(row["step"]), row[name]) for row in rows if name in row] for name in names})
        self._logged[key] = max([self._logged[key], *(int(row["step"]) for row in rows)])

    def _log_child(
        self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], curves: Curves, failed: str
    ) -> None:
        status, digest = "FAILED" if failed else "FINISHED", digest_of(params, metrics)
        if self._known_children().get(name, ("", "", ""))[1:] == ("FINISHED", digest):
            return
        self._delete_child(name)  # it was logged in part, has failed, or has other values
        tags = {PARENT: self.run_id, DIGEST: digest} | ({"error": failed} if failed else {})
        run_id = self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        self._known_children()[name] = (run_id, "RUNNING", digest)
        self._log_params(run_id, params)
        self._log(run_id, {**{key: [(0, value)] for key, value in metrics.items()}, **curves})
        self._client.set_terminated(run_id, status)
        self._known_children()[name] = (run_id, status, digest)

    def _delete_child(self, name: str, status: str = "") -> None:
        """Delete the child run of that name, if there is one (and if it has that ``status``, where one is given)."""
        run_id, how, _ = self._known_children().get(name, ("", "", ""))
        if run_id and status in ("", how):
            self._client.delete_run(run_id)
            del self._known_children()[name]

    def _log_inputs(self, found: Mapping[str, Any], path: str, distilled: DistilledSet | None) -> None:
        from mlflow.entities import LoggedModelInput
        from mlflow.exceptions import MlflowException

        if self._client.get_run(self.run_id).inputs.dataset_inputs:
            return  # an interrupted run has logged them
        told = [distilled.entity(self.config.name)] if distilled is not None else []
        self._client.log_inputs(self.run_id, [*datasets_of(found["data"], path), *told])
        try:
            models = [LoggedModelInput(self._logged_model(key, digest)) for key, digest in found["weights"].items()]
            self._client.log_inputs(self.run_id, models=models)
        except MlflowException as error:
            if not refused(error):
                raise
            # a server of MLflow 2, which knows no models of this kind: params and files name the weights, too

    def _logged_model(self, key: str, digest: str) -> str:
        """Log weights that the run takes, given as model and reference; returns the id of MLflow's model."""
        name, _, reference = key.partition(" ")
        params = {"reference": reference, "digest": digest}
        model = self._client.create_logged_model(self.experiment_id, name, self.run_id, params=params, model_type=name)
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _known_children(self) -> dict[str, tuple[str, str, str]]:
        """Name → (id, status, digest) of the child runs that MLflow has."""
        if self._children is None:
            found: dict[str, tuple[str, str, str]] = {}
            page: str | None = None
            while page != "":
                own = f"tags.`{PARENT}` = '{self.run_id}'"
                runs = self._client.search_runs([self.experiment_id], own, max_results=1000, page_token=page)
                found |= {r.info.run_name: (r.info.run_id, r.info.status, r.data.tags.get(DIGEST, "")) for r in runs}
                page = runs.token or ""
            self._children = found
        return self._children

    def _log_file(self, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(name).name)
            path.write_bytes(data)
            self._client.log_artifact(self.run_id, str(path), str(Path(name).parent) if "/" in name else None)
