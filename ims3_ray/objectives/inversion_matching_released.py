"""L_IM as the authors' released code computes it, which differs from what the paper prints (see docs/method.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ims3_ray.component import Section
from ims3_ray.diffusion.prediction import Predictor, predict_z0
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample
from ims3_ray.objectives.base import Objective, TrainingStep


@torch.no_grad()
def reverse_step(predict: Predictor, z: Tensor, t_B: Tensor, schedule: NoiseSchedule) -> Tensor:
    """One deterministic step from t to t + 1 on the full grid of timesteps; after the last one ᾱ is 0: pure noise.

    The implied clean latent is clamped to [−1, 1], since the released code leaves clamping switched on.
    """
    alpha_bar = schedule.on(z.device).alpha_bar
    ahead = torch.cat([alpha_bar[1:], alpha_bar.new_zeros(1)])
    now, following = (per_sample(table[t_B], z) for table in (alpha_bar, ahead))
    z0_hat = predict_z0(z, predict(z, t_B), now).clamp(-1, 1)
    eps = (z - now.sqrt() * z0_hat) / (1 - now).sqrt()
    return following.sqrt() * z0_hat + (1 - following).sqrt() * eps


class InversionMatchingReleased(Objective):
    """Matches one reverse step, taken at the *clean* latent without gradient, with the denoised z_{t−1}.

    z_{t−1} is the mean of q(z_{t−1} | z_t, ẑ_0) with ẑ_0 from the shared forward pass, through which the gradient flows. The
    similarity is the mean cosine over all B × B pairs of the batch, not over its B matching pairs. As in training, some
    conditions are replaced by the null condition.
    """

    name = "inversion_matching_released"
    couples_samples = True
    term_titles: ClassVar[Mapping[str, str]] = {"inversion_matching_released": "L_IM (released reading)"}

    class Config(Section):
        """L_IM as the authors' released code computes it; see docs/method.md."""

        weight: float = Field(default=0.0, ge=0)
        """Weight λ_IM; the paper's value is 0.002."""

    @classmethod
    def terms(cls, config: Config) -> Mapping[str, float]:
        return {"inversion_matching_released": config.weight}

    @classmethod
    def title(cls, config: Config) -> str:
        return "IM as released"

    @classmethod
    def passes(cls, config: Config) -> tuple[int, int]:
        return 1, 0

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        def predict(z: Tensor, t_B: Tensor) -> Tensor:
            return step.epsilon(step.model(z, t_B, step.dropped_B).float(), z, t_B)

        z_inv = reverse_step(predict, step.z0, step.t_B, step.schedule)
        denoised = step.schedule.posterior_mean(step.z0_hat, step.z_t.float(), step.t_B)
        a, b = (F.normalize(z.float().flatten(1), dim=1) for z in (z_inv, denoised))
        return {"inversion_matching_released": 1 - (a @ b.T).mean()}
