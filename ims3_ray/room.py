"""Room on a cluster for what a stage does: what is asked of one that grows, how long is waited, what is said meanwhile."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from ims3_ray.config import ClusterConfig, Role
from ims3_ray.errors import UserError

Bundle = dict[str, float]
"""What one worker needs."""

EXPIRES_S = 60.0
"""After which a request is forgotten that nobody renews: a driver that was killed keeps no node alive."""
RENEW_S = 15.0
ASK_ALL_S = 60.0
"""For which all workers are asked for at once. The autoscaler drops what it can never meet as a whole: then the first few."""
LOOK_EVERY_S = 0.5
SAY_EVERY_S = 15.0


class Request:
    """A request for nodes, renewed until it is let go.

    The requests of all stages, trials and jobs of a cluster are added up by the coordinator that Ray Train and Ray Data use
    themselves; `ray.autoscaler.sdk.request_resources` would overwrite what they ask for, and be overwritten by them. Work that
    was submitted is demand by itself, so a request is for work that waits in the driver.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels, self.name = dict(labels), f"ims3-{uuid.uuid4().hex[:12]}"
        self.bundles: list[Bundle] = []
        self._coordinator = coordinator()
        self._over = threading.Event()
        threading.Thread(target=self._renew, name=self.name, daemon=True).start()

    def ask(self, bundles: Sequence[Bundle]) -> None:
        """The cluster should hold all of these at once."""
        if list(bundles) != self.bundles:
            self.bundles = list(bundles)
            self._send()

    def let_go(self) -> None:
        self._over.set()
        self._coordinator.cancel_request.remote(self.name)

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            self._send()

    def _send(self) -> None:
        from ray.data._internal.cluster_autoscaler import ResourceRequestPriority

        self._coordinator.request_resources.remote(
            self.name, self.bundles, EXPIRES_S, label_selectors=[self.labels for _ in self.bundles],
            priority=ResourceRequestPriority.LOW,  # the nodes matter, not who is said to have them
        )  # fmt: skip


def coordinator() -> Any:
    """The actor that adds up what is asked of the autoscaler. Whoever starts it first has it on his node for good."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    return get_or_create_autoscaling_coordinator()


class Presence:
    """Whether there is room for ``at_least`` of some workers: says when there is not, and raises :class:`UserError` when it has
    not been for ``cluster.wait_s`` seconds, on a cluster that does not grow at once."""

    def __init__(
        self, config: ClusterConfig, role: Role, title: str, bundles: Sequence[Bundle], at_least: int = 1
    ) -> None:  # fmt: skip
        self.config, self.title, self.bundles, self.at_least = config, title, bundles, at_least
        self.labels = config.place.get(role, {})
        self.since: float | None = None
        """When room was missed first."""
        self._said = float("-inf")

    def look(self) -> bool:
        there, now = holds(self.bundles[0], self.labels), time.monotonic()
        if there >= self.at_least:
            if self.since is not None and now - self.since > 1:
                print(f"{self.title}: nodes are there after {now - self.since:.0f} s", flush=True)
            self.since = None
            return True
        self.since = now if self.since is None else self.since
        waited, wait_s = now - self.since, self.config.wait_s
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
        return False

    def first_done(self, running: Sequence[Any]) -> Any:
        """The first task that ends, while there are nodes for any."""
        while not (done := ray.wait(list(running), num_returns=1, timeout=5)[0]):
            if self.config.wait_s:  # elsewhere Ray's word is enough: a task that can never run has been refused before
                self.look()
        return done[0]


def wait_for_room(
    config: ClusterConfig, role: Role, title: str, bundles: Sequence[Bundle], at_least: int = 1
) -> Presence:  # fmt: skip
    """Returns when the cluster has room for the first ``at_least`` of ``bundles``. One that grows (``cluster.wait_s``) is asked
    for all of them until then; what is missing comes by itself when they are started.

    Raises :class:`UserError` where not even ``at_least`` have found room after ``wait_s`` seconds.
    """
    presence = Presence(config, role, title, bundles, at_least)
    if not bundles or holds(bundles[0], presence.labels) >= at_least:
        return presence
    request, began = Request(presence.labels) if config.wait_s else None, time.monotonic()
    try:
        while not presence.look():
            if request:
                request.ask(bundles if time.monotonic() - began < ASK_ALL_S else bundles[:at_least])
            time.sleep(LOOK_EVERY_S)
    finally:
        if request:
            request.let_go()
    return presence


def holds(bundle: Mapping[str, float], labels: Mapping[str, str]) -> int:
    """How many such workers the nodes with these labels can hold at once, as the cluster is now."""
    return sum(
        int(min(node["Resources"].get(kind, 0.0) / need for kind, need in bundle.items()))
        for node in ray.nodes()
        if node["Alive"] and all(node["Labels"].get(key) == value for key, value in labels.items())
    )
