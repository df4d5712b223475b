"""Joining or starting a Ray cluster, and placing work on its nodes."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ims3_ray import plugins
from ims3_ray.cluster.addresses import check_address, check_temporary_folder
from ims3_ray.cluster.ray_internals import hide_events, loopback_only, only_fatal_messages
from ims3_ray.cluster.raylet_watch import RayletWatch
from ims3_ray.config import ClusterConfig, Role
from ims3_ray.errors import IncompletePool, UserError

LOCAL_CPUS = 4  # logical CPUs: controllers and actors that only wait take some, beside the two that compute
SCALED = ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 2**28, "MALLOC_TRIM_THRESHOLD_": 2**30, "MALLOC_TOP_PAD_": 2**26}
"""Sizes in bytes for glibc's malloc, which reads them when a process starts. By default every tensor of a few MB is returned to
the kernel when it is freed, and the next one costs a page fault for every 4 kB. With these sizes a process keeps up to 1 GB of
freed memory for its next tensors, except for tensors of more than 256 MB."""
WORKER_ENV = {
    **{name: str(size) for name, size in MALLOC.items()},
    "TOKENIZERS_PARALLELISM": "false",
    "DS_BUILD_OPS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # nodes have to boot
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # seconds until Ray Train sees that its workers have ended
    # Otherwise Ray Data requests nodes of any kind whenever utilisation is high, but only the pool's actors need nodes.
    **{f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{what}_UTIL_THRESHOLD": "1e9" for what in SCALED},
}


PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
EXPECTED = re.compile(
    r"was killed by `ray\.kill`|Raylet is terminated|has been marked dead|worker processes have been started on node"
)
"""Messages of a local Ray that are not shown: that this program has ended one of its own actors; that Ray's raylet has died,
which this program reports in a line of its own; and that there are several times as many processes as cores, which is so
whenever several groups of workers are trained at once (:data:`LOCAL_CPUS`)."""


def own_device() -> str:
    """Device of a Ray task or actor: the GPU that Ray has assigned to it, if any, otherwise the CPU."""
    return "cuda" if ray.get_gpu_ids() else "cpu"


def results(refs: Any) -> Any:
    """``ray.get``, but a :class:`UserError` or :class:`IncompletePool` of a task or actor is raised itself, so that its message
    stays one line."""
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | IncompletePool):
            raise error.cause from error
        raise


def joins(config: ClusterConfig) -> str | None:
    """Address of the cluster that a job joins, from the config or ``RAY_ADDRESS``; None if the job starts its own cluster."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


@contextmanager
def connected(config: ClusterConfig, needed: dict[str, float] | None = None) -> Iterator[None]:
    """Join a Ray cluster or start one, and disconnect at the end. An existing connection of this process is used and kept.

    Raises :class:`UserError` at once if the cluster has less than the ``needed`` resources and does not grow.
    """
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    started, address = not ray.is_initialized(), joins(config)
    unwatched = started and address is None and PREEMPTION not in os.environ
    if not started and not plugins.known_to_workers():
        raise UserError(
            "Ray is running already, and its workers do not know the plugins; let this program start or join Ray, or call "
            "ray.init(runtime_env=ims3_ray.plugins.runtime_env()) after ims3_ray.plugins.load([…])"
        )
    watch = None
    try:
        if unwatched:  # nobody announces that this machine will be taken away, so nothing has to look out for it
            os.environ[PREEMPTION] = "0"
        if started:
            _start(address)
            watch = RayletWatch() if address is None else None
        with watch or nullcontext():
            if not config.wait_s:
                check_resources(needed or {})
            yield
    finally:
        # A driver whose raylet has died may be ended by its own shutdown, so that comes last: Ray does it at the exit.
        if started and not (watch and watch.died):
            ray.shutdown()
        if unwatched:
            os.environ.pop(PREEMPTION, None)


def local_cpus() -> int:
    """Number of logical CPUs of a cluster that a job starts on its own machine."""
    return max(LOCAL_CPUS, os.cpu_count() or 1)


def most_at_once(config: ClusterConfig, cpus: float) -> int | None:
    """Largest number of tasks of ``cpus`` CPUs that are worth running side by side; None where Ray's own count says it.

    A cluster that a job has started on a machine with fewer than :data:`LOCAL_CPUS` cores counts more CPUs than there are
    cores. Each task is a process, which takes seconds of a core to start.
    """
    counted, cores = ray.cluster_resources().get("CPU", 0), os.cpu_count() or 1
    if joins(config) is not None or counted > LOCAL_CPUS or counted <= cores:
        return None
    return max(1, int(cores / cpus))


def _start(address: str | None) -> None:
    """Join the cluster at ``address``, or start one that listens on 127.0.0.1 alone."""
    if address:
        check_address(address)
    else:
        check_temporary_folder()
    # Hides Ray's message that it has created a token for a new cluster, which needs no action by the user.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # The dashboard serves Ray Train's state queries. Without it they go to any process that listens on the default port,
    # and the answer of another cluster on the machine ("no such controller") makes Ray Train remove its own workers.
    local = {} if address else {"num_cpus": local_cpus(), "include_dashboard": True}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    listening: AbstractContextManager[dict[str, Any]] = nullcontext({}) if address else loopback_only()
    with listening as more, only_fatal_messages():
        try:
            context = ray.init(
                address=address or "local",  # not another cluster that was started on this machine
                logging_level=logging.WARNING,
                log_to_driver=os.environ.get("IMS3_WORKER_LOGS") == "1",
                # Processes of a local Ray inherit this one's environment. As a runtime environment, the same variables would
                # make it start new processes in place of those that it holds ready.
                runtime_env=_runtime_env() if address else plugins.runtime_env(),
                **local,
                **more,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            where = f"the Ray cluster at '{address}' cannot be joined" if address else "Ray does not start on this machine"
            raise UserError(f"{where} ({reason[:500]}); check cluster.address, RAY_ADDRESS and RAY_TMPDIR") from error
    if context.dashboard_url:
        print(f"Ray's dashboard: http://{context.dashboard_url}", flush=True)
    if not address:
        hide_events(EXPECTED)
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place, which aborts the process


def _runtime_env() -> dict[str, Any]:
    """Ray's runtime environment for every process of a job that joins a cluster."""
    mine = plugins.runtime_env()
    return {**mine, "env_vars": {**{name: os.environ[name] for name in WORKER_ENV}, **mine.get("env_vars", {})}}


def shortage(needed: Mapping[str, float], have: Mapping[str, float]) -> str:
    """The resources of which there are fewer than ``needed``, as text; empty if there are enough."""
    short = {kind: value for kind, value in needed.items() if value > have.get(kind, 0)}
    return ", ".join(f"{value:g} {kind} (has {have.get(kind, 0):g})" for kind, value in short.items())


def check_resources(needed: dict[str, float]) -> None:
    """Raises :class:`UserError` if the cluster, at its current size, lacks the resources ``needed`` by the plan's largest
    stage."""
    if missing := shortage(needed, ray.cluster_resources()):
        raise UserError(
            f"the cluster is too small for the plan: it needs {missing}; lower finetune.trainer.num_workers, "
            "actors.count or the CPUs and GPUs of each, or set cluster.wait_s for a cluster that grows"
        )


def placed(config: ClusterConfig, role: Role) -> dict[str, Any]:
    """Ray options that place work of this ``role`` on the nodes that the config names for it."""
    return {"label_selector": config.place[role]} if config.place.get(role) else {}


def here() -> NodeAffinitySchedulingStrategy:
    """Scheduling strategy for helper actors of the driver, which need no CPU: on the driver's node, so that they keep no other
    node alive and fail only together with the driver."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
