"""All uses of internal interfaces of Ray, which may change between versions of Ray.

``tests/unit/test_ray_internals.py`` shows which of them a new version of Ray has changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def autoscaling_coordinator() -> Any:
    """The actor through which Ray Data and Ray Train ask the autoscaler for nodes.

    It adds up all requests. It runs on the node of the process that first asks for it, until the cluster ends.
    """
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

    return get_or_create_autoscaling_coordinator()


def request_nodes(
    coordinator: Any, name: str, bundles: Sequence[Mapping[str, float]], labels: Mapping[str, str], expires_s: float
) -> None:
    """Ask for nodes that hold all ``bundles`` at once, under a name by which the request is renewed and cancelled."""
    from ray.data._internal.cluster_autoscaler import ResourceRequestPriority

    coordinator.request_resources.remote(
        name, [dict(bundle) for bundle in bundles], expires_s, label_selectors=[dict(labels) for _ in bundles],
        priority=ResourceRequestPriority.LOW,  # only the nodes matter, not which request they are assigned to
    )  # fmt: skip


def cancel_request(coordinator: Any, name: str) -> None:
    """Withdraw a request for nodes."""
    coordinator.cancel_request.remote(name)


def start_helpers_here() -> None:
    """Start on this node the actors that Ray Data keeps for the life of the cluster.

    Ray Data starts each of them on the node that first uses it. On a node of an autoscaler they would keep the node alive, or
    be lost with it.
    """
    from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor
    from ray.data._internal.usage.actor import get_or_create_usage_collection_actor

    autoscaling_coordinator()
    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()
    get_or_create_usage_collection_actor()


@contextmanager
def loopback_only() -> Iterator[dict[str, Any]]:
    """Arguments for ``ray.init`` with which a local Ray listens on 127.0.0.1 alone.

    Its processes do so for this address, but ``ray.init`` replaces it by the address of the machine's network on Linux.
    """
    from ray._private import services

    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield {"_node_ip_address": "127.0.0.1"}
    finally:
        services.resolve_ip_for_localhost = resolve


def local_raylet() -> Any:
    """The process of the raylet that ``ray.init`` has started on this machine, as a ``subprocess.Popen``; None if it has
    started none."""
    from ray._private import worker

    node = worker._global_node
    found = node.all_processes.get("raylet") if node is not None else None
    return found[0].process if found else None


def hide_events(pattern: re.Pattern[str]) -> None:
    """Do not print the messages of Ray's processes that match; Ray prints them in the driver even if it prints no logs."""
    from ray._private import worker

    shown = worker.print_to_stdstream
    if getattr(shown, "hides", None) == pattern:
        return

    def show(data: dict[str, Any], *more: Any, **options: Any) -> None:
        if lines := [line for line in data.get("lines", []) if not pattern.search(line)]:
            shown({**data, "lines": lines}, *more, **options)

    show.hides = pattern  # type: ignore[attr-defined]
    worker.print_to_stdstream = show


@contextmanager
def only_fatal_messages() -> Iterator[None]:
    """While ``ray.init`` is called: Ray's C++ code in this process is told to print only fatal messages. Its errors, such as
    one for every actor pool of Ray Data, need no action by the user; those of Ray's other processes go to its log files."""
    from ray._private import worker

    connect, name = worker.connect, "RAY_BACKEND_LOG_LEVEL"

    def quietly(*arguments: Any, **options: Any) -> Any:
        if name in os.environ:  # the user has chosen a level
            return connect(*arguments, **options)
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.environ[name] = "fatal"  # read once, when the C++ code of this process starts
        os.dup2(nowhere, 2)  # it prints that it has read this
        try:
            return connect(*arguments, **options)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)
            del os.environ[name]

    worker.connect = quietly
    try:
        yield
    finally:
        worker.connect = connect
