"""Two processes that work on the same run or artifact at once know of each other."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ims3_ray.engine import lease
from ims3_ray.engine.lease import announce, lease_path, working_on
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.at(str(tmp_path))


def leave(storage: Storage, host: str, pid: int, age_s: float = 1.0) -> None:
    storage.write_json(lease_path("run"), {"host": host, "pid": pid, "time": time.time() - age_s})


def test_a_lease_is_renewed_and_then_removed(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with working_on(storage, "run"):
        first = (storage.read_json(lease_path("run")) or {})["time"]
        deadline = time.monotonic() + 10
        while (storage.read_json(lease_path("run")) or {})["time"] == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (storage.read_json(lease_path("run")) or {})["time"] > first
    assert not storage.exists(lease_path("run"))


def test_a_living_process_of_this_machine_is_not_disturbed(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "ENDING_S", 0.1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        leave(storage, socket.gethostname(), other.pid)
        with pytest.raises(UserError, match=rf"is being run by process {other.pid} of"), working_on(storage, "run"):
            pass
        other.communicate(b"\n")
    with working_on(storage, "run"):  # it has ended, and left its lease behind as a killed process does
        pass


def test_a_process_that_is_ending_is_waited_for(storage: Storage):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"]) as other:
        leave(storage, socket.gethostname(), other.pid)
        with working_on(storage, "run"):
            pass


def test_a_process_of_another_machine_is_named(storage: Storage, capsys: pytest.CaptureFixture[str]):
    leave(storage, "elsewhere", 7)
    with working_on(storage, "run"):
        pass
    assert "note: process 7 of elsewhere was working on" in capsys.readouterr().out
    leave(storage, "elsewhere", 7, age_s=1000)
    with working_on(storage, "run"):
        pass
    assert capsys.readouterr().out == ""


def test_a_damaged_lease_is_none(storage: Storage):
    storage.write(lease_path("run"), b"{")
    with working_on(storage, "run"):
        pass


def test_an_artifact_that_another_run_is_making_is_named(storage: Storage, capsys: pytest.CaptureFixture[str]):
    artifact = Artifact(storage, "generate", "k1")
    announce(artifact, "run", "candidates")
    announce(artifact, "run", "candidates")
    announce(artifact, "other", "candidates")
    assert capsys.readouterr().out == ""  # nobody works on "run" any more
    leave(storage, "elsewhere", 7)
    announce(Artifact(storage, "generate", "k2"), "run", "candidates")
    announce(Artifact(storage, "generate", "k2"), "other", "candidates")
    assert "note: candidates is being made by run 'run', too" in capsys.readouterr().out
