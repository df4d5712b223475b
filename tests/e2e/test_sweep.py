"""A search of hundreds of points on the embedded data set, whose driver and tracking server are killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.e2e.conftest import ROOT, environment, run_script, write_config

GRID = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
LAMBDAS = [0.002, 0.8]
POINTS = len(LAMBDAS) * 81 * 2


class Server:
    """A real MLflow server on loopback, which can be killed and started again on what it has."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--artifacts-destination", f"{self.folder}/art"]
        place = ["--host", "127.0.0.1", "--port", f"{self.port}", "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *place],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 100
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def wait_for(storage: Path, files: str, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 250
    while not list(storage.glob(files)):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_search_outlives_its_driver_and_its_tracking_server(server: Server, tmp_path: Path):
    storage = tmp_path / "runs"
    values = {
        "storage": str(storage), "tracking": {"uri": server.uri},
        "finetune": {"steps": 2, "batch_size": 8, "trainer": {"num_workers": 1}},
        "sampling": {"steps": 2, "unit_size": 6}, "selection": {"images_per_class": 2},
        "space": {
            "finetune": {"objectives": {"inversion_matching": {"weight": LAMBDAS}}},
            "selection": {"alpha": GRID, "beta": GRID, "groups": [2, 3]},
        },
        "evaluation": {"protocols": {"hard": {"width": 8, "epochs": 1, "validations": 1}}, "seeds": [0]},
    }  # fmt: skip
    config = write_config(tmp_path / "sweep.yaml", values)
    command = [sys.executable, "jobs/sweep.py", "--config", config]
    driver = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(storage, "artifacts/finetune/*/manifest.json", driver)
    server.kill()
    wait_for(storage, "sweep/trials/*.json", driver)  # it goes on
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    made = {path: path.stat().st_mtime_ns for path in storage.glob("artifacts/*/*/manifest.json")}

    resumed = run_script("sweep", "--config", config)  # while there is no server
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{POINTS} points (λ_IM 2 × α 9 × β 9 × G 2), grid" in resumed.stdout
    assert "MLflow at" in resumed.stdout
    assert "nothing is lost, and the same command tells it the rest" in resumed.stdout
    after = {path: path.stat().st_mtime_ns for path in storage.glob("artifacts/*/*/manifest.json")}
    assert {path: after[path] for path in made if "evaluate" not in str(path)} == {
        path: made[path] for path in made if "evaluate" not in str(path)
    }, "what was finished was made again"

    results = json.loads((storage / "sweep" / "results.json").read_text())
    assert not results["mlflow"]["complete"]
    assert len(results["points"]) == POINTS
    counts = results["counts"]
    artifacts = {
        kind: len(list(storage.glob(f"artifacts/{kind}/*/manifest.json"))) for kind in ("finetune", "generate", "evaluate")
    }
    distinct = {content for point in results["points"] for content in point["content"]}
    assert artifacts == {"finetune": len(LAMBDAS), "generate": len(LAMBDAS), "evaluate": len(distinct)}
    assert counts["evaluated"] == len(distinct) < POINTS / 3
    made_of = (
        f"fine-tunes: 2, pools: 2, distinct selections: {counts['distinct_selections']}, of which evaluated: {len(distinct)}"
    )
    assert f"{POINTS} points; {made_of}" in resumed.stdout

    server.start()
    told = run_script("sweep", "--config", config)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "warning" not in told.stdout
    results = json.loads((storage / "sweep" / "results.json").read_text())
    assert results["mlflow"]["complete"]
    client = MlflowClient(server.uri)
    parent = client.get_run(results["mlflow"]["run"])
    assert parent.info.status == "FINISHED"
    own = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], own, max_results=1000)
    assert [run.info.status for run in children] == ["FINISHED"] * POINTS
    assert {"report.html", "best.yaml", "points.csv", "alpha-beta.png"} <= {
        f.path for f in client.list_artifacts(parent.info.run_id)
    }
