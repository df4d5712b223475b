"""Deterministic DDIM inversion (Eq. 3)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample


def invert(predict: Predictor, z0: Tensor, t_B: Tensor, schedule: NoiseSchedule, n_steps: int, grad_steps: int) -> Tensor:
    """``z_t^inv``: the clean latents ``z0`` [B, …] inverted by the model to each sample's own timestep ``t_B``.

    Eq. 3 as an Euler step in σ-space: with x̄ = z/√ᾱ and σ = √((1−ᾱ)/ᾱ), ``x̄ ← x̄ + (σ_i − σ_{i−1})·ε_θ(z_{i−1}, t_{i−1})``
    over ``n_steps`` steps evenly spaced in t, from the clean latent (σ = 0) to t. Only the last ``grad_steps`` carry a
    gradient: the running time in the paper's Table 9 is short enough for one or two such steps only.
    """
    if not 0 <= grad_steps <= n_steps or n_steps < 1:
        raise ValueError(f"need 0 <= grad_steps <= n_steps and n_steps >= 1, not {grad_steps} and {n_steps}")
    sigma = schedule.on(z0.device).sigma
    x_bar, sigma_B, time_B = z0, torch.zeros_like(t_B, dtype=sigma.dtype), torch.zeros_like(t_B)
    for step in range(1, n_steps + 1):
        next_B = t_B * step // n_steps
        next_sigma_B = sigma[next_B]
        with nullcontext() if step > n_steps - grad_steps else torch.no_grad():
            eps = predict(x_bar * per_sample(_signal(sigma_B), z0), time_B)
            x_bar = x_bar + per_sample(next_sigma_B - sigma_B, z0) * eps
        sigma_B, time_B = next_sigma_B, next_B
    return x_bar * per_sample(_signal(sigma_B), z0)


def _signal(sigma: Tensor) -> Tensor:
    """√ᾱ as a function of σ."""
    return (1 + sigma**2).rsqrt()
