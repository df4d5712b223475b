"""The same job on a cluster that was started by hand, through Ray's job server with token authentication."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import tiny_values
from tests.e2e.conftest import ROOT, environment, write_config
from tests.local_nodes import RAY, free_port


@dataclass(frozen=True)
class Head:
    environment: dict[str, str]

    def submit(self, *arguments: str, job: str = "distill") -> subprocess.CompletedProcess[str]:
        """``ray job submit --working-dir . -- python jobs/JOB.py …``, followed to the job's end."""
        command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=400)

    def status(self, output: str) -> str:
        (job,) = set(re.findall(r"raysubmit_\w+", output))
        done = subprocess.run([RAY, "job", "status", job], env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout.lower()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """``ray start --head`` with its dashboard, on ports of its own; the PATH's python is that of the tests."""
    token, port, dashboard = secrets.token_hex(32), free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie below it
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{dashboard}", PATH=path
    )
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", *ports],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("".join(lines))
    yield Head(env)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def test_the_job_runs_to_its_end_and_its_log_shows_it(head: Head, tiny_world: Path, tmp_path: Path):
    values = tiny_values(tiny_world, tmp_path / "runs", arms={"dit": None, "dit_s3": None})
    done = head.submit("--config", write_config(tmp_path / "config.yaml", values))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in head.status(done.stdout)
    for text in ("encode train images, encode test images: 120 images", "fine-tune: done in", "evaluate: done in", "IMS3"):
        assert text in done.stdout
    assert f"report: {tmp_path}/runs/tiny/report.html" in done.stdout
    for file in ("report.html", "results.json", "distilled/README.md"):
        assert (tmp_path / "runs" / "tiny" / file).is_file()


def test_a_job_with_bad_input_fails_with_its_one_line(head: Head, tmp_path: Path):
    done = head.submit(f"storage={tmp_path}", "selection.alhpa=0.4")
    assert done.returncode != 0
    assert "error: unknown config key 'selection.alhpa'; did you mean 'selection.alpha'?" in done.stdout
    assert "failed" in head.status(done.stdout)
    assert "exit code 2" in done.stdout + done.stderr + head.status(done.stdout)


@pytest.mark.slow
def test_a_search_runs_as_a_job_too_and_results_that_would_be_lost_with_it_are_warned_of(
    head: Head, tiny_world: Path, tmp_path: Path
):  # fmt: skip
    """Fine-tuning takes both CPUs that the cluster has: what a trial reserved itself would keep it from starting."""
    values = tiny_values(tiny_world, Path("runs"), space={"selection": {"alpha": [0.1, 0.9], "beta": [0.1, 0.9]}})
    done = head.submit("--config", write_config(tmp_path / "config.yaml", values), job="sweep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: storage 'runs' is relative" in done.stdout
    assert "4 points; fine-tunes: 1, pools: 1, distinct selections: " in done.stdout
