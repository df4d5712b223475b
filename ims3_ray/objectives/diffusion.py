"""L_Diff (Eq. 6), with the bound that trains a learned variance, and the label dropping of classifier-free guidance."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ims3_ray.diffusion.schedule import per_sample
from ims3_ray.objectives.base import Objective, TrainingStep

HALF_BIN = 1 / 255
"""Half the distance of two neighbouring 8-bit values in [−1, 1]."""


def diffusion_loss(predicted_noise: Tensor, noise: Tensor) -> Tensor:
    """Eq. 6, ``‖ε_θ(z_t, c) − ε‖²``, as the mean over all elements (the reduction DiT and its descendants use)."""
    return (predicted_noise.float() - noise.float()).square().mean()


def variational_bound(step: TrainingStep) -> Tensor:
    """The term that trains a learned variance (Nichol & Dhariwal 2021, Eq. 4 and 15), in bits per dimension.

    KL of the model's p(z_{t−1} | z_t) from q(z_{t−1} | z_t, z_0); at t = 0 the negative log-likelihood of z_0 in bins of
    8 bits. The predicted mean is detached: only the variance learns from it. The model interpolates log-variance between
    β̃_t (output −1) and β_t (output 1).
    """
    schedule = step.schedule.on(step.z0.device)
    channels = step.z0.shape[1]
    if step.output.shape[1] != 2 * channels:
        raise ValueError("the variance term needs a model that predicts a variance (learn_sigma)")
    z0, z_t = step.z0.float(), step.z_t.float()
    smallest = per_sample(schedule.posterior_log_variance[step.t_B], z0)
    largest = per_sample(schedule.beta.log()[step.t_B], z0)
    share = (step.output[:, channels:].float() + 1) / 2
    log_variance = share * largest + (1 - share) * smallest
    mean = schedule.posterior_mean(step.z0_hat.detach(), z_t, step.t_B)
    true_mean = schedule.posterior_mean(z0, z_t, step.t_B)
    kl = 0.5 * (
        log_variance - smallest - 1 + (smallest - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = _bin_log_likelihood(z0, mean, log_variance)
    per_element = torch.where(per_sample(step.t_B, z0) == 0, -likelihood, kl)
    return per_element.mean() / math.log(2)


def _bin_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of a Gaussian's mass in the 8-bit bin around ``x`` ∈ [−1, 1]; the first and last bin reach to infinity."""
    std = (0.5 * log_variance).exp()
    above = torch.where(x > 0.999, 1.0, torch.special.ndtr((x + HALF_BIN - mean) / std))
    below = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - HALF_BIN - mean) / std))
    return (above - below).clamp(min=1e-12).log()


class Diffusion(Objective):
    """L_Diff; with ``variance`` the bound that keeps a learned variance trained, as DiT's release adds it."""

    def __init__(self, weight: float = 1.0, variance: bool = False) -> None:
        super().__init__(diffusion=weight, **({"variance": weight} if variance else {}))

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        terms = {"diffusion": diffusion_loss(step.eps, step.noise)}
        if "variance" in self.weights:
            terms["variance"] = variational_bound(step)
        return terms


def drop_labels(y_B: Tensor, null_label: int, probability: float, generator: Generator | None = None) -> Tensor:
    """Each label replaced by ``null_label`` with the given probability: one decision per sample."""
    drop = torch.rand(y_B.shape, generator=generator, device=y_B.device) < probability
    return torch.where(drop, null_label, y_B)
