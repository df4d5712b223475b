"""Workers killed by SIGKILL in the middle of a stage: what is committed in the end is the same, byte for byte."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ims3_ray.stages.finetune import Finetune
from tests.ray.conftest import prepare

pytestmark = pytest.mark.slow


@contextmanager
def killing(worker: str, once: str, folder: Path) -> Iterator[None]:
    """Kill one process that calls itself ``worker`` as soon as two files of ``folder`` match ``once``."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 200
        while not killed and time.monotonic() < deadline:
            time.sleep(0.01)
            if len(list(folder.glob(once))) < 2:
                continue
            for process in psutil.process_iter(["cmdline"]):
                if worker in " ".join(process.info["cmdline"] or []):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield
    still_hunting = not killed
    killer.join(timeout=1)
    assert killed
    assert not still_hunting, "the stage had ended when the worker was killed"


def test_a_killed_training_worker_changes_nothing(tiny_world: Path, tmp_path: Path, encoded: Path):
    outcomes = []
    objectives = {"minimax": {"representativeness": 0.1, "diversity": 0.1, "memory": 8}}  # its memories must survive too
    for name in ("killed", "whole"):
        tuning = {"steps": 60, "checkpoint_every": 15, "objectives": objectives, "trainer": {"num_workers": 2}}
        context, stages = prepare(tiny_world, tmp_path / name, encoded, finetune=tuning)
        stage = stages["finetune", ""]
        if name == "killed":
            with killing("RayTrainWorker", "artifacts/finetune/*/train-0/*/checkpoint_*/*", tmp_path / name):
                Finetune.run_all(context, [stage])
        else:
            Finetune.run_all(context, [stage])
        artifact = stage.artifact(context.storage)
        outcomes.append([artifact.read(shard) for shard in ("losses-0.json", "adapter-0.safetensors")])
        history = context.tracker.client.get_metric_history(context.tracker.run_id, "loss")
        assert sorted(metric.step for metric in history) == list(range(1, 61))
    assert outcomes[0] == outcomes[1]
