"""MLflow's database in a run folder: half-made, damaged, of an older MLflow, moved."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

from ims3_ray.config import RunConfig
from ims3_ray.io.storage import Storage
from ims3_ray.tracking import Tracker, follow_moved_folder
from ims3_ray.tracking.database import newest_revision, state_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a run that MLflow knows."""
    folder = tmp_path_factory.mktemp("database")
    tracker = Tracker(RunConfig(name="run"), Storage.at(str(folder)))
    tracker.metrics({"a": 1.0})
    tracker.file("note.txt", b"hello")
    tracker.finish("FINISHED")
    assert tracker.complete
    return folder


def told(folder: Path) -> Any:
    """The run that a new job of the same folder continues or begins, as MLflow has it in the end."""
    storage = Storage.at(str(folder))
    tracker = Tracker(RunConfig(name="run"), storage)
    tracker.metrics({"b": 2.0})
    tracker.file("more.txt", b"more")
    tracker.finish("FINISHED")
    assert tracker.complete
    client = MlflowClient(f"sqlite:///{folder}/run/mlflow.db")
    return client, client.get_run(storage.read("run/mlflow_run_id").decode())


def run_sql(path: Path, *commands: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        for command in commands:
            database.execute(command)
        database.commit()


def test_a_database_is_made_whole_or_not_at_all(whole: Path):
    assert state_of(whole / "run" / "mlflow.db") == "whole"
    assert [file.name for file in (whole / "run").glob("mlflow.db*")] == ["mlflow.db"]
    assert state_of(whole / "no" / "mlflow.db") == "absent"


def half_made(path: Path) -> None:
    """What a kill in MLflow's first second leaves: some tables and no revision."""
    path.unlink()
    run_sql(path, "CREATE TABLE experiments (experiment_id INTEGER)", "CREATE TABLE runs (run_uuid TEXT)")


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)


def without_revision(path: Path) -> None:
    run_sql(path, "DELETE FROM alembic_version")


@pytest.mark.parametrize("damage", [half_made, overwritten, without_revision])
def test_an_unusable_database_is_set_aside_and_made_anew(
    damage: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    shutil.copytree(whole / "run", tmp_path / "run")
    damage(tmp_path / "run" / "mlflow.db")
    assert state_of(tmp_path / "run" / "mlflow.db") == "damaged"
    _, run = told(tmp_path)
    assert run.data.metrics == {"b": 2.0}
    said = capsys.readouterr().out
    assert "mlflow.db is damaged; it was set aside as mlflow.db.damaged-" in said
    assert "warning" not in said
    assert len(list((tmp_path / "run").glob("mlflow.db.damaged-*"))) == 1


def test_a_database_of_an_older_mlflow_is_upgraded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The older database is made by MLflow's own migrations, up to the one before the newest."""
    path = tmp_path / "run" / "mlflow.db"
    path.parent.mkdir()
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    InitialBase.metadata.create_all(engine)
    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, str(ScriptDirectory.from_config(config).get_revision(newest_revision()).down_revision))
    engine.dispose()
    assert state_of(path) == "old"
    _, run = told(tmp_path)
    assert state_of(path) == "whole"
    assert run.data.metrics == {"b": 2.0}
    assert "is of an older version and is upgraded" in capsys.readouterr().out


def test_the_files_of_a_moved_run_folder_are_found(whole: Path, tmp_path: Path):
    shutil.copytree(whole / "run", tmp_path / "elsewhere" / "run")
    moved = tmp_path / "elsewhere"
    follow_moved_folder(RunConfig(name="run"), Storage.at(str(moved)))
    # In a process of its own, because MLflow remembers in which folder a run's files are.
    go_on = (
        "import sys; from pathlib import Path; from tests.unit.test_database import told; "
        "client, run = told(Path(sys.argv[1])); "
        "print(run.info.artifact_uri, *sorted(file.path for file in client.list_artifacts(run.info.run_id)))"
    )
    done = subprocess.run([sys.executable, "-c", go_on, str(moved)], capture_output=True, text=True, check=True)
    place, *files = done.stdout.split()
    assert place.startswith((moved / "run" / "mlflow").as_uri())
    assert files == ["more.txt", "note.txt"]
    assert not list((whole / "run" / "mlflow").glob("**/more.txt"))


def test_the_files_of_another_sqlite_database_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/team/mlflow.db"
    (tmp_path / "team").mkdir()
    tracker = Tracker(RunConfig(name="run", tracking={"uri": uri}), Storage.at(str(tmp_path / "storage")))
    tracker.file("note.txt", b"hello")
    tracker.finish("FINISHED")
    assert tracker.complete
    assert len(list((tmp_path / "team" / "mlartifacts" / "ims3_ray").glob("**/note.txt"))) == 1
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "mlartifacts").exists()


def test_source_data_and_weights_are_told(tmp_path: Path):
    tracker = Tracker(RunConfig(name="run"), Storage.at(str(tmp_path)))
    found = {"data": {"train": "f00", "test": "ba4"}, "weights": {"generator /there/dit.safetensors": "d16e57"}}
    for _ in range(2):  # an interrupted run tells it again
        tracker.inputs(found, "/there/photos")
    tracker.finish("FINISHED")
    assert tracker.complete
    client = MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    run = client.get_run((tmp_path / "run" / "mlflow_run_id").read_text())
    assert run.data.tags["mlflow.source.name"]
    assert [(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs] == [
        ("photos train", "f00"), ("photos test", "ba4"),
    ]  # fmt: skip
    (model,) = run.inputs.model_inputs
    logged = client.get_logged_model(model.model_id)
    assert (logged.name, logged.params) == ("generator", {"reference": "/there/dit.safetensors", "digest": "d16e57"})


def test_what_a_killed_process_has_written_in_part_is_rolled_back(whole: Path, tmp_path: Path):
    """A process that is killed in the middle of a transaction leaves a journal beside the database."""
    shutil.copytree(whole / "run", tmp_path / "run")
    path = tmp_path / "run" / "mlflow.db"
    write = (
        "import os, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1])\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "database.execute('CREATE TABLE more (x TEXT)')\n"
        "database.executemany('INSERT INTO more VALUES (?)', [('x' * 500,)] * 2000)\n"
        "os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", write, str(path)], check=False)
    assert path.with_name("mlflow.db-journal").is_file()
    assert state_of(path) == "whole"
    run_sql(path, "SELECT * FROM runs")


def test_the_database_of_a_newer_mlflow_is_left_alone(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(whole / "run", tmp_path / "run")
    path = tmp_path / "run" / "mlflow.db"
    run_sql(path, "UPDATE alembic_version SET version_num = 'from the future'")
    before = path.read_bytes()
    tracker = Tracker(RunConfig(name="run"), Storage.at(str(tmp_path)))
    tracker.finish("FINISHED")
    assert not tracker.complete
    assert "was written by a newer MLflow than the installed one" in capsys.readouterr().out
    assert path.read_bytes() == before
