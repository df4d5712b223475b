"""Where the runs of MLflow and their files are kept."""

from __future__ import annotations

import os
from pathlib import Path

from ims3_ray.config import PretrainConfig, WorkConfig
from ims3_ray.errors import UserError, masked
from ims3_ray.io.storage import Storage
from ims3_ray.tracking import database
from ims3_ray.tracking.entries import reason, slug

Tracked = WorkConfig | PretrainConfig
"""Configs of jobs that MLflow tracks."""


CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the writing thread retries itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Settings of MLflow's client, where the environment has none."""


def is_own(config: Tracked) -> bool:
    """Whether the database is a file in the run folder: creating it takes seconds, but is not expected to fail."""
    return config.tracking.uri is None and "MLFLOW_TRACKING_URI" not in os.environ


def tracking_uri(config: Tracked, storage: Storage) -> str:
    """The configured URI, that of ``MLFLOW_TRACKING_URI``, or a sqlite file in the run folder.

    Raises :class:`UserError` where none is given and the run folder is remote.
    """
    if uri := config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    local = storage.local_path(f"{config.name}/mlflow.db")
    if local is None:
        raise UserError("storage is remote, where sqlite cannot live; set tracking.uri or MLFLOW_TRACKING_URI to a server")
    return f"sqlite:///{local}"


def follow_moved_folder(config: Tracked, storage: Storage) -> None:
    """Where the run folder with MLflow's database was moved, correct the places of files in the database."""
    if (files := storage.local_path(f"{config.name}/mlflow")) is not None:
        database.follow_move(files.with_name("mlflow.db"), files)


def files_of(config: Tracked, storage: Storage, uri: str) -> Path | None:
    """Folder for the files of a new experiment in the SQLite database ``uri``: in the run folder, or beside a database
    elsewhere. None for a server, which decides itself."""
    if is_own(config):
        return storage.local_path(f"{config.name}/mlflow")
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts" / slug(config.tracking.experiment)


def check_server(config: Tracked, storage: Storage) -> None:
    """Raises :class:`UserError` if a new run would be refused because the MLflow server does not answer, or because there is
    no place for MLflow's database."""
    uri = tracking_uri(config, storage)
    if not uri.startswith("http") or storage.exists(note_of(config)):
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in CLIENT.items()})
    import mlflow

    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        raise not_taken(uri, error) from error


def note_of(config: Tracked) -> str:
    """Path of the file that holds the id of a run."""
    return f"{config.name}/mlflow_run_id"


def not_taken(uri: str, error: Exception) -> UserError:
    """The error for a server that does not take a new run."""
    return UserError(f"MLflow at '{masked(uri)}' does not take the run ({reason(error)}); check tracking.uri")
