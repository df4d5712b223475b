"""Ancestral sampling: DDPM (Ho et al. 2020, arXiv 2006.11239)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ims3_ray.diffusion.prediction import Predictor, predict_z0
from ims3_ray.diffusion.samplers.base import Draw, Drift, Sampler
from ims3_ray.diffusion.schedule import NoiseSchedule


class Ddpm(Sampler):
    """Ancestral sampling of the process respaced to N of its timesteps (Ho et al. 2020, Alg. 2), as the published baselines do.

    Timesteps run from 0 to the last one, DiT's respacing "N" (for 50: 0, 20, 41 … 979, 999). A predicted variance lies between
    that of the posterior and β of the respaced process, on a logarithmic scale (Nichol & Dhariwal 2021, Eq. 15); without a
    predicted variance the posterior's is used. ``drift`` is added to the noise of a step to guide the samples; sampling starts
    from the timestep of index ``first`` where ``z`` is not pure noise.
    """

    name, spacing = "ddpm", "dit"
    uses_variance = True
    takes = frozenset({"around", "drift"})

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
        drift: Drift | None = None,
        **_: Any,
    ) -> Tensor:
        timesteps = schedule.respaced(num_steps, self.spacing).tolist()
        levels = [1.0, *schedule.alpha_bar[timesteps].tolist()]
        betas = [1 - now / before for before, now in itertools.pairwise(levels)]
        for i in range(num_steps - 1 if first is None else first, -1, -1):
            now, before, beta = levels[i + 1], levels[i], betas[i]
            predicted = predict(z, torch.tensor(timesteps[i : i + 1]))
            eps, values = predicted[:, : z.shape[1]], predicted[:, z.shape[1] :]
            z0 = predict_z0(z, eps, now)
            if clip:
                z0 = z0.clamp(-1, 1)
            z = (before**0.5 * beta * z0 + (1 - beta) ** 0.5 * (1 - before) * z) / (1 - now)
            if i == 0:
                break
            smallest = math.log(beta * (1 - before) / (1 - now))
            if values.shape[1]:
                share = (values + 1) / 2
                sigma: Tensor | float = (0.5 * (share * math.log(beta) + (1 - share) * smallest)).exp()
            else:
                sigma = math.exp(0.5 * smallest)
            push = drift(z0, i / num_steps) if drift is not None else None
            z = z + sigma * (draw() if push is None else draw() + push)
        return z
