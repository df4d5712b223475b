"""Ray Train, as both trainings use it: scaling, restart from the last checkpoint, the result of rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ims3_ray.config import TrainerConfig


def fit(
    loop: Callable[[dict[str, Any]], dict[str, Any]], config: dict[str, Any], trainer: TrainerConfig, name: str, storage: str
) -> dict[str, Any]:
    """Run ``loop`` on every worker and return what rank 0 returns.

    A run of the same ``name`` and ``storage`` continues from its last checkpoint.
    """
    result = TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=(trainer.num_workers, trainer.max_workers) if trainer.max_workers else trainer.num_workers,
            use_gpu=trainer.gpus_per_worker > 0,
            resources_per_worker=trainer.worker_resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=trainer.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    outcome: dict[str, Any] = result.return_value
    return outcome
