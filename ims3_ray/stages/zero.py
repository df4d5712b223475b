"""DeepSpeed ZeRO as the engine of fine-tuning: it divides optimizer state, gradients and parameters among the workers."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ims3_ray import compat
from ims3_ray.config import FinetuneConfig
from ims3_ray.training.finetuning import Trained, gradient_norm

TAG = "engine"
BUCKET = 500_000_000
"""Number of gradient values that DeepSpeed reduces at a time by default."""


def deepspeed_config(config: FinetuneConfig, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``trained`` trainable values.

    DeepSpeed allocates its buckets whole, and one of its default size would take 2 GB for an adapter of 7 MB.
    """
    zero = {"stage": config.zero_stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": min(trained, BUCKET)}
    return {
        # DeepSpeed requires this number but does not use it: pieces may differ in size, and each loss is weighted accordingly.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulate,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's AdamW; DeepSpeed's would have to be compiled
        "steps_per_print": 10**9,
    }


class ZeroEngine:
    """An :class:`~ims3_ray.training.finetuning.Engine` for any number of workers, joined by torch.distributed."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, trained: Trained, config: FinetuneConfig, world: int
    ) -> None:
        if next(model.parameters()).device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        compat.prepare_deepspeed()
        import deepspeed

        self.trained, self.stage, self.zero = trained, config.zero_stage, deepspeed.zero
        self.scale = config.accumulate * world
        count = sum(p.numel() for _, p in trained)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, count))
        self.module: nn.Module = self.engine

    def backward(self, loss: Tensor, share: float) -> None:
        # DeepSpeed averages over pieces and workers; this factor turns its result into the mean over images.
        self.engine.backward(loss * (share * self.scale))

    def step(self) -> Tensor | float | None:
        # DeepSpeed reports the norm under ZeRO 1 to 3 only. The norm computed here is valid after the last piece of a batch.
        norm = gradient_norm(self.trained) if self.stage == 0 else None
        self.engine.step()
        return self.engine.get_global_grad_norm() if norm is None else norm

    def gathered(self) -> AbstractContextManager[Any]:
        return self.zero.GatheredParameters([p for _, p in self.trained], enabled=self.stage == 3)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote. The number of workers may have changed since then under ZeRO 0 only."""
        self.engine.checkpoint_engine.load = compat.load_deepspeed_file
        self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
