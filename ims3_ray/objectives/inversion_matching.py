"""L_IM (Eq. 5) and the objective of the fine-tuning (Eq. 7, Algorithm 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.objectives.diffusion import diffusion_loss


class ImsLoss(NamedTuple):
    total: Tensor
    """L = L_Diff + λ_IM·L_IM (Eq. 7), a scalar."""
    diffusion: Tensor
    inversion_matching: Tensor


def inversion_matching_loss(z_inv: Tensor, z_t: Tensor) -> Tensor:
    """Eq. 5, ``1 − σ(z_t^inv, z_t)``: cosine over all elements of each sample, mean over the batch."""
    return (1 - F.cosine_similarity(z_inv.float().flatten(1), z_t.float().flatten(1))).mean()


def ims3_loss(
    model: nn.Module, z0: Tensor, y_B: Tensor, y_dropped_B: Tensor, t_B: Tensor, noise: Tensor, schedule: NoiseSchedule,
    *, lambda_im: float, n_steps: int, grad_steps: int,
) -> ImsLoss:  # fmt: skip
    """One step of Algorithm 1 on ``z0`` [B, C, H, W] with labels ``y_B``.

    L_Diff sees ``y_dropped_B`` (labels dropped for guidance); the inversion follows the conditional model, ``y_B``.
    ``z_t`` of Eq. 4 holds no parameter, so L_IM has a gradient through the inversion only.
    """
    channels = z0.shape[1]
    z_t = schedule.add_noise(z0, noise, t_B)
    diffusion = diffusion_loss(model(z_t, t_B, y_dropped_B)[:, :channels], noise)
    if lambda_im == 0:
        return ImsLoss(diffusion, diffusion, torch.zeros_like(diffusion))

    def predict(z: Tensor, time_B: Tensor) -> Tensor:
        return model(z, time_B, y_B)[:, :channels]

    matching = inversion_matching_loss(invert(predict, z0, t_B, schedule, n_steps, grad_steps), z_t)
    return ImsLoss(diffusion + lambda_im * matching, diffusion, matching)
