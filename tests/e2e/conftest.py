"""The jobs as a person runs them: in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import tiny_values

ROOT = Path(__file__).parents[2]
DISTILL = [sys.executable, "jobs/distill.py"]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would point a job at some other cluster or tracking server."""
    foreign = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
    return {key: value for key, value in os.environ.items() if key not in foreign} | more


def run_script(job: str, *arguments: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """``python jobs/JOB.py …`` from the root of the repository."""
    command = [sys.executable, f"jobs/{job}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout)


def run_job(*arguments: str, timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    return run_script("distill", *arguments, timeout=timeout, **more)


def write_config(path: Path, values: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def whole_values(world: Path, storage: Path) -> dict[str, Any]:
    """A run of the IMS3 arm alone whose every stage is long enough to be disturbed."""
    return tiny_values(
        world, storage, arms={"random_real": None, "dit": None, "dit_s3": None}, instability={"images": 0},
        finetune={"steps": 40, "checkpoint_every": 10, "trainer": {"num_workers": 2, "max_failures": 20}},
        data={"unit_size": 5}, sampling={"steps": 150, "unit_size": 4}, selection={"groups": 20}, actors={"count": 2},
        evaluation={"protocols": {"hard": {"width": 8, "epochs": 500, "validations": 2}}, "seeds": [0, 1]},
    )  # fmt: skip


def outcome(storage: Path) -> dict[str, Any]:
    """Hash and accuracies of the run's set."""
    found: dict[str, Any] = json.loads((storage / "tiny" / "results.json").read_text())["sets"]["ims3"]
    return found


@pytest.fixture(scope="session")
def undisturbed(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What :func:`whole_values` come to on this machine's disk and a Ray of its own, with nobody in the way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_job("--config", write_config(folder / "config.yaml", whole_values(tiny_world, folder)))
    assert done.returncode == 0, done.stderr
    return outcome(folder)
