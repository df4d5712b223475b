"""Waits until a cluster has capacity for a stage: requests nodes where the cluster can grow, and prints what is missing."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from ims3_ray.cluster.ray_internals import autoscaling_coordinator, cancel_request, request_nodes
from ims3_ray.config import ClusterConfig, Role
from ims3_ray.errors import UserError

Bundle = dict[str, float]
"""Resources that one worker needs: name → amount."""

EXPIRES_S = 60.0
"""Seconds after which a request that is not renewed expires, so that a killed driver keeps no node alive."""
RENEW_S = 15.0
ASK_ALL_S = 60.0
"""Seconds during which nodes for all workers are requested. The autoscaler ignores a request that it can never meet as a whole,
so after this time only the smallest sufficient number of workers is requested."""
LOOK_EVERY_S = 0.5
LOST_S = 60.0
"""Seconds after which tasks whose nodes are all lost are given up on a cluster that does not grow."""
SAY_EVERY_S = 15.0


class Request:
    """A request for nodes, renewed until :meth:`let_go` is called.

    The requests of all stages, trials and jobs of a cluster are added up by the coordinator that Ray Train and Ray Data use
    themselves; `ray.autoscaler.sdk.request_resources` would overwrite what they ask for, and be overwritten by them. Ray counts
    submitted work as demand by itself, so a request is for work that waits in the driver, or for which Ray finds no node type.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels, self.name = dict(labels), f"ims3-{uuid.uuid4().hex[:12]}"
        self.bundles: list[Bundle] = []
        self._coordinator = autoscaling_coordinator()
        self._over = threading.Event()
        threading.Thread(target=self._renew, name=self.name, daemon=True).start()

    def ask(self, bundles: Sequence[Bundle]) -> None:
        """Request that the cluster has room for all ``bundles`` at once."""
        if list(bundles) != self.bundles:
            self.bundles = list(bundles)
            self._send()

    def let_go(self) -> None:
        self._over.set()
        cancel_request(self._coordinator, self.name)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            self._send()

    def _send(self) -> None:
        request_nodes(self._coordinator, self.name, self.bundles, self.labels, EXPIRES_S)


class CapacityWatch:
    """Checks whether the cluster has room for ``at_least`` of a stage's workers. While it has not, :meth:`look` requests nodes
    for all of them (``bundles``), prints messages at intervals, and raises :class:`UserError` after ``cluster.wait_s`` seconds;
    at once for a cluster that does not grow.

    Nodes are requested for tasks that were submitted, too. All nodes that can run them may be lost, and the autoscaler starts
    none for a task that reserves memory if the configuration gives its node types by CPUs and GPUs alone.
    """

    def __init__(
        self, config: ClusterConfig, role: Role | None, title: str, bundles: Sequence[Bundle], at_least: int = 1
    ) -> None:  # fmt: skip
        """``role`` is that of the workers in ``cluster.place``; those of None may run on any node."""
        self.config, self.title, self.bundles, self.at_least = config, title, bundles, at_least
        self.labels = {} if role is None else config.place.get(role, {})
        self.since: float | None = None
        """Monotonic time in seconds at which room was first missing; None while there is room."""
        self._said = float("-inf")
        self._request: Request | None = None

    def look(self, ask: bool = True, patience_s: float = 0.0) -> bool:
        """Whether there is room. ``ask=False`` requests nothing. ``patience_s`` takes the place of a ``wait_s`` of 0."""
        there, now = holds(self.bundles[0], self.labels), time.monotonic()
        if there >= self.at_least:
            if self.since is not None and now - self.since > 1:
                print(f"{self.title}: nodes are there after {now - self.since:.0f} s", flush=True)
            self.let_go()
            return True
        self.since = now if self.since is None else self.since
        waited, wait_s = now - self.since, self.config.wait_s or patience_s
        each = " ".join(f"{need:g} {kind}" for kind, need in self.bundles[0].items())
        what = f"{each} each" + "".join(f", {key}={value}" for key, value in self.labels.items())
        if waited >= wait_s:
            raise UserError(
                f"{self.title}: the cluster has room for {there} of {len(self.bundles)} workers ({what}) after {waited:.0f} s "
                f"and needs {self.at_least}; see `ray status` and the limits of its node types, raise cluster.wait_s if it "
                "grows, change cluster.place, or lower finetune.trainer.num_workers or actors.count"
            )
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            print(
                f"{self.title}: waits for nodes, {there} of {len(self.bundles)} workers have room ({what}); "
                f"{waited:.0f} s of {wait_s:.0f}",
                flush=True,
            )
        if ask and self.config.wait_s:
            self._request = self._request or Request(self.labels)
            self._request.ask(self.bundles if waited < ASK_ALL_S else self.bundles[: self.at_least])
        return False

    def let_go(self) -> None:
        """End the waiting and withdraw the request, if there is one."""
        self.since = None
        if self._request is not None:
            self._request.let_go()
            self._request = None

    def first_done(self, running: Sequence[Any], meanwhile: Callable[[], None] | None = None) -> Any:
        """The first of the ``running`` tasks to end. Every few seconds until then ``meanwhile`` and :meth:`look` are called."""
        try:
            while not (done := ray.wait(list(running), num_returns=1, timeout=5)[0]):
                if meanwhile is not None:
                    meanwhile()
                self.look(patience_s=LOST_S)
        finally:
            self.let_go()
        return done[0]


def wait_for_capacity(
    config: ClusterConfig, role: Role, title: str, bundles: Sequence[Bundle], at_least: int = 1
) -> CapacityWatch:  # fmt: skip
    """Returns when the cluster has room for the first ``at_least`` of ``bundles``. Until then, a cluster that grows
    (``cluster.wait_s``) is asked for nodes for all of them, and after :data:`ASK_ALL_S` seconds for those of ``at_least``. The
    autoscaler adds nodes for the remaining workers when these are started.

    Raises :class:`UserError` if there is no room for ``at_least`` workers after ``wait_s`` seconds.
    """
    watch = CapacityWatch(config, role, title, bundles, at_least)
    try:
        while bundles and not watch.look():
            time.sleep(LOOK_EVERY_S)
    finally:
        watch.let_go()
    return watch


def largest_memory(config: ClusterConfig, role: Role, bundle: Mapping[str, float]) -> float:
    """The most memory, in bytes, of a node that can hold a worker of size ``bundle``; 0 while there is no such node.

    A task that reserves more can never run. Callers reserve at most this, since what a task needs is an estimate.
    """
    nodes = [node for node in _nodes(config.place.get(role, {})) if _held(node, bundle)]
    return max((node["Resources"].get("memory", 0.0) for node in nodes), default=0.0)


def holds(bundle: Mapping[str, float], labels: Mapping[str, str]) -> int:
    """Number of workers of size ``bundle`` that the current nodes with these ``labels`` can hold at once."""
    return sum(_held(node, bundle) for node in _nodes(labels))


def _held(node: Mapping[str, Any], bundle: Mapping[str, float]) -> int:
    return int(min(node["Resources"].get(kind, 0.0) / need for kind, need in bundle.items()))


def _nodes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The nodes that are alive and have these ``labels``."""
    return [
        node for node in ray.nodes() if node["Alive"] and all(node["Labels"].get(key) == value for key, value in labels.items())
    ]
