"""Joining or starting Ray, and where on it work is placed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ims3_ray.config import ClusterConfig, Role
from ims3_ray.errors import IncompletePool, UserError

LOCAL_CPUS = 4  # logical: the controllers and actors that wait beside the two that work
SCALED = ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "DS_BUILD_OPS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # nodes have to boot
    # Ray Data would have the cluster grow whenever it is well used, by nodes of any kind: the pool's actors are what is wanted.
    **{f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{what}_UTIL_THRESHOLD": "1e9" for what in SCALED},
}


def own_device() -> str:
    """Where a Ray task or actor computes: on the GPU that Ray gave it, if it did."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


def results(refs: Any) -> Any:
    """``ray.get``, but an error of ours in a task or an actor is raised as itself, which is one line."""
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | IncompletePool):
            raise error.cause from error
        raise


def joins(config: ClusterConfig) -> str | None:
    """The address of the cluster that a job joins, as configured or as the environment has it; None if it starts its own."""
    return config.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def connected(config: ClusterConfig, needed: dict[str, float] | None = None) -> Iterator[None]:
    """Ray, joined or started; what was started is stopped at the end.

    Raises :class:`UserError` at once if the cluster has less than ``needed`` and will not grow.
    """
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    started = not ray.is_initialized()
    if started:
        # Ray tells each new cluster's owner that it made a token: true, expected, and nothing to act on.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        address = joins(config)
        # The dashboard serves Ray Train's state queries. Without it they go to whatever listens on the default port, and
        # the answer of another cluster on the machine ("no such controller") has Ray Train remove its own workers.
        local = {} if address else {"num_cpus": max(LOCAL_CPUS, os.cpu_count() or 1), "include_dashboard": True}
        try:
            ray.init(
                address=address or "local",  # not whatever else was started on this machine
                logging_level=logging.WARNING,
                log_to_driver=os.environ.get("IMS3_WORKER_LOGS") == "1",
                runtime_env={"env_vars": {name: os.environ[name] for name in WORKER_ENV}},
                **local,
            )
        except ConnectionError as error:
            raise UserError(f"no Ray cluster answers at '{address}' ({error}); check cluster.address") from error
    try:
        if not config.wait_s:
            check_resources(needed or {})
        yield
    finally:
        if started:
            ray.shutdown()


def check_resources(needed: dict[str, float]) -> None:
    """:class:`UserError` if the cluster, as it is, cannot hold the plan's largest stage."""
    have = ray.cluster_resources()
    if short := {kind: value for kind, value in needed.items() if value > have.get(kind, 0)}:
        missing = ", ".join(f"{value:g} {kind} (has {have.get(kind, 0):g})" for kind, value in short.items())
        raise UserError(
            f"the cluster is too small for the plan: it needs {missing}; lower finetune.trainer.num_workers, "
            "actors.count or the CPUs and GPUs of each, or set cluster.wait_s for a cluster that grows"
        )


def placed(config: ClusterConfig, role: Role) -> dict[str, Any]:
    """Options of Ray by which work of this kind goes to the nodes that the config names for it."""
    return {"label_selector": config.place[role]} if config.place.get(role) else {}


def here() -> NodeAffinitySchedulingStrategy:
    """For helpers that wait beside the driver and need no CPU: on its node, so that they keep no other alive, and fail with
    the driver alone."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
