"""Chaos soak: random SIGKILLs over whole runs on a cluster of several raylets, as JSON.

    python benchmarks/chaos.py                      100 kills: 20 minutes on two CPU cores
    python benchmarks/chaos.py kills=10 seed=3
    python benchmarks/chaos.py --config FILE        of another run than the one below

Victims are drawn from what is alive: the job's command, the task that it runs in (the head has no CPUs), a Ray Train worker, a
generator actor, the S3 actor, a raylet with all its processes. A command that ends is given again until its run is finished;
then comes the next run, from nothing, until all kills are spent. A node that was killed is replaced. `same` says that every
run ended with the hashes, Parquet bytes and accuracies of the undisturbed one; `missing` and `unexpected` count units of its
pools. `lost_s_per_kill` is what the runs took beyond undisturbed ones: work that was lost, starts, detection, waiting.
Exit code 1 if anything differs.
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
from ims3_ray.config import Section
from ims3_ray.errors import UserError
from ims3_ray.hardware import hardware

ROOT = Path(__file__).parents[1]
VICTIMS = {  # by what their processes call themselves
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
"""What is run, unless a file says otherwise: a minute on two cores."""


class ChaosConfig(Section):
    kills: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0)
    """Of when and whom."""
    every_s: float = Field(default=10.0, gt=0)
    """Seconds between kills, on average."""
    nodes: int = Field(default=2, ge=1)
    """Beside the head, with two CPUs each."""
    run: dict[str, Any] = Field(default={})
    """Values of the run beside those above."""


class Raylets:
    """A head without CPUs and some nodes; one that was killed is replaced."""

    def __init__(self, count: int) -> None:
        # With a dashboard of its own: Ray Train asks it, and would ask another cluster's that listens on the default port.
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": _free_port()}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(count):
            self.cluster.add_node(num_cpus=2)
        self.cluster.wait_for_nodes()

    def find(self, name: str) -> list[psutil.Process]:
        """Processes of this cluster's nodes that call themselves so."""
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
    """The command, given again until its run is finished."""

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
        """Starts it again if it has ended otherwise."""
        code = self.process.poll()
        if code == 2:  # nothing that another try could mend
            raise UserError(f"{self.config}: {self.log.read_text().splitlines()[-1]}")
        if code is not None and code != 0:
            self.start()
        return code == 0


class Killer:
    """Kills one after another until it has used up what it may."""

    def __init__(self, config: ChaosConfig, raylets: Raylets) -> None:
        self.config, self.raylets, self.rng = config, raylets, random.Random(config.seed)
        self.killed: Counter[str] = Counter()
        self.next = time.monotonic()

    @property
    def left(self) -> int:
        return self.config.kills - self.killed.total()

    def look(self, job: Job) -> None:
        """Kill somebody if it is time."""
        if not self.left or time.monotonic() < self.next or job.process.poll() is not None:
            return
        alive = {kind: found for kind, name in VICTIMS.items() if (found := self.raylets.find(name))}
        rare = sorted(set(alive) - {"task"})  # alive for a part of a run: two in three kills are theirs then
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
    """What must be the same: hash, accuracies, bytes of the exported set, hashes of every unit of the pools."""
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
    """One run to its end; how many commands it took."""
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
    """Runs until the kills are spent, and what came out."""
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
    os.environ.setdefault("RAY_health_check_failure_threshold", "3")  # a node that is gone is noticed sooner
    os.environ.setdefault("RAY_health_check_period_ms", "1000")
    sys.exit(main(__doc__ or "", ChaosConfig, soak))
