"""Training with Ray Train: scaling, restart from the last checkpoint, and the result of rank 0."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from ims3_ray.cluster.joining import here, results
from ims3_ray.config import TrainerConfig
from ims3_ray.engine.board import new_board
from ims3_ray.errors import IncompletePool, Unanimous, UserError
from ims3_ray.io.files import is_remote, open_filesystem
from ims3_ray.training.finetuning import Row


def fit(
    loop: Callable[[dict[str, Any]], dict[str, Any]],
    config: dict[str, Any],
    trainer: TrainerConfig,
    name: str,
    storage: str,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run ``loop`` on every worker, on nodes with these ``labels``, and return what rank 0 returns.

    A run of the same ``name`` and ``storage`` continues from its last checkpoint. An error that a worker raises for the user
    is raised here; any other failure that remains after ``trainer.max_failures`` is an :class:`IncompletePool` of one line.
    """
    filesystem, path = open_filesystem(storage)  # retries failed requests, unlike one that Ray would open
    training = TorchTrainer(
        partial(_answer, loop),
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=(trainer.num_workers, trainer.max_workers) if trainer.max_workers else trainer.num_workers,
            use_gpu=trainer.gpus_per_worker > 0,
            resources_per_worker=trainer.worker_resources,
            label_selector=dict(labels) if labels else None,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem if is_remote(storage) else None,
            failure_config=FailureConfig(max_failures=trainer.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        outcome: dict[str, Any] = training.fit().return_value
    except WorkerGroupError as error:
        causes = [getattr(cause, "cause", None) or cause for cause in error.worker_failures.values()]
        for cause in causes:
            if isinstance(cause, UserError | IncompletePool):
                raise cause from error
        raise _failed(name, causes[0] if causes else error) from error
    except ControllerError as error:
        raise _failed(name, error.controller_failure) from error
    if isinstance(found := outcome.get("error"), UserError):
        raise found
    return outcome


@ray.remote(num_cpus=0)
def fit_task(*arguments: Any) -> dict[str, Any]:
    """:func:`fit` as a task, which leaves the driver free to show progress and to be interrupted."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        return fit(*arguments)
    finally:
        signal.signal(signal.SIGINT, on_interrupt)  # Ray Train's own handler would keep three of its processes alive
        gc.collect()


def watched_fit(
    loop: Callable[[dict[str, Any]], dict[str, Any]],
    config: dict[str, Any],
    trainer: TrainerConfig,
    name: str,
    storage: str,
    labels: Mapping[str, str] | None,
    tell: Callable[[list[Row], bytes | None], None],
) -> dict[str, Any]:
    """As :func:`fit`. Meanwhile, about every second, ``tell`` is called with the new rows of losses that rank 0 has posted on
    ``config["board"]``, and with a new sheet of samples, if any."""
    board, seen = new_board(), 0
    task = fit_task.options(scheduling_strategy=here()).remote(loop, {**config, "board": board}, trainer, name, storage, labels)
    while True:
        finished, _ = ray.wait([task], timeout=1.0)
        rows, sheet = ray.get([board.read.remote(0, seen), board.take.remote(0)])
        seen = max([seen, *(int(row["step"]) for row in rows)])
        tell(rows, sheet)
        if finished:
            outcome: dict[str, Any] = results(task)
            return outcome


def _answer(loop: Callable[[dict[str, Any]], dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """What ``loop`` returns, or the error that all workers raise: a raised error would make Ray Train try again."""
    try:
        return loop(config)
    except Unanimous as error:
        return {"error": error}


def _failed(name: str, cause: Exception) -> IncompletePool:
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
    return IncompletePool(f"training '{name}' failed: {type(cause).__name__}: {reason}; run the same command again to continue")
