"""Fault test: random SIGKILLs during whole runs on a cluster of several raylets; the report is JSON.

    python benchmarks/chaos.py                      100 kills: 20 minutes on two CPU cores
    python benchmarks/chaos.py kills=10 seed=3
    python benchmarks/chaos.py --config FILE        values from a file

Victims are drawn from the processes that are alive: the job's command, the task that it runs in (the head has no CPUs), a Ray
Train worker, a generator actor, the S3 actor, a raylet with all its processes. A command that fails is started again until its
run is finished; then another run starts from nothing, until all kills are done. A killed node is replaced. `same` says whether
every run ended with the hashes, Parquet bytes and accuracies of the undisturbed run; `missing` and `unexpected` count the units
that its pools lack or have in excess. `lost_s_per_kill` is the time in seconds by which the runs took longer than undisturbed
ones, per kill: lost work, restarts, detection of failures, waiting. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import Field
from ray.cluster_utils import Cluster

from ims3_ray.cli import main
from ims3_ray.cluster.hardware import hardware
from ims3_ray.config import Section
from ims3_ray.errors import UserError

ROOT = Path(__file__).parents[1]
VICTIMS = {  # kind of victim → part of the title of its process
    "task": "ray::_drive", "train worker": "ray::RayTrainWorker", "generator actor": "ray::MapWorker",
    "S3 actor": "ray::S3Selector",
}  # fmt: skip
RUN: dict[str, Any] = {
    "data": {"classes": ["Trouser", "Bag", "Sneaker"], "unit_size": 100},
    "finetune": {"steps": 60, "batch_size": 8, "checkpoint_every": 10, "trainer": {"num_workers": 2, "max_failures": 50}},
    "sampling": {"steps": 20, "unit_size": 4},
    "selection": {"images_per_class": 4, "groups": 16},
    "arms": {"random_real": None, "dit": None, "dit_s3": None},
    "actors": {"max_attempts": 10},
    "instability": {"images": 0},
    "evaluation": {"protocols": {"hard": {"width": 16, "epochs": 30, "validations": 2}}, "seeds": [0, 1], "val_per_class": 5},
}
"""Config of the run, to which `run` adds; it takes a minute on two cores."""


class ChaosConfig(Section):
    kills: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)
    """Seed for the times of the kills and the choice of victims."""
    every_s: float = Field(default=10.0, gt=0)
    """Mean time between kills, in seconds."""
    nodes: int = Field(default=2, ge=1)
    """Number of nodes besides the head, with two CPUs each."""
    run: dict[str, Any] = Field(default={})
    """Config values that are added to those of the run above or replace them."""


class Raylets:
    """A cluster with a head without CPUs and some nodes; a killed node is replaced."""

    def __init__(self, count: int) -> None:
        # The cluster has its own dashboard: Ray Train queries it, and could else reach another cluster's on the default port.
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": _free_port()}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(count):
            self.cluster.add_node(num_cpus=2)
        self.cluster.wait_for_nodes()

    def find(self, name: str) -> list[psutil.Process]:
        """Processes of this cluster's nodes whose command line contains ``name``."""
        found = []
        for node in self.cluster.list_all_nodes():
            with suppress(psutil.NoSuchProcess, KeyError):
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                found += [p for p in raylet.children(recursive=True) if name in " ".join(_command(p))]
        return found

    def kill_node(self, rng: random.Random) -> None:
        node = rng.choice(sorted(self.cluster.worker_nodes, key=lambda n: str(n.node_id)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(num_cpus=2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


class Job:
    """The job's command, which is started again until its run is finished."""

    def __init__(self, config: Path, log: Path) -> None:
        self.config, self.log, self.commands = config, log, 0
        self.start()

    def start(self) -> None:
        self.commands += 1
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/distill.py", "--config", str(self.config)], cwd=ROOT, stdout=out, stderr=out
            )

    def is_finished(self) -> bool:
        """Whether the run is finished; a command that ended with an error is started again."""
        code = self.process.poll()
        if code == 2:  # bad input: another attempt would fail too
            raise UserError(f"{self.config}: {self.log.read_text().splitlines()[-1]}")
        if code is not None and code != 0:
            self.start()
        return code == 0


class Killer:
    """Kills one victim after another, up to the number of kills in the config."""

    def __init__(self, config: ChaosConfig, raylets: Raylets) -> None:
        self.config, self.raylets, self.rng = config, raylets, random.Random(config.seed)
        self.killed: Counter[str] = Counter()
        self.next = time.monotonic()

    @property
    def left(self) -> int:
        return self.config.kills - self.killed.total()

    def look(self, job: Job) -> None:
        """Kill a victim if the time of the next kill has come."""
        if not self.left or time.monotonic() < self.next or job.process.poll() is not None:
            return
        alive = {kind: found for kind, name in VICTIMS.items() if (found := self.raylets.find(name))}
        rare = sorted(set(alive) - {"task"})  # alive during a part of a run only; then two in three kills hit them
        always = ["command", "raylet", *(["task"] if "task" in alive else [])]
        kind = self.rng.choice(rare if rare and self.rng.random() < 2 / 3 else always)
        if kind == "command":
            job.process.kill()
        elif kind == "raylet":
            self.raylets.kill_node(self.rng)
        else:
            with suppress(psutil.NoSuchProcess):
                self.rng.choice(sorted(alive[kind], key=lambda p: p.pid)).kill()
        self.killed[kind] += 1
        self.next = time.monotonic() + self.rng.expovariate(1 / self.config.every_s)
        print(f"kill {self.killed.total()}: {kind}", file=sys.stderr, flush=True)


def outcome(storage: Path) -> dict[str, Any]:
    """What must be equal in all runs: hash, accuracies, bytes of the exported set, hash of every unit of the pools."""
    results = json.loads((storage / "soak" / "results.json").read_text())
    units = {}
    for kind in ("encode", "generate", "embed"):
        for manifest in sorted(storage.glob(f"artifacts/{kind}/*/manifest.json")):
            found = json.loads(manifest.read_text())["units"]
            units[str(manifest.parent.relative_to(storage))] = {unit: entry["sha256"] for unit, entry in found.items()}
    exported = {file.name: file.read_bytes() for file in (storage / "soak" / "distilled" / "data").iterdir()}
    return {"sets": results["sets"], "units": units, "exported": exported}


def soak(config: ChaosConfig) -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        raylets = Raylets(config.nodes)
        try:
            began = time.monotonic()
            _finish(config, raylets, folder / "whole")
            whole = outcome(folder / "whole")
            undisturbed = time.monotonic() - began
            print(f"undisturbed: {undisturbed:.0f} s", file=sys.stderr, flush=True)
            report = _disturb(config, raylets, folder, whole, undisturbed)
        finally:
            raylets.cluster.shutdown()
    print(json.dumps({"machine": hardware("cpu"), "undisturbed_s": round(undisturbed, 1), **report}, indent=1))
    if not report["same"]:
        raise SystemExit(1)


def _finish(config: ChaosConfig, raylets: Raylets, storage: Path, killer: Killer | None = None) -> int:
    """Carry out one run to its end; return how often the command was started."""
    file, cluster = storage.with_suffix(".yaml"), {"address": raylets.cluster.address, "wait_s": 300}
    file.write_text(yaml.safe_dump({**RUN, **config.run, "name": "soak", "storage": str(storage), "cluster": cluster}))
    job = Job(file, storage.with_suffix(".log"))
    try:
        while not job.is_finished():
            if killer:
                killer.look(job)
            time.sleep(0.2)
    finally:
        job.process.kill()
    return job.commands


def _disturb(
    config: ChaosConfig, raylets: Raylets, folder: Path, whole: dict[str, Any], undisturbed: float
) -> dict[str, Any]:  # fmt: skip
    """Carry out runs until all kills are done; return the report."""
    killer, runs, same, missing, unexpected = Killer(config, raylets), 0, True, 0, 0
    began, commands = time.monotonic(), 0
    while killer.left:
        storage, runs = folder / f"run-{runs}", runs + 1
        commands += _finish(config, raylets, storage, killer)
        found = outcome(storage)
        same &= found == whole
        for pool, units in whole["units"].items():
            there = found["units"].get(pool, {})
            missing += len(set(units) - set(there))
            unexpected += len(set(there) - set(units))
    wall = time.monotonic() - began
    lost = wall - runs * undisturbed
    return {
        "same": same, "runs": runs, "kills": killer.killed.total(), "by_kind": dict(sorted(killer.killed.items())),
        "commands": commands, "missing": missing, "unexpected": unexpected, "wall_s": round(wall, 1),
        "lost_s_per_kill": round(lost / killer.killed.total(), 1),
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("RAY_health_check_failure_threshold", "3")  # detects a dead node sooner
    os.environ.setdefault("RAY_health_check_period_ms", "1000")
    sys.exit(main(__doc__ or "", ChaosConfig, soak))
