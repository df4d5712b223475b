"""MLflow: one run per distillation, one child run per arm. The driver is the only writer."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ims3_ray.artifacts import Storage
from ims3_ray.config import WorkConfig, canonical
from ims3_ray.errors import UserError

BATCH = 1000
"""Metrics that MLflow takes at once."""
LONGEST_PARAM = 6000
"""Characters that MLflow keeps of a parameter's value."""
PARENT = "mlflow.parentRunId"


def slug(title: str) -> str:
    """A title as MLflow takes it in names."""
    return re.sub(r"\W+", "_", title.replace("+", "and")).strip("_")


def tracking_uri(config: WorkConfig, storage: Storage) -> str:
    """The configured URI, that of ``MLFLOW_TRACKING_URI``, or a sqlite file in the run folder.

    Raises :class:`UserError` where none is given and the run folder is remote.
    """
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = storage.local_path(f"{config.name}/mlflow.db")
    if local is None:
        raise UserError("storage is remote, where sqlite cannot live; set tracking.uri or MLFLOW_TRACKING_URI to a server")
    return f"sqlite:///{local}"


class Tracker:
    """The MLflow run of a run folder, created at first and continued after an interruption.

    Raises :class:`UserError` if the tracking server does not answer.
    """

    def __init__(self, config: WorkConfig, storage: Storage) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        import mlflow
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        for noisy in ("mlflow", "alembic"):  # the creation of a fresh database is no news
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self.logged: dict[str, int] = {}
        """The last step that MLflow has of a series of losses."""
        uri = tracking_uri(config, storage)
        if uri.startswith("sqlite"):
            storage.make_folder(config.name)
        note = f"{config.name}/mlflow_run_id"
        try:
            self.client = mlflow.MlflowClient(uri)  # not set_tracking_uri, which would reach into later runs of this process
            if storage.exists(note):
                self.run_id = storage.read(note).decode()
                self.experiment_id = self.client.get_run(self.run_id).info.experiment_id
                self.client.update_run(self.run_id, status="RUNNING")
                return
            self.experiment_id = self._experiment(config, storage)
            self.run_id = self.client.create_run(self.experiment_id, run_name=config.name).info.run_id
            self.params(dict(_flat(canonical(config))))
        except (MlflowException, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"MLflow at '{uri}' does not take the run ({reason}); check tracking.uri") from error
        storage.write(note, self.run_id.encode())

    def _experiment(self, config: WorkConfig, storage: Storage) -> str:
        found = self.client.get_experiment_by_name(config.tracking.experiment)
        if found is not None:
            return str(found.experiment_id)
        local = storage.local_path(f"{config.name}/mlflow")
        own = config.tracking.uri is None and "MLFLOW_TRACKING_URI" not in os.environ
        place = local.as_uri() if own and local is not None else None
        return str(self.client.create_experiment(config.tracking.experiment, artifact_location=place))

    def params(self, values: Mapping[str, Any], run_id: str | None = None) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in values.items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id or self.run_id, params=params[start : start + 100])

    def metrics(self, values: Mapping[str, float], step: int = 0, run_id: str | None = None) -> None:
        self.series([(step, values)], run_id)

    def series(self, rows: Iterable[tuple[int, Mapping[str, float]]], run_id: str | None = None) -> None:
        """Metrics of many steps."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(key, value, now, step) for step, row in rows for key, value in row.items()]
        for start in range(0, len(entries), BATCH):
            self.client.log_batch(run_id or self.run_id, metrics=entries[start : start + BATCH])

    def losses(self, history: Sequence[Mapping[str, float]], prefix: str = "") -> None:
        """Rows of a fine-tuning as metrics ``{prefix}NAME``; steps that are there already are left alone."""
        key = f"{prefix}loss"
        if key not in self.logged:  # an interrupted run may have logged some
            found = self.client.get_metric_history(self.run_id, key)
            self.logged[key] = max((metric.step for metric in found), default=0)
        rows = [row for row in history if row["step"] > self.logged[key]]
        self.series((int(row["step"]), {prefix + name: row[name] for name in row if name != "step"}) for row in rows)
        self.logged[key] = max([self.logged[key], *(int(row["step"]) for row in rows)])

    def child(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], curves: Mapping[str, Any]) -> None:
        """A finished child run, with the accuracy curves of its students as stepped metrics; nothing if it is there."""
        own = f"tags.`{PARENT}` = '{self.run_id}' and attributes.run_name = '{name}' and attributes.status = 'FINISHED'"
        if self.client.search_runs([self.experiment_id], own, max_results=1):
            return
        run_id = self.client.create_run(self.experiment_id, run_name=name, tags={PARENT: self.run_id}).info.run_id
        self.params(params, run_id)
        self.metrics(metrics, run_id=run_id)
        for key, curve in curves.items():
            self.series([(step, {key: value}) for step, value in curve], run_id)
        self.client.set_terminated(run_id)

    def file(self, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """``status``: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
