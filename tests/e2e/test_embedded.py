"""The command without arguments, which takes the embedded data and weights, with less work."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import run_job, run_script

QUICK = ("finetune.steps=2", "finetune.batch_size=4", "sampling.steps=2", "selection.groups=2",
         "evaluation.protocols.hard={epochs: 2, validations: 1, width: 8}",
         "instability={images: 1, steps: 2, lanczos_steps: 2}")  # fmt: skip


@pytest.mark.slow
def test_no_arguments_but_less_work(tmp_path: Path):
    done = run_job(f"storage={tmp_path}", *QUICK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2] == f"report: {tmp_path}/distill/report.html"
    assert lines[-1].startswith(f"MLflow: mlflow ui --backend-store-uri sqlite:///{tmp_path}/distill/mlflow.db; then http://")
    for title in ("Random real", "DiT + S3", "IMS3"):
        assert any(title in line for line in lines)
    results = json.loads((tmp_path / "distill" / "results.json").read_text())
    rows = [row for found in results["sets"].values() for row in found["rows"].values()]
    assert [len(row["last"]["seeds"]) for row in rows] == [3, 3, 3, 3]
    assert pq.read_table(tmp_path / "distill" / "distilled" / "data").num_rows == 100
    assert len(list((tmp_path / "distill" / "distilled" / "images").glob("*/*.png"))) == 100
    scored = run_script("evaluate", f"storage={tmp_path}", f"sets.mine={tmp_path}/distill/distilled", QUICK[4])
    assert scored.returncode == 0, scored.stderr
    assert "evaluate: " not in scored.stdout  # every student of that very set is there already
    assert scored.stdout.splitlines()[-2] == f"report: {tmp_path}/evaluate/report.html"
    again = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    assert again["sets"]["mine"]["rows"] == results["sets"][results["exported"]["arm"]]["rows"]
