"""Training with Ray Train: scaling, restart from the last checkpoint, and the result of rank 0."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from pyarrow import fs
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from ims3_ray.cluster.capacity import LOST_S, CapacityWatch
from ims3_ray.cluster.joining import here
from ims3_ray.config import TrainerConfig
from ims3_ray.engine.board import new_board
from ims3_ray.engine.tasks import reason, result_of
from ims3_ray.errors import IncompletePool, Unanimous, UserError
from ims3_ray.io.files import is_remote, open_filesystem
from ims3_ray.training.finetuning import Row

CHECKPOINTS = "checkpoint_manager_snapshot.json"
"""Name of the file in which Ray Train records a training's checkpoints."""


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
    forget_broken_record(filesystem, f"{path}/{name}")
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


def forget_broken_record(filesystem: fs.FileSystem, folder: str) -> None:
    """Delete Ray Train's record of a training's checkpoints if it is damaged or names one that is gone: Ray Train would fail at
    it on every attempt. The training then begins anew."""
    record = f"{folder}/{CHECKPOINTS}"
    if filesystem.get_file_info(record).type != fs.FileType.File:
        return
    try:
        with filesystem.open_input_stream(record) as stream:
            names = [each["checkpoint_dir_name"] for each in json.loads(stream.read())["checkpoint_results"]]
    except (ValueError, KeyError, TypeError):
        names = [""]
    if any(not name or filesystem.get_file_info(f"{folder}/{name}").type == fs.FileType.NotFound for name in names):
        print(f"note: the record of the checkpoints in '{folder}' is damaged; the training begins anew", flush=True)
        filesystem.delete_file(record)


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
    watch: CapacityWatch,
    tell: Callable[[list[Row], bytes | None], None],
) -> dict[str, Any]:
    """As :func:`fit`, on nodes with the labels of ``watch``, which raises :class:`UserError` when they are lost. Meanwhile,
    about every second, ``tell`` is called with the new rows of losses that rank 0 has posted on ``config["board"]``, and with a
    new sheet of samples, if any."""
    board, seen = new_board(), 0
    arguments = loop, {**config, "board": board}, trainer, name, storage, watch.labels
    task = fit_task.options(scheduling_strategy=here()).remote(*arguments)
    while True:
        finished, _ = ray.wait([task], timeout=1.0)
        watch.look(ask=False, patience_s=LOST_S)  # Ray Train asks for the nodes itself
        rows, sheet = ray.get([board.read.remote(0, seen), board.take.remote(0)])
        seen = max([seen, *(int(row["step"]) for row in rows)])
        tell(rows, sheet)
        if finished:
            outcome: dict[str, Any] = result_of(task, f"training '{name}'")
            return outcome


def _answer(loop: Callable[[dict[str, Any]], dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """What ``loop`` returns, or the error that all workers raise: a raised error would make Ray Train try again."""
    try:
        return loop(config)
    except Unanimous as error:
        return {"error": error}


def _failed(name: str, cause: Exception) -> IncompletePool:
    return IncompletePool(f"training '{name}' failed: {reason(cause)}; run the same command again to continue")
