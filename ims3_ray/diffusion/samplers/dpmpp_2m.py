"""Second-order sampling: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ims3_ray.diffusion.prediction import Predictor, predict_z0
from ims3_ray.diffusion.samplers.base import Draw, Sampler
from ims3_ray.diffusion.schedule import NoiseSchedule


class DpmPp2m(Sampler):
    """Algorithm 2 of the paper: second order in λ = log(√ᾱ / √(1−ᾱ)), one call of the predictor per step.

    Timesteps are evenly spaced over (0, 999], as with diffusers' "linspace"; the first and the last step are of first order.
    """

    name = "dpm++2m"

    def __call__(
        self, predict: Predictor, z: Tensor, draw: Draw, schedule: NoiseSchedule, num_steps: int, clip: bool, **_: Any
    ) -> Tensor:
        timesteps = schedule.respaced(num_steps + 1, "linspace").tolist()[1:]
        levels = [1.0, *schedule.alpha_bar[timesteps].tolist()]
        log_snr = [math.inf, *(0.5 * math.log(level / (1 - level)) for level in levels[1:])]
        before: Tensor | None = None
        for i in range(num_steps, 0, -1):
            eps = predict(z, torch.tensor(timesteps[i - 1 : i]))[:, : z.shape[1]]
            z0 = predict_z0(z, eps, levels[i])
            if clip:
                z0 = z0.clamp(-1, 1)
            step = log_snr[i - 1] - log_snr[i]
            slope = z0
            if before is not None and i > 1:
                ratio = (log_snr[i] - log_snr[i + 1]) / step
                slope = z0 + (z0 - before) / (2 * ratio)
            sigmas = ((1 - levels[i - 1]) / (1 - levels[i])) ** 0.5
            z = sigmas * z - levels[i - 1] ** 0.5 * math.expm1(-step) * slope
            before = z0
        return z
