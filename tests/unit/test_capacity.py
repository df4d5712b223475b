"""Room on a cluster: what is counted, how long is waited, what is asked for and let go. The cluster and its coordinator are
lists here; tests/e2e/test_autoscaling.py has real ones."""

from __future__ import annotations

import importlib
import re
import time
from typing import Any

import pytest

from ims3_ray.cluster import capacity as module
from ims3_ray.cluster.capacity import holds, largest_memory, wait_for_capacity
from ims3_ray.cluster.joining import check_resources
from ims3_ray.config import ClusterConfig
from ims3_ray.errors import UserError

SPOT = {"market": "spot"}


def node(labels: dict[str, str] | None = None, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Labels": {"ray.io/node-id": "x", **(labels or {})}, "Resources": resources}


class Method:
    def __init__(self, calls: list[tuple[Any, ...]], name: str) -> None:
        self.calls, self.name = calls, name

    def remote(self, *arguments: Any, **named: Any) -> None:
        self.calls.append((self.name, *arguments, named))


class Coordinator:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.request_resources, self.cancel_request = (Method(self.calls, name) for name in ("request", "cancel"))


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    found = Coordinator()
    importlib.import_module("ray.data._internal.cluster_autoscaler")  # takes seconds, at the first request
    monkeypatch.setattr(module, "autoscaling_coordinator", lambda: found)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    return found


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(module.ray, "nodes", lambda: found)
    return found


def test_workers_are_counted_by_node_and_label(nodes: list[dict[str, Any]]):
    nodes += [node(CPU=5, GPU=2), node(SPOT, CPU=3, GPU=9), node(SPOT, alive=False, CPU=99, GPU=99), node(CPU=1)]
    assert holds({"CPU": 2}, {}) == 2 + 1  # not 9 CPUs over 2: a worker has its CPUs on one node
    assert holds({"CPU": 1, "GPU": 1}, {}) == 2 + 3
    assert holds({"CPU": 1, "GPU": 1}, SPOT) == 3
    assert holds({"CPU": 1}, {"market": "on-demand"}) == 0


def test_a_cluster_that_does_not_grow_is_asked_for_nothing_and_too_small_at_once(
    nodes: list[dict[str, Any]], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
):
    nodes.append(node(CPU=2))
    wait_for_capacity(ClusterConfig(), "pool", "generate", [{"CPU": 1.0}] * 2)
    expected = "generate: the cluster has room for 0 of 3 workers (4 CPU each, market=spot) after 0 s and needs 1; see"
    with pytest.raises(UserError, match=re.escape(expected)):
        wait_for_capacity(ClusterConfig(place={"pool": SPOT}), "pool", "generate", [{"CPU": 4.0}] * 3)
    monkeypatch.setattr("ray.cluster_resources", lambda: nodes[0]["Resources"])
    with pytest.raises(UserError, match=r"it needs 3 CPU \(has 2\), 1 GPU \(has 0\)"):
        check_resources({"CPU": 3.0, "GPU": 1.0})
    assert coordinator.calls == []


def test_a_cluster_that_grows_is_asked_until_there_is_room_for_the_first(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """For all workers at first, then for those that are needed to begin: a request that can never be met is dropped whole."""
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    monkeypatch.setattr(module, "ASK_ALL_S", 0.2)
    until = time.monotonic() + 0.6
    monkeypatch.setattr(module.ray, "nodes", lambda: [node(SPOT, CPU=1)] if time.monotonic() > until else [])
    wait_for_capacity(ClusterConfig(wait_s=30, place={"pool": SPOT}), "pool", "generate", [{"CPU": 1.0}] * 2)
    asked = [call for call in coordinator.calls if call[0] == "request"]
    assert {call[1] for call in coordinator.calls} == {asked[0][1]}
    assert [len(call[2]) for call in asked] == sorted((len(call[2]) for call in asked), reverse=True)
    assert {len(call[2]) for call in asked} == {1, 2}
    assert len(asked) > 4  # renewed: without that it expires
    for _, _, bundles, expires, options in asked:
        assert (expires, options["label_selectors"]) == (module.EXPIRES_S, [SPOT] * len(bundles))
    assert coordinator.calls[-1][0] == "cancel"
    counted = len(coordinator.calls)
    time.sleep(0.15)
    assert len(coordinator.calls) == counted
    said = "generate: waits for nodes, 0 of 2 workers have room (1 CPU each, market=spot); 0 s of 30"
    assert said in capsys.readouterr().out


def test_waiting_has_an_end_after_which_nothing_is_asked_for(nodes: list[dict[str, Any]], coordinator: Coordinator):
    with pytest.raises(UserError, match=r"room for 0 of 8 workers \(1 GPU each\) after 0 s and needs 2; see"):
        wait_for_capacity(ClusterConfig(wait_s=0.05), "finetune", "fine-tune", [{"GPU": 1.0}] * 8, at_least=2)
    assert coordinator.calls[-1][0] == "cancel"


def test_nodes_that_go_while_work_runs_are_missed_and_waited_for(
    nodes: list[dict[str, Any]], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    nodes.append(node(CPU=1))
    watch = wait_for_capacity(ClusterConfig(wait_s=0.3), "evaluate", "evaluate", [{"CPU": 1.0}])
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: (refs[:1] if nodes else [], refs))
    assert watch.first_done(["one", "two"]) == "one"
    nodes.clear()
    assert not watch.look()
    nodes.append(node(CPU=1))
    assert watch.look()
    nodes.clear()
    with pytest.raises(UserError, match=r"evaluate: the cluster has room for 0 of 1 workers"):
        watch.first_done(["one", "two"])
    assert "evaluate: waits for nodes" in capsys.readouterr().out
    assert [call[0] for call in coordinator.calls if call[0] != "request"] == ["cancel", "cancel"]
    assert [call[2] for call in coordinator.calls if call[0] == "request"] == [[{"CPU": 1.0}]] * 2


def test_nodes_that_go_while_work_runs_are_not_waited_for_without_end_where_none_comes(
    nodes: list[dict[str, Any]], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOST_S", 0.2)
    nodes.append(node(CPU=1))
    watch = wait_for_capacity(ClusterConfig(), "evaluate", "evaluate", [{"CPU": 1.0}])
    nodes.clear()
    ends = time.monotonic() + 0.1
    monkeypatch.setattr(module.ray, "wait", lambda refs, **_: (refs[: time.monotonic() > ends], refs))
    assert watch.first_done(["one"]) == "one"  # a loss for a moment does no harm
    ends = time.monotonic() + 30
    with pytest.raises(UserError, match=r"evaluate: the cluster has room for 0 of 1 workers .* after 0 s and needs 1"):
        watch.first_done(["one"])
    assert coordinator.calls == []


def test_the_memory_that_is_reserved_is_that_of_a_node_that_can_do_the_work(nodes: list[dict[str, Any]]):
    nodes += [node(CPU=0, memory=9e9), node(CPU=4, memory=2e9), node(SPOT, CPU=4, GPU=1, memory=3e9)]
    assert largest_memory(ClusterConfig(), "evaluate", {"CPU": 1.0}) == 3e9
    assert largest_memory(ClusterConfig(), "evaluate", {"CPU": 1.0, "GPU": 1.0}) == 3e9
    assert largest_memory(ClusterConfig(place={"evaluate": SPOT}), "evaluate", {"CPU": 8.0}) == 0
    del nodes[2]
    assert largest_memory(ClusterConfig(), "evaluate", {"CPU": 1.0}) == 2e9
