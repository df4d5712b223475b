"""SIGKILL of the driver in the middle of generate, then the same command: the same distilled set, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import tiny_values
from tests.e2e.conftest import DISTILL, ROOT, environment, run_job, write_config

ARMS = {"random_real": None, "dit": None, "ims3": None}  # without them one pool is left, and no fine-tuning
UNITS = 24


def notes(storage: Path) -> dict[Path, int]:
    """Finished units of the pool, each with the time at which it was finished."""
    found = storage.glob("artifacts/generate/*/shards/*.json")
    return {path.relative_to(storage): path.stat().st_mtime_ns for path in found}


def test_killed_in_the_middle_of_generate(tiny_world: Path, tmp_path: Path):
    storage = tmp_path / "killed"

    def config(folder: Path, actors: int) -> str:
        values = tiny_values(
            tiny_world, folder, arms=ARMS, export="dit_s3", sampling={"steps": 400, "unit_size": 4},
            selection={"groups": 16}, actors={"count": actors}, evaluation={"epochs": 1, "validations": 1},
        )  # fmt: skip
        return write_config(tmp_path / f"{folder.name}.yaml", values)

    driver = subprocess.Popen(
        [*DISTILL, "--config", config(storage, 2)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while len(notes(storage)) < 2:
        assert driver.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # the cluster's processes see that their owner is gone
    before = notes(storage)
    assert 2 <= len(before) < UNITS
    assert not (storage / "tiny" / "results.json").exists()

    resumed = run_job("--config", config(storage, 2))
    assert resumed.returncode == 0, resumed.stderr
    after = notes(storage)
    assert len(after) == UNITS
    assert {path: after[path] for path in before} == before, "finished units were made again"

    whole = tmp_path / "whole"
    undisturbed = run_job("--config", config(whole, 1))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert content(storage) == content(whole)
    first, second = ({f.name: f.read_bytes() for f in root.glob("tiny/distilled/data/*")} for root in (storage, whole))
    assert first == second

    again = run_job("--config", config(storage, 2))
    assert again.returncode == 0
    assert "generate" not in again.stdout
    assert "report: " in again.stdout


def content(storage: Path) -> str:
    results = json.loads((storage / "tiny" / "results.json").read_text())
    return str(results["arms"]["dit_s3"]["content"])
