"""What Ray does not promise to keep and this program uses. A failure here says what a new version of Ray has changed."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from pathlib import Path

import pytest

from ims3_ray.cluster import ray_internals
from ims3_ray.cluster.joining import EXPECTED

PACKAGE = Path(ray_internals.__file__).parents[1]


def private_names(source: str) -> list[tuple[str, str]]:
    """(module, name) of everything that is imported from a private module of Ray."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray.") and "._" in node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


NAMES = private_names(Path(ray_internals.__file__).read_text())


def test_only_one_file_uses_what_is_private():
    users = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if private_names(file.read_text())}
    assert users == {"cluster/ray_internals.py"}
    assert len(NAMES) == 9


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_ray_still_has_it(module: str, name: str):
    assert hasattr(importlib.import_module(module), name), f"this version of Ray has no {module}.{name}"


def test_ray_still_replaces_the_address_of_the_loopback_where_it_is_kept_from_doing_so():
    services = importlib.import_module("ray._private.services")
    replaced = services.resolve_ip_for_localhost
    with ray_internals.loopback_only() as arguments:
        assert services.resolve_ip_for_localhost("127.0.0.1") == arguments["_node_ip_address"] == "127.0.0.1"
    assert services.resolve_ip_for_localhost is replaced


def test_errors_of_the_drivers_own_c_code_are_hidden_while_it_connects(monkeypatch: pytest.MonkeyPatch):
    worker = importlib.import_module("ray._private.worker")
    levels: list[str | None] = []
    monkeypatch.setattr(worker, "connect", lambda: levels.append(os.environ.get("RAY_BACKEND_LOG_LEVEL")))
    monkeypatch.delenv("RAY_BACKEND_LOG_LEVEL", raising=False)
    with ray_internals.only_fatal_messages():
        worker.connect()
    worker.connect()
    assert levels == ["fatal", None]


def test_messages_that_are_expected_are_not_shown_and_others_are(monkeypatch: pytest.MonkeyPatch):
    worker = importlib.import_module("ray._private.worker")
    shown: list[str] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, **options: shown.extend(data["lines"]))
    ray_internals.hide_events(EXPECTED)
    many = (
        "WARNING: 8 PYTHON worker processes have been started on node: 7ec96e with address: 127.0.0.1, which is 4x the maximum"
    )
    for lines in ([many], ["The object store is full.", "The actor was killed by `ray.kill`"]):
        worker.print_to_stdstream({"pid": "raylet", "lines": lines}, ignore_prefix=False)
    assert shown == ["The object store is full."]


def test_the_coordinator_still_takes_what_it_is_given():
    from ray.data._internal.cluster_autoscaler import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    assert hasattr(ResourceRequestPriority, "LOW")
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if hasattr(kind, "request_resources")]
    assert kinds, "no class of Ray Data coordinates requests for nodes any more"
    for kind in kinds:
        wanted = set(inspect.signature(kind.request_resources).parameters)
        assert {"label_selectors", "priority"} <= wanted, f"{kind.__name__}.request_resources takes {sorted(wanted)}"
        assert hasattr(kind, "cancel_request")
