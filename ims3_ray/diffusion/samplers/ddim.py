"""Deterministic sampling: DDIM (Eq. 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ims3_ray.diffusion.prediction import Predictor, predict_z0
from ims3_ray.diffusion.samplers.base import Draw, Sampler
from ims3_ray.diffusion.schedule import NoiseSchedule


def ddim_step(
    z_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float, alpha_bar_next: Tensor | float, *, clip: bool = False
) -> Tensor:  # fmt: skip
    """Eq. 1, from noise level ``alpha_bar_t`` to ``alpha_bar_next``.

    ``clip`` clamps the predicted clean image to [−1, 1], for generators that work on pixels. The noise is then derived again
    from the clamped image, as DiT's own sampler does: the predicted noise would no longer be consistent with the clamped
    image, and the error of early steps, where 1/√ᾱ is large, would accumulate (the more steps, the worse the images).
    """
    z0 = predict_z0(z_t, eps, alpha_bar_t)
    if clip:
        z0 = z0.clamp(-1, 1)
        eps = (z_t - alpha_bar_t**0.5 * z0) / (1 - alpha_bar_t) ** 0.5
    return alpha_bar_next**0.5 * z0 + (1 - alpha_bar_next) ** 0.5 * eps


class Ddim(Sampler):
    """Deterministic (η = 0), on DiT's "ddimN" timesteps 0, 1000/N, 2000/N … (Stable Diffusion's are larger by 1); starts from
    the timestep of index ``first`` where ``z`` is not pure noise."""

    name, spacing = "ddim", "leading"
    takes = frozenset({"first", "around"})

    def __call__(
        self,
        predict: Predictor,
        z: Tensor,
        draw: Draw,
        schedule: NoiseSchedule,
        num_steps: int,
        clip: bool,
        *,
        first: int | None = None,
        **_: Any,
    ) -> Tensor:
        timesteps = schedule.respaced(num_steps, self.spacing).tolist()
        levels = [schedule.last_alpha_bar, *schedule.alpha_bar[timesteps].tolist()]
        for i in range(num_steps - 1 if first is None else first, -1, -1):
            eps = predict(z, torch.tensor(timesteps[i : i + 1]))[:, : z.shape[1]]
            z = ddim_step(z, eps, levels[i + 1], levels[i], clip=clip)
        return z
