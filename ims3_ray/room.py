"""What a stage asks of an autoscaling cluster: room for so many workers, for as long as it runs."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from ims3_ray.config import ClusterConfig, Role
from ims3_ray.errors import UserError

Bundle = dict[str, float]
"""What one worker needs."""

EXPIRES_S = 60.0
"""After which a request is forgotten that nobody renews: a driver that was killed keeps no node alive."""
RENEW_S = 15.0
LOOK_EVERY_S = 0.5
SAY_EVERY_S = 15.0


class Request:
    """A request for nodes, renewed until it is let go.

    The requests of all stages, trials and jobs of a cluster are added up by the coordinator that Ray Data and Ray Train use
    themselves; `ray.autoscaler.sdk.request_resources` would overwrite what they ask for, and be overwritten by them.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels, self.name = dict(labels), f"ims3-{uuid.uuid4().hex[:12]}"
        self.bundles: list[Bundle] = []
        self._coordinator = coordinator()
        self._over = threading.Event()
        threading.Thread(target=self._renew, name=self.name, daemon=True).start()

    def ask(self, bundles: Sequence[Bundle]) -> None:
        """The cluster should hold all of these at once. It drops a request that it can never meet as a whole."""
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

        if self.bundles:
            self._coordinator.request_resources.remote(
                self.name, self.bundles, EXPIRES_S, label_selectors=[self.labels for _ in self.bundles],
                priority=ResourceRequestPriority.LOW,  # the nodes matter, not who is said to have them
            )  # fmt: skip


def coordinator() -> Any:
    """The actor that adds up what is asked of the autoscaler. Whoever starts it first has it on his node for good."""
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    return get_or_create_autoscaling_coordinator()


@contextmanager
def room(
    config: ClusterConfig, role: Role, title: str, bundles: Sequence[Bundle], at_least: int = 1
) -> Iterator[Request | None]:
    """Begins when the cluster has room for the first ``at_least`` of ``bundles``. One that grows (``cluster.wait_s``) is
    asked to hold them all until the end; what is missing comes while the others work.

    Raises :class:`UserError` where not even ``at_least`` have found room after ``wait_s`` seconds.
    """
    request = Request(config.place.get(role, {})) if config.wait_s and bundles else None
    try:
        if request:
            request.ask(bundles)
        if bundles:
            _wait(config, config.place.get(role, {}), title, bundles, at_least)
        yield request
    finally:
        if request:
            request.let_go()


def holds(bundle: Mapping[str, float], labels: Mapping[str, str]) -> int:
    """How many such workers the nodes with these labels can hold at once, as the cluster is now."""
    return sum(
        int(min(node["Resources"].get(kind, 0.0) / need for kind, need in bundle.items()))
        for node in ray.nodes()
        if node["Alive"] and all(node["Labels"].get(key) == value for key, value in labels.items())
    )


def _wait(
    config: ClusterConfig, labels: Mapping[str, str], title: str, bundles: Sequence[Bundle], at_least: int
) -> None:  # fmt: skip
    began, said = time.monotonic(), float("-inf")
    each = " ".join(f"{need:g} {kind}" for kind, need in bundles[0].items())
    where = "".join(f", {key}={value}" for key, value in labels.items())
    while (there := holds(bundles[0], labels)) < at_least:
        waited = time.monotonic() - began
        if waited >= config.wait_s:
            raise UserError(
                f"{title}: the cluster has room for {there} of {len(bundles)} workers ({each} each{where}) after "
                f"{waited:.0f} s and needs {at_least} to begin; see `ray status` and the limits of its node types, raise "
                "cluster.wait_s if it grows, change cluster.place, or lower finetune.trainer.num_workers or actors.count"
            )
        if waited - said >= SAY_EVERY_S:
            said = waited
            print(
                f"{title}: waits for nodes, {there} of {len(bundles)} workers have room ({each} each{where}); "
                f"{waited:.0f} s of {config.wait_s:.0f}",
                flush=True,
            )
        time.sleep(LOOK_EVERY_S)
    if waited := round(time.monotonic() - began):
        print(f"{title}: nodes are there after {waited} s", flush=True)
