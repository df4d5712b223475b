"""The jobs as a person runs them: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

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
