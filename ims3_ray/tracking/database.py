"""The SQLite file in which MLflow keeps the run of a run folder: it is created whole, and it is set aside if it is damaged,
upgraded if an older MLflow has written it, and corrected if the folder was moved."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Literal

State = Literal["absent", "whole", "old", "newer", "damaged"]
TABLES = ("experiments", "runs", "metrics", "params", "tags")
"""Tables without which a database is none of MLflow's."""
WITH = ("-journal", "-wal", "-shm")
"""Endings of the files that SQLite keeps beside a database."""


def prepare(path: Path, artifacts: Path) -> None:
    """Make the database at ``path`` usable. ``artifacts`` is the folder in which its runs keep their files. Raises
    ``ValueError`` for the database of a newer MLflow."""
    state = state_of(path)
    if state == "newer":
        raise ValueError(f"{path} was written by a newer MLflow than the installed one; install that one, or set tracking.uri")
    if state == "old" and not _upgrade(path):
        state = "damaged"
    if state == "damaged":
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        for ending in ("", *WITH):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{ending}").rename(f"{aside}{ending}")
        print(f"note: MLflow's database {path} is damaged; it was set aside as {aside.name}, and a new one is made", flush=True)
    if state in ("absent", "damaged"):
        _create(path)
    else:
        follow_move(path, artifacts)


def state_of(path: Path) -> State:
    """Whether the file is a database that the installed MLflow can use."""
    if not path.exists():
        return "absent"
    try:
        # Opened for writing, because SQLite then rolls back what a killed process has written in part.
        with contextlib.closing(sqlite3.connect(path)) as database:
            if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
                return "damaged"
            there = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not there.issuperset((*TABLES, "alembic_version")):
                return "damaged"
            revisions = [revision for (revision,) in database.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.OperationalError:  # another process is writing to it, or it cannot be opened, which MLflow reports
        return "whole"
    except sqlite3.DatabaseError:
        return "damaged"
    if not revisions:
        return "damaged"
    if revisions[0] not in known_revisions():
        return "newer"
    return "whole" if revisions == [newest_revision()] else "old"


def newest_revision() -> str:
    """The revision of the database's tables that the installed MLflow works with."""
    return known_revisions()[0]


@cache
def known_revisions() -> list[str]:
    """All revisions of the database's tables that the installed MLflow knows, the newest first."""
    import mlflow
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]


def _create(path: Path) -> None:
    """Create the database under another name first, so that a process that is killed meanwhile leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(_empty())
    draft.rename(path)


@cache
def _empty() -> bytes:
    """A database without runs. MLflow needs seconds to make its tables, so a process makes them once."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlflow.db")
        MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes()


def _upgrade(path: Path) -> bool:
    """Bring the tables to the revision of the installed MLflow; returns whether that went well."""
    print(f"note: MLflow's database {path} is of an older version and is upgraded", flush=True)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{path}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0 and state_of(path) == "whole"


def follow_move(path: Path, artifacts: Path) -> None:
    """Where the run folder has been moved, write the new place of the runs' files into the database, which holds full paths."""
    if not path.exists():
        return
    here = artifacts.as_uri()
    with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT DISTINCT artifact_location FROM experiments WHERE name != 'Default'")
        moved = [place for (place,) in found if place and place != here and place.endswith(f"/{artifacts.name}")]
        for place in moved:
            database.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, place))
            rest = "artifact_uri = ? || substr(artifact_uri, ?) WHERE artifact_uri LIKE ? ESCAPE '\\'"
            like = place.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "/%"
            database.execute(f"UPDATE runs SET {rest}", (here, len(place) + 1, like))
        database.commit()
