"""Ends a training whose losses are no longer finite, on all of its workers at the same step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ims3_ray.errors import Diverged


def check_losses(losses: Sequence[float], first_step: int, setting: str, device: torch.device | str = "cpu") -> None:
    """Raises :class:`Diverged` naming the first step whose loss is not finite; ``first_step`` is the step of the first loss,
    counted from 1, and ``setting`` the config key of the learning rate.

    All workers of a training call it together, and all of them raise if one does: the others would wait for it for ever.
    """
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        first = torch.tensor([bad], device=device)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        bad = int(first.item())
    if bad < len(losses):
        raise Diverged(f"training diverged: the loss of step {first_step + bad} is not finite; lower {setting}")
