"""MLflow: one run per distillation, one child run per arm, all written by the driver."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ims3_ray.artifacts import Storage
from ims3_ray.config import RunConfig, canonical
from ims3_ray.errors import UserError


def tracking_uri(config: RunConfig, storage: Storage) -> str:
    """The configured URI, that of ``MLFLOW_TRACKING_URI``, or a sqlite file in the run folder."""
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = storage.local_path(f"{config.name}/mlflow.db")
    if local is None:
        raise UserError("storage is remote, where sqlite cannot live; set tracking.uri or MLFLOW_TRACKING_URI to a server")
    return f"sqlite:///{local}"


class Tracker:
    """Writes one MLflow run; give ``run_id`` to continue it."""

    def __init__(self, config: RunConfig, storage: Storage, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.tracking import MlflowClient

        mlflow.set_tracking_uri(tracking_uri(config, storage))
        self.client = MlflowClient()
        experiment = self.client.get_experiment_by_name(config.tracking.experiment)
        if experiment is not None:
            self.experiment_id = experiment.experiment_id
        else:
            local = storage.local_path(f"{config.name}/mlflow")
            place = local.as_uri() if local is not None and config.tracking.uri is None else None
            self.experiment_id = self.client.create_experiment(config.tracking.experiment, artifact_location=place)
        if run_id is None:
            run_id = self.client.create_run(self.experiment_id, run_name=config.name).info.run_id
            for key, value in _flat(canonical(config)):
                self.client.log_param(run_id, key, str(value)[:6000])
        self.run_id: str = run_id

    def metrics(self, values: Mapping[str, float], step: int = 0, run_id: str | None = None) -> None:
        for key, value in values.items():
            self.client.log_metric(run_id or self.run_id, key, value, step=step)

    def history(self, rows: Iterable[Mapping[str, float]], steps: Iterable[int]) -> None:
        """Per-step metrics in batches of 1000, the most that MLflow takes at once."""
        from mlflow.entities import Metric

        entries = [Metric(key, value, 0, step) for row, step in zip(rows, steps, strict=True) for key, value in row.items()]
        for start in range(0, len(entries), 1000):
            self.client.log_batch(self.run_id, metrics=entries[start : start + 1000])

    def child(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], curves: Mapping[str, Any]) -> None:
        """A finished child run with the accuracy curves of its students as stepped metrics."""
        tags = {"mlflow.parentRunId": self.run_id}
        run_id = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        for key, value in params.items():
            self.client.log_param(run_id, key, value)
        self.metrics(metrics, run_id=run_id)
        for key, curve in curves.items():
            for step, value in curve:
                self.client.log_metric(run_id, key, value, step=step)
        self.client.set_terminated(run_id)

    def file(self, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
