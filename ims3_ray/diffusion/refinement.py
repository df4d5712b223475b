"""Optimisation of chosen latents, the second half of CaO2 (Wang et al. 2025, arXiv 2506.22637): each is moved to where the
generator, given its class, is least surprised by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ims3_ray.diffusion.sampling import Predictor
from ims3_ray.diffusion.schedule import NoiseSchedule


def refinement_loss(eps: Tensor, predicted: Tensor, peak_weight: float) -> Tensor:
    """``mean (ε − ε_θ)² + w·max |ε − ε_θ|`` of each latent [B]."""
    error = (eps - predicted).flatten(1)
    return error.square().mean(dim=1) + peak_weight * error.abs().amax(dim=1)


def refine(
    predict: Predictor, z0: Tensor, schedule: NoiseSchedule, rngs: Sequence[Generator],
    *, steps: int, lr: float, timesteps: tuple[int, int], of: int, peak_weight: float,
) -> Tensor:  # fmt: skip
    """``z0`` [B, C, H, W] after ``steps`` of Adam on :func:`refinement_loss` (the keys of ``refine`` in a config).

    Each latent keeps one draw of noise from its own generator, and draws a timestep for every step: from the first to before
    the second of ``timesteps``, of the process respaced to ``of``.
    """
    noise = torch.stack([torch.randn(z0.shape[1:], generator=rng) for rng in rngs]).to(z0)
    spaced = schedule.respaced(of, "linspace")
    z = z0.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        drawn = torch.stack([torch.randint(*timesteps, (), generator=rng) for rng in rngs])
        t_B = spaced[drawn].to(z.device)
        predicted = predict(schedule.add_noise(z, noise, t_B), t_B)[:, : z.shape[1]]
        # A sum, not a mean: Adam scales every latent's gradient for itself, so a batch is as many runs of one.
        loss = refinement_loss(noise, predicted, peak_weight).sum()
        (z.grad,) = torch.autograd.grad(loss, [z])
        optimizer.step()
    return z.detach()
