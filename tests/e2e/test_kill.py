"""Real faults in the middle of generate: whatever is killed or full, the distilled set is the same in the end, byte for
byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.conftest import tiny_values
from tests.e2e.conftest import DISTILL, ROOT, environment, run_job, write_config

ARMS = {"random_real": None, "dit": None, "ims3": None}  # without them one pool is left, and no fine-tuning
UNITS = 30


def config(world: Path, storage: Path, actors: int) -> str:
    values = tiny_values(
        world, storage, arms=ARMS, export="dit_s3", sampling={"steps": 200, "unit_size": 4}, selection={"groups": 20},
        actors={"count": actors, "max_attempts": 1},
        evaluation={"protocols": {"hard": {"width": 8, "epochs": 1, "validations": 1}}},
        tracking={"uri": f"sqlite:///{storage}.db"},
    )  # fmt: skip
    return write_config(storage.with_suffix(".yaml"), values)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*DISTILL, *arguments], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def notes(storage: Path) -> dict[Path, int]:
    """Finished units of the pool, each with the time at which it was finished."""
    found = storage.glob("artifacts/generate/*/shards/*.json")
    return {path.relative_to(storage): path.stat().st_mtime_ns for path in found}


def wait_for(storage: Path, units: int, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(notes(storage)) < units:
        assert driver.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(notes(storage)) < UNITS


def content(storage: Path) -> str:
    results = json.loads((storage / "tiny" / "results.json").read_text())
    return str(results["sets"]["dit_s3"]["content"])


def pool(storage: Path) -> dict[str, str]:
    """Unit → hash of its images, of a pool that must be whole."""
    (manifest,) = storage.glob("artifacts/generate/*/manifest.json")
    units = json.loads(manifest.read_text())["units"]
    assert len(units) == UNITS
    assert sum(entry["images"] for entry in units.values()) == 4 * UNITS
    return {unit: entry["sha256"] for unit, entry in units.items()}


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    """A head and two nodes, each with a raylet of its own."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    try:
        yield cluster
    finally:
        cluster.shutdown()


def kill(name: str) -> None:
    """SIGKILL one process of that name."""
    (process, *_) = [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]
    os.kill(process.pid, signal.SIGKILL)


def run_on_a_small_disk(file: str, storage: Path, kept: Path) -> subprocess.CompletedProcess[str]:
    """The job with its storage on a file system of 250 KiB that it alone sees; what it leaves there is copied to ``kept``."""
    job = f"{' '.join(DISTILL)} --config {file}"
    script = f"mount -t tmpfs -o size=250k tmpfs {storage} && {{ {job}; code=$?; cp -r {storage} {kept}; exit $code; }}"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(namespace, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_one_fault_after_another_in_the_middle_of_generate(tiny_world: Path, tmp_path: Path):
    storage, kept, whole = tmp_path / "disturbed", tmp_path / "kept", tmp_path / "whole"
    storage.mkdir()
    file = config(tiny_world, storage, 2)

    full = run_on_a_small_disk(file, storage, kept)
    assert full.returncode in (1, 2), full.stdout + full.stderr  # a shard, or the manifest, for which there was no room
    assert "No space left on device" in full.stderr.splitlines()[-1], full.stderr
    made = notes(kept)
    assert 0 < len(made) < UNITS
    assert not list(kept.rglob("*.tmp"))
    shutil.copytree(kept, storage, dirs_exist_ok=True)  # as if there were room now

    with three_nodes() as cluster:
        driver = start("--config", file, "actors.count=3", f"cluster.address={cluster.address}")
        wait_for(storage, len(made) + 2, driver)
        kill("ray::S3Selector")
        kill("ray::MapWorker")
        wait_for(storage, len(made) + 4, driver)
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        wait_for(storage, len(notes(storage)) + 4, driver)  # it goes on
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    before = notes(storage)
    assert len(made) + 8 <= len(before) < UNITS
    assert not (storage / "tiny" / "results.json").exists()

    resumed = run_job("--config", file)
    assert resumed.returncode == 0, resumed.stderr
    after = notes(storage)
    assert len(after) == UNITS
    assert {path: after[path] for path in before} == before, "finished units were made again"

    undisturbed = run_job("--config", config(tiny_world, whole, 1))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert content(storage) == content(whole)
    assert pool(storage) == pool(whole)
    first, second = ({f.name: f.read_bytes() for f in root.glob("tiny/distilled/data/*")} for root in (storage, whole))
    assert first == second
