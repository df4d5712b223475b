"""The embedded default through the front door, with fewer steps than the demonstration takes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.e2e.conftest import run_job

QUICK = ("finetune.steps=2", "finetune.batch_size=4", "sampling.steps=2", "selection.groups=2",
         "evaluation.protocols.hard={epochs: 2, validations: 1, width: 8}",
         "instability={images: 1, steps: 2, lanczos_steps: 2}")  # fmt: skip


def test_no_arguments_but_less_work(tmp_path: Path):
    done = run_job(f"storage={tmp_path}", *QUICK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"report: {tmp_path}/demo/report.html"
    for title in ("Random real", "DiT + S3", "IMS3"):
        assert any(title in line for line in lines)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    rows = [row for found in results["sets"].values() for row in found["rows"].values()]
    assert [len(row["last"]["seeds"]) for row in rows] == [3, 3, 3, 3]
    assert pq.read_table(tmp_path / "demo" / "distilled" / "data").num_rows == 100
    assert len(list((tmp_path / "demo" / "distilled" / "images").glob("*/*.png"))) == 100
