"""Guided sampling from a noise predictor (Eq. 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from ims3_ray.diffusion.schedule import NoiseSchedule

Predictor = Callable[[Tensor, Tensor], Tensor]
"""ε(z [B, C, H, W], t [B]) → predicted noise [B, C, H, W]."""


def guided(model: nn.Module, y_B: Tensor, null_label: int, cfg_scale: float, cfg_channels: int | None = None) -> Predictor:
    """Classifier-free guidance: ``ε = ε_u + s·(ε_c − ε_u)`` on the first ``cfg_channels`` channels (all when None).

    The DiT release guides 3 of its 4 latent channels and leaves the rest conditional; published baselines follow it.
    Both halves run as one batch of 2B. A scale of 1 runs the conditional half alone.
    """
    null_B = torch.full_like(y_B, null_label)

    def predict(z: Tensor, t_B: Tensor) -> Tensor:
        channels = z.shape[1]
        if cfg_scale == 1:
            return model(z, t_B, y_B)[:, :channels]
        both = model(torch.cat([z, z]), torch.cat([t_B, t_B]), torch.cat([y_B, null_B]))[:, :channels]
        conditional, unconditional = both.chunk(2)
        eps = unconditional + cfg_scale * (conditional - unconditional)
        if cfg_channels is not None and cfg_channels < channels:
            eps = torch.cat([eps[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)
        return eps

    return predict


def predict_z0(z_t: Tensor, eps: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Eq. 2: the clean latent implied by ``z_t`` and the predicted noise."""
    return (z_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()


def ddim_step(
    z_t: Tensor, eps: Tensor, alpha_bar_t: Tensor, alpha_bar_next: Tensor, *, eta: float = 0.0, clip: bool = False,
    noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Eq. 1, from noise level ``alpha_bar_t`` to ``alpha_bar_next``.

    ``eta`` adds that share of DDPM's posterior noise (``noise`` [shape of z_t] is needed then); ``clip`` clamps the
    predicted clean image to [−1, 1], for generators that work on pixels. The noise is then derived again from the
    clamped image, as DiT's own sampler does: with the old one the step would leave the line between the two, and the
    error of early steps, where 1/√ᾱ is large, would pile up (the more steps, the worse the images).
    """
    z0 = predict_z0(z_t, eps, alpha_bar_t)
    if clip:
        z0 = z0.clamp(-1, 1)
        eps = (z_t - alpha_bar_t.sqrt() * z0) / (1 - alpha_bar_t).sqrt()
    variance = (1 - alpha_bar_next) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_next)
    std = eta * variance.clamp(min=0).sqrt()
    z_next = alpha_bar_next.sqrt() * z0 + (1 - alpha_bar_next - std**2).clamp(min=0).sqrt() * eps
    if eta > 0:
        if noise is None:
            raise ValueError("eta > 0 needs noise")
        z_next = z_next + std * noise
    return z_next


@torch.inference_mode()
def sample(
    predict: Predictor,
    shape: Sequence[int],
    generators: Sequence[Generator],
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    clip: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw ``len(generators)`` samples of ``shape`` [C, H, W]; sample b uses noise of ``generators[b]`` alone.

    Runs ``num_steps`` evenly spaced timesteps down to zero and ends on the clean latent (ᾱ = 1). Returns float32.
    """

    def draw() -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)

    z = draw()
    timesteps = schedule.respaced(num_steps).tolist()
    one = torch.ones((), dtype=torch.float64)
    for i in range(num_steps - 1, -1, -1):
        t_B = torch.full((len(generators),), timesteps[i], device=device)
        following = schedule.alpha_bar[timesteps[i - 1]] if i > 0 else one
        noise = draw() if eta > 0 and i > 0 else None
        z = ddim_step(
            z, predict(z, t_B), schedule.alpha_bar[timesteps[i]], following, eta=eta if i > 0 else 0.0, clip=clip, noise=noise
        )
    return z.float()
