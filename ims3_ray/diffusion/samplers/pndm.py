"""Sampling by a linear multistep method: PNDM (Liu et al. 2022, arXiv 2202.09778), Stable Diffusion's default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.samplers.base import Draw, Sampler
from ims3_ray.diffusion.samplers.ddim import ddim_step
from ims3_ray.diffusion.schedule import NoiseSchedule

WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the last one to four predictions, the latest first (Adams-Bashforth)."""


class Pndm(Sampler):
    """Steps of DDIM with a combination of the last four predictions (Eq. 12 of Liu et al.), on the timesteps of "ddimN".

    The first step is made twice, the second time with the mean of the predictions at its two ends, as diffusers does instead
    of the Runge-Kutta steps of Liu et al.; two or more steps call the predictor once more than there are steps. Sampling
    starts from the timestep of index ``first`` where ``z`` is not pure noise.
    """

    name, spacing, more_calls = "pndm", "leading", 1
    takes = frozenset({"first", "around"})

    @classmethod
    def first_of(cls, num_steps: int, strength: float) -> int:
        """diffusers counts the step that is made twice as two steps, so sampling begins one timestep earlier."""
        return min(num_steps - 1, int(num_steps * strength))

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

        def predicted(z: Tensor, i: int) -> Tensor:
            return predict(z, torch.tensor(timesteps[i : i + 1]))[:, : z.shape[1]]

        last: list[Tensor] = []
        for i in range(num_steps - 1 if first is None else first, -1, -1):
            last = [predicted(z, i), *last[:3]]
            eps = sum((weight * each for weight, each in zip(WEIGHTS[len(last) - 1], last, strict=True)), torch.zeros_like(z))
            if len(last) == 1 and i > 0:
                ahead = ddim_step(z, eps, levels[i + 1], levels[i], clip=clip)
                eps = (eps + predicted(ahead, i - 1)) / 2
            z = ddim_step(z, eps, levels[i + 1], levels[i], clip=clip)
        return z
