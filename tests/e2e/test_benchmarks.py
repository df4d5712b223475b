"""Benchmarks as a person runs them. What they find depends on the machine, so only their form is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, environment


def test_fine_tuning_is_measured_on_a_machine_without_ray(tmp_path: Path):
    for absent in ("ray", "mlflow", "diffusers"):
        (tmp_path / f"{absent}.py").write_text("raise ImportError(__name__)\n")
    command = [sys.executable, "benchmarks/finetune.py", "workers=2", "batch_size=1", "steps=1", "cases=[ZeRO 2, L_Diff alone]"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"].startswith("DiT-")
    assert [row["case"] for row in found["cases"]] == ["ZeRO 2", "L_Diff alone"]
    for row in found["cases"]:
        assert row["share"] > 0
        assert row["samples_per_s"] * row["ms_per_step"] / 1e3 == pytest.approx(2, rel=0.02)
        assert row["peak_gb"] > 0.1


def test_a_case_that_does_not_exist_is_named():
    done = subprocess.run(
        [sys.executable, "benchmarks/finetune.py", "cases=[ZeRO 4]"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no case 'ZeRO 4'; choose from: ZeRO 0;")
