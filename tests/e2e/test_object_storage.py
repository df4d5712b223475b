"""A run whose data, weights, artifacts and results are all on object storage, behind a door that refuses some requests."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from tests.e2e.conftest import outcome, run_job, whole_values, write_config
from tests.object_storage import CREDENTIALS, client, s3_server, unreliable

BUCKET = "distill"


def everything(root: Path) -> bytes:
    return b"".join(file.read_bytes() for file in root.rglob("*") if file.is_file())


@pytest.mark.slow
def test_a_run_on_object_storage_makes_the_same_set_and_writes_no_credentials(
    tiny_world: Path, tmp_path: Path, undisturbed: dict[str, Any]
):  # fmt: skip
    values = whole_values(tiny_world, tmp_path)
    with s3_server(BUCKET) as environment, unreliable(environment["AWS_ENDPOINT_URL"], 40) as (endpoint, refused):
        bucket = client(environment)
        fs.copy_files(str(tiny_world), f"{BUCKET}/world", destination_filesystem=bucket)
        there = f"s3://{BUCKET}/world"
        values |= {
            "storage": f"s3://{BUCKET}/runs", "data": {**values["data"], "path": f"{there}/data"},
            "generator": f"{there}/dit.safetensors", "encoder": f"{there}/phi.safetensors",
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        }  # fmt: skip
        file = write_config(tmp_path / "remote.yaml", values)
        more = {**environment, "AWS_ENDPOINT_URL": endpoint, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = run_job("--config", file, **more)
        assert done.returncode == 0, done.stderr
        assert f"report: s3://{BUCKET}/runs/tiny/report.html" in done.stdout
        assert len(refused) > 10
        again = run_job("--config", file, "--dry-run", **more)
        assert again.stdout.count("done") >= 6, again.stdout
        copied = tmp_path / "copied"
        copied.mkdir()
        fs.copy_files(f"{BUCKET}/runs", str(copied), source_filesystem=bucket)
        parquet = f"s3://{BUCKET}/runs/tiny/distilled/data/train-00000-of-00001.parquet"
        with bucket.open_input_stream(parquet.removeprefix("s3://")) as stream:
            assert pq.read_table(io.BytesIO(stream.read())).num_rows == 6
    assert outcome(copied) == undisturbed
    assert not list(copied.glob("artifacts/finetune/*/train-0/*"))  # checkpoints, which are not needed any more
    written = everything(copied) + (tmp_path / "mlflow.db").read_bytes() + (done.stdout + done.stderr).encode()
    for secret in (CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in written
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
