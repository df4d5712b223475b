"""A command that is told to end, or whose own Ray dies, says so in one line, tells MLflow, and goes on when it is run again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.conftest import tiny_values
from tests.e2e.conftest import DISTILL, ROOT, environment, write_config


def heed_interrupts() -> None:
    """A shell starts commands in the background with SIGINT ignored, which the processes of these tests would inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(config: str, out: Path, command: list[str] = DISTILL, until: str = "fine-tune") -> subprocess.Popen[str]:
    """The command, whose output goes to a file; it has reached what is too long to end, and printed ``until``."""
    with out.open("w") as file:
        job = subprocess.Popen(
            [*command, "--config", config], cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, text=True,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
    deadline = time.monotonic() + 150
    while until not in out.read_text():
        assert job.poll() is None, out.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return job


def status(storage: Path) -> str:
    """Status of the run in MLflow."""
    client = MlflowClient(f"sqlite:///{storage}/tiny/mlflow.db")
    return str(client.get_run((storage / "tiny" / "mlflow_run_id").read_text()).info.status)


def listening(job: subprocess.Popen[str]) -> set[str]:
    """Addresses, other than those of the loopback, at which a command or one of its processes listens."""
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    found = {place.laddr.ip for one in family for place in one.net_connections("inet") if place.status == psutil.CONN_LISTEN}
    return {address for address in found if address.removeprefix("::ffff:") != "127.0.0.1"}


@pytest.mark.slow
def test_a_command_that_is_ended_says_so_and_goes_on(tiny_world: Path, tmp_path: Path):
    values = tiny_values(
        tiny_world, tmp_path / "runs", arms={"random_real": None, "dit": None, "dit_s3": None}, instability={"images": 0},
        finetune={"steps": 100_000, "checkpoint_every": 50_000},
    )  # fmt: skip
    config, out = write_config(tmp_path / "mine.yaml", values), tmp_path / "out"

    job = start(config, out)
    assert listening(job) == set()
    job.terminate()
    assert job.wait(60) == 143
    assert out.read_text().splitlines()[-1] == "terminated; the same command continues"
    assert "Traceback" not in out.read_text()
    assert status(tmp_path / "runs") == "KILLED"

    job = start(config, out)
    second = subprocess.run([*DISTILL, "--config", config], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert second.returncode == 2
    assert f"is being run by process {job.pid} of" in second.stderr

    (raylet,) = [one for one in psutil.Process(job.pid).children(recursive=True) if one.name() == "raylet"]
    os.kill(raylet.pid, signal.SIGKILL)
    assert job.wait(60) == 1
    errors = [line for line in out.read_text().splitlines() if line.startswith("error:")]
    assert errors == [
        "error: Ray on this machine has died (its raylet was killed, perhaps because memory ran out); run the same command "
        "again to continue"
    ]
    assert "Traceback" not in out.read_text()
    assert status(tmp_path / "runs") == "KILLED"


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "students", "until"), [(100_000, 4, "train the teacher"), (1, 100_000, "evaluate: ")])
def test_ctrl_c_ends_a_command_while_and_after_a_teacher_is_trained(
    teacher: int, students: int, until: str, tiny_world: Path, tmp_path: Path
):
    evaluation = {
        "protocols": {"hard": {"width": 8, "epochs": students, "validations": 1}}, "seeds": [0], "val_per_class": 0,
        "teacher": {"training": {"epochs": teacher}, "trainer": {"num_workers": 1}},
    }  # fmt: skip
    herding = {"herding": {"title": "Herding", "images": "real", "select": "herding"}}
    values = tiny_values(tiny_world, tmp_path / "runs", instability={"images": 0})
    values |= {"arms": herding, "encoder": "teacher", "export": None, "evaluation": evaluation}
    config, out = write_config(tmp_path / "mine.yaml", values), tmp_path / "out"
    job = start(config, out, until=until)
    time.sleep(5.0)  # the workers have begun
    job.send_signal(signal.SIGINT)
    assert job.wait(60) == 130, out.read_text()
    assert out.read_text().splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in out.read_text()
    assert status(tmp_path / "runs") == "KILLED"


@pytest.mark.slow
def test_a_pretraining_that_is_interrupted_ends_at_once_and_goes_on(tiny_world: Path, tmp_path: Path):
    values = {
        "name": "tiny", "storage": str(tmp_path / "runs"), "data": {"path": str(tiny_world / "data"), "size": 8},
        "generator": {"minutes": 0.4, "hidden_size": 32, "depth": 1, "num_heads": 2, "batch_size": 8, "checkpoint_every": 20},
        "quality": {
            "preview_minutes": 0.02, "images_per_class": 2, "sampling": {"steps": 2},
            "judge": {"width": 8, "epochs": 100_000, "batch_size": 8, "validations": 1},
        },
    }  # fmt: skip
    config, out = write_config(tmp_path / "mine.yaml", values), tmp_path / "out"
    pretrain = [*DISTILL[:-1], "jobs/pretrain.py"]
    sheet = tmp_path / "runs" / "tiny" / "tiny.png"
    for until, says in (("train the generator", "0.4 minutes"), ("judge: ", "the training goes on after ")):
        job = start(config, out, pretrain, until)
        deadline = time.monotonic() + 60
        while not sheet.exists():
            assert job.poll() is None, out.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1.0)  # the judge's task is under way
        job.send_signal(signal.SIGINT)
        assert job.wait(60) == 130
        assert says in out.read_text()
        assert out.read_text().splitlines()[-1] == "interrupted; the same command continues"
        assert "Traceback" not in out.read_text()
        assert status(tmp_path / "runs") == "KILLED"
    made = {file.name for file in (tmp_path / "runs" / "tiny").iterdir() if file.suffix in (".png", ".safetensors", ".md")}
    assert made == {"tiny.png", "tiny.safetensors"}, "the sheet of samples is there before the judge has ended"
