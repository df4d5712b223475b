"""A job on a cluster that grows by Ray's own autoscaler: nodes come for the stages that need them, are killed while these run,
and are gone afterwards."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import DISTILL, ROOT, environment, outcome, whole_values, write_config
from tests.local_nodes import DRIVER, ON_DEMAND, SPOT, GrowingCluster, growing_cluster, kill_tree

PLACE = {"driver": DRIVER, "finetune": ON_DEMAND, "pool": SPOT, "evaluate": SPOT}


class Job:
    """A job that runs, and what it has printed."""

    def __init__(self, *arguments: str, **more: str) -> None:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([*DISTILL, *arguments], cwd=ROOT, env=environment(**more), **options)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += self.process.stdout

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until(self, happened: Callable[[], bool], timeout: float = 200) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)


def kill_one(cluster: GrowingCluster, kind: str) -> None:
    kill_tree(cluster.alive(kind)[0])


@pytest.mark.slow
def test_nodes_come_for_stages_are_killed_in_each_and_are_gone_afterwards(
    tiny_world: Path, tmp_path: Path, undisturbed: dict[str, Any]
):  # fmt: skip
    runs = tmp_path / "runs"
    values = whole_values(tiny_world, runs) | {
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}, "cluster": {"wait_s": 150, "place": PLACE},
    }  # fmt: skip
    file = write_config(tmp_path / "config.yaml", values)
    found = {
        name: (lambda pattern=pattern: list(runs.glob(f"artifacts/{pattern}")))
        for name, pattern in {
            "decoded": "encode/*/shards/*.json", "checkpoint": "finetune/*/train-0/*/checkpoint_*/*",
            "made": "generate/*/shards/*.json", "student": "evaluate/*/shards/*.state",
        }.items()
    }  # fmt: skip
    with growing_cluster() as cluster:
        job = Job("--config", file, f"cluster.address={cluster.address}", **cluster.environment)
        for stage, kind in (("decoded", "sampler"), ("checkpoint", "train"), ("made", "sampler")):
            job.wait_until(lambda stage=stage: bool(found[stage]()))
            if stage == "checkpoint":
                time.sleep(4)  # Ray Train forgets a checkpoint whose worker is killed at once
            kill_one(cluster, kind)
            if stage == "made":
                before = len(found["made"]())
                job.wait_until(lambda before=before: len(found["made"]()) > before + 2)
                kill_one(cluster, "driver")
        job.wait_until(lambda: "evaluate: 2 students" in job.output)
        time.sleep(3)
        for node in cluster.alive("sampler"):  # none is left that the students could wait for
            kill_tree(node)
        job.process.wait(timeout=300)
        assert job.process.returncode == 0, job.output
        # Where the machine is busy, nodes are idle for longer than 6 s between stages, go, and come again.
        for kind, least, most in (("sampler", 4, 16), ("train", 2, 4), ("driver", 2, 4)):
            assert least <= len(cluster.started(kind)) <= most, job.output
            cluster.wait_until_empty(kind, 60)
    for text in (
        "waits for nodes, 0 of 2 workers have room (1 CPU each, ray.io/market-type=spot)", "nodes are there after",
        "it goes on elsewhere (attempt 2)", "report: ",
    ):  # fmt: skip
        assert text in job.output
    assert outcome(runs) == undisturbed
