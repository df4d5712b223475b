"""Joining or starting Ray, and the check that the cluster can hold the plan."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from ims3_ray.config import ClusterConfig
from ims3_ray.errors import UserError

LOCAL_CPUS = 4  # logical: the controllers and actors that wait beside the two that work
WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "DS_BUILD_OPS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # nodes have to boot
}

Bundles = list[dict[str, float]]
"""What each of some workers needs."""


def own_device() -> str:
    """Where a Ray task or actor computes: on the GPU that Ray gave it, if it did."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


def results(refs: Any) -> Any:
    """``ray.get``, but a :class:`UserError` of a task or an actor is raised as itself, which is one line."""
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise


@contextmanager
def connected(config: ClusterConfig, needed: dict[str, float]) -> Iterator[None]:
    """Ray, joined or started, with at least the ``needed`` resources; what was started is stopped at the end.

    Raises :class:`UserError` at once (or after ``config.wait_s``) if the cluster is too small.
    """
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    started = not ray.is_initialized()
    if started:
        # Ray tells each new cluster's owner that it made a token: true, expected, and nothing to act on.
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        address = config.address or os.environ.get("RAY_ADDRESS")
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
        check_resources(needed, config.wait_s)
        yield
    finally:
        if started:
            ray.shutdown()


@contextmanager
def growing() -> Iterator[Callable[[Bundles], None]]:
    """Gives a function that asks an autoscaling cluster to grow until it holds the bundles at once; at the end it need not.

    Work that waits for its turn in the driver is no demand that the autoscaler could see. It drops a request that it can
    never meet as a whole, so ask for a little more than there is, again and again.
    """
    from ray.autoscaler.sdk import request_resources

    asked: Bundles = []

    def ask(bundles: Bundles) -> None:
        nonlocal asked
        if bundles != asked:
            request_resources(bundles=bundles)
            asked = bundles

    try:
        yield ask
    finally:
        ask([])


def check_resources(needed: dict[str, float], wait_s: float = 0) -> None:
    """Compare the plan's largest stage with the cluster; on an autoscaling one ask for nodes and wait ``wait_s``."""
    deadline = time.monotonic() + wait_s
    asked = False
    while short := {k: v for k, v in needed.items() if v > ray.cluster_resources().get(k, 0)}:
        if time.monotonic() >= deadline:
            have = ray.cluster_resources()
            missing = ", ".join(f"{v:g} {k} (has {have.get(k, 0):g})" for k, v in short.items())
            raise UserError(
                f"the cluster is too small for the plan: it needs {missing}; lower finetune.trainer.num_workers, "
                "actors.count or the CPUs and GPUs of each, or set cluster.wait_s for a cluster that grows"
            )
        if not asked:
            from ray.autoscaler.sdk import request_resources

            request_resources(bundles=[{k: 1} for k, v in needed.items() for _ in range(int(-(-v // 1)))])
            asked = True
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))
