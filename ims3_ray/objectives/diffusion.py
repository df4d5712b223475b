"""L_Diff (Eq. 6), the variational bound for a learned variance, and dropping of conditions for classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from ims3_ray.component import Section
from ims3_ray.diffusion.prediction import Parametrisation
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample
from ims3_ray.objectives.base import Objective, TrainingStep

HALF_BIN = 1 / 255
"""Half the distance between two neighbouring 8-bit values in [−1, 1]."""


def diffusion_loss(predicted: Tensor, target: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Eq. 6, ``‖ε_θ(z_t, c) − ε‖²``, as the mean over all elements (the reduction DiT and its descendants use).

    For a model that predicts v, ``predicted`` and ``target`` are velocities. ``weight_B`` [B] multiplies the error of each
    sample.
    """
    error = (predicted.float() - target.float()).square()
    return (error if weight_B is None else error * per_sample(weight_B, error)).mean()


def min_snr_weight(t_B: Tensor, schedule: NoiseSchedule, gamma: float, parametrisation: Parametrisation) -> Tensor:
    """The weight [B] of min-SNR-γ (Hang et al. 2023, arXiv 2303.09556): the error of the clean image is weighted by
    min(SNR, γ) with SNR = ᾱ/(1−ᾱ), which is min(SNR, γ)/SNR for the error of ε and min(SNR, γ)/(SNR + 1) for that of v."""
    alpha_bar = schedule.on(t_B.device).alpha_bar[t_B]
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if parametrisation == "epsilon" else snr + 1)


def variational_bound(step: TrainingStep) -> Tensor:
    """The term that trains a learned variance (Nichol & Dhariwal 2021, Eq. 4 and 15), in bits per dimension.

    KL(q(z_{t−1} | z_t, z_0) ‖ p(z_{t−1} | z_t)) with the model's p; at t = 0 the negative log-likelihood of z_0 in 8-bit bins.
    The predicted mean is detached, so that this term trains the variance only. The model interpolates the log-variance
    between β̃_t (output −1) and β_t (output 1).
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
    """Log of the mass of a Gaussian in the 8-bit bin around ``x`` ∈ [−1, 1]; the first and last bin extend to ∓∞."""
    std = (0.5 * log_variance).exp()
    above = torch.where(x > 0.999, 1.0, torch.special.ndtr((x + HALF_BIN - mean) / std))
    below = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - HALF_BIN - mean) / std))
    return (above - below).clamp(min=1e-12).log()


class Diffusion(Objective):
    """L_Diff and, with ``variance``, the variational bound that trains a learned variance, as in DiT's release."""

    name = "diffusion"
    term_titles: ClassVar[Mapping[str, str]] = {"diffusion": "L_Diff", "variance": "variational bound"}

    class Config(Section):
        """L_Diff (Eq. 6)."""

        weight: float = Field(default=1.0, ge=0)
        """Weight of L_Diff, and of the variational bound if it is added."""
        variance: bool = False
        """Whether to add the variational bound that trains a learned variance (generators with `learn_sigma`, such as DiT)."""

    @classmethod
    def terms(cls, config: Config) -> Mapping[str, float]:
        return {"diffusion": config.weight, **({"variance": config.weight} if config.variance else {})}

    @classmethod
    def needs_variance(cls, config: Config) -> bool:
        return config.variance

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        terms = {"diffusion": diffusion_loss(step.predicted, step.target)}
        if "variance" in self.weights:
            terms["variance"] = variational_bound(step)
        return terms


def drop_conditions(y_B: Tensor, null: Tensor | int, probability: float, generator: Generator | None = None) -> Tensor:
    """The conditions [B, …], each replaced as a whole by ``null`` with the given probability."""
    drop = torch.rand(len(y_B), generator=generator, device=y_B.device) < probability
    return torch.where(drop.reshape(-1, *[1] * (y_B.dim() - 1)), torch.as_tensor(null, dtype=y_B.dtype, device=y_B.device), y_B)
