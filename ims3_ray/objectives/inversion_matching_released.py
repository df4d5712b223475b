"""L_IM as the authors' released code computes it, which is not what the paper prints (see docs/method.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ims3_ray.diffusion.sampling import Predictor, predict_z0
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample
from ims3_ray.objectives.base import Objective, TrainingStep


@torch.no_grad()
def reverse_step(predict: Predictor, z: Tensor, t_B: Tensor, schedule: NoiseSchedule) -> Tensor:
    """One deterministic step up from t to t + 1 of the full grid; behind the last one ᾱ is 0 and pure noise remains.

    The implied clean latent is clamped to [−1, 1], as the released code leaves it switched on.
    """
    alpha_bar = schedule.on(z.device).alpha_bar
    ahead = torch.cat([alpha_bar[1:], alpha_bar.new_zeros(1)])
    now, following = (per_sample(table[t_B], z) for table in (alpha_bar, ahead))
    z0_hat = predict_z0(z, predict(z, t_B), now).clamp(-1, 1)
    eps = (z - now.sqrt() * z0_hat) / (1 - now).sqrt()
    return following.sqrt() * z0_hat + (1 - following).sqrt() * eps


class InversionMatchingReleased(Objective):
    """One reverse step taken at the *clean* latent, without gradient, is matched with the denoised z_{t−1}.

    z_{t−1} is the mean of q(z_{t−1} | z_t, ẑ_0) for the shared forward pass, through which the gradient flows. The
    similarity is the mean cosine over all B × B pairs of the batch, not over its B matching ones. The model runs as in
    training: some labels are dropped.
    """

    def __init__(self, weight: float) -> None:
        super().__init__(inversion_matching_released=weight)

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        def predict(z: Tensor, t_B: Tensor) -> Tensor:
            return step.model(z, t_B, step.dropped_B)[:, : z.shape[1]].float()

        z_inv = reverse_step(predict, step.z0, step.t_B, step.schedule)
        denoised = step.schedule.posterior_mean(step.z0_hat, step.z_t.float(), step.t_B)
        a, b = (F.normalize(z.float().flatten(1), dim=1) for z in (z_inv, denoised))
        return {"inversion_matching_released": 1 - (a @ b.T).mean()}
