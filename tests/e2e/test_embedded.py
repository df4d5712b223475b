"""The embedded default through the front door, with fewer steps than the demonstration takes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.e2e.conftest import run_job

QUICK = ("finetune.steps=2", "finetune.batch_size=4", "sampling.steps=2", "evaluation.epochs=2", "evaluation.validations=1",
         "evaluation.width=8", "selection.groups=2", "instability={images: 1, steps: 2, lanczos_steps: 2}")  # fmt: skip


def test_no_arguments_but_less_work(tmp_path: Path):
    done = run_job(f"storage={tmp_path}", *QUICK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"report: {tmp_path}/demo/report.html"
    for title in ("Random real", "DiT + S3", "IMS3"):
        assert any(title in line for line in lines)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert all(len(arm["seeds"]) == 3 for arm in results["arms"].values())
    assert pq.read_table(tmp_path / "demo" / "distilled" / "data").num_rows == 100
    assert len(list((tmp_path / "demo" / "distilled" / "images").glob("*/*.png"))) == 100
