"""A node provider for Ray's autoscaler whose nodes are raylets on this machine, and a cluster that grows by it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

RAY = str(Path(sys.executable).with_name("ray"))
SPOT, ON_DEMAND, DRIVER = {"ray.io/market-type": "spot"}, {"ray.io/market-type": "on-demand"}, {"role": "driver"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it, each stopped before any is killed: none starts another or is handed to init."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        while more := [p for p in [root, *root.children(recursive=True)] if p not in family]:
            family += more
            for member in more:
                with suppress(psutil.NoSuchProcess):
                    member.suspend()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


class LocalNodes(NodeProvider):  # type: ignore[misc]
    """Runs in the autoscaler's own process; what it does it notes in the file ``events`` of its configuration."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.tags = {"head": {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: "head"}}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> None:
        for _ in range(count):
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            node = f"{kind}-{len(self.tags)}"
            names = {"RAY_CLOUD_INSTANCE_ID": node, "RAY_NODE_TYPE_NAME": kind, "RAY_OVERRIDE_LABELS": json.dumps(labels)}
            options = [f"--address={self.provider_config['address']}", "--dashboard-agent-listen-port=0"]
            self.processes[node] = subprocess.Popen(
                [RAY, "start", "--block", f"--num-cpus={resources['CPU']}", *options],
                env={**os.environ, **names}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.tags[node] = tags
            self._note("start", node)

    def _note(self, event: str, node: str) -> None:
        with open(self.provider_config["events"], "a") as file:
            file.write(json.dumps({"event": event, "node": node, "pid": self.processes[node].pid}) + "\n")

    def is_running(self, node_id: str) -> bool:
        return node_id == "head" or self.processes[node_id].poll() is None

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return [n for n, tags in list(self.tags.items()) if self.is_running(n) and tag_filters.items() <= tags.items()]

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self.tags[node_id]

    def terminate_node(self, node_id: str) -> None:
        if self.is_running(node_id):
            kill_tree(self.processes[node_id].pid)
            self._note("end", node_id)


@dataclass(frozen=True)
class GrowingCluster:
    address: str
    environment: dict[str, str]
    events: Path

    def started(self, kind: str) -> list[dict[str, Any]]:
        """Every node of a type that was ever started, in order."""
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return [e for e in map(json.loads, lines) if e["event"] == "start" and e["node"].startswith(f"{kind}-")]

    def alive(self, kind: str) -> list[int]:
        """Process ids of the nodes of a type."""
        return [node["pid"] for node in self.started(kind) if _runs(node["pid"])]

    def wait_until_empty(self, kind: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.alive(kind):
            assert time.monotonic() < deadline, f"a {kind} node stays"
            time.sleep(0.2)


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _node_type(cpus: int, most: int, labels: dict[str, str]) -> dict[str, Any]:
    return {"resources": {"CPU": cpus}, "labels": labels, "min_workers": 0, "max_workers": most, "node_config": {}}


@contextmanager
def growing_cluster() -> Iterator[GrowingCluster]:
    """A head without CPUs, and types driver, train and sampler of which there are no nodes yet; idle ones go after 6 s."""
    port, dashboard, folder = free_port(), free_port(), Path(tempfile.mkdtemp(prefix="grow-", dir="/tmp"))
    address, events = f"127.0.0.1:{port}", folder / "events.jsonl"
    config = {
        "cluster_name": "local", "max_workers": 8, "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external", "module": "tests.local_nodes.LocalNodes", "address": address, "events": str(events),
            "disable_node_updaters": True,
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}},
            "driver": _node_type(2, 1, DRIVER), "train": _node_type(2, 3, ON_DEMAND), "sampler": _node_type(1, 2, SPOT),
        },
        **{k: [] for k in ("cluster_synced_files", "setup_commands", "head_setup_commands", "worker_setup_commands")},
    }  # fmt: skip
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {
        **os.environ, **token, "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": "head",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
        "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3", "RAY_health_check_timeout_ms": "2000",
    }  # fmt: skip
    command = [RAY, "start", "--head", "--block", "--num-cpus=0", f"--autoscaling-config={file}", f"--temp-dir={folder}"]
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"]
    log = folder / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen([*command, *ports], env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield GrowingCluster(address, token, events)
    finally:
        kill_tree(head.pid)
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
