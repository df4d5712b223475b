"""The predictions of a generator: noise, guided by a condition, and the clean latent that this noise implies (Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample

Predictor = Callable[[Tensor, Tensor], Tensor]
"""ε(z [B, C, H, W], t [B], or [1] for all samples) → predicted noise [B, C, H, W]; or [B, 2C, H, W], where the values of a
learned variance follow the noise."""

Parametrisation = Literal["epsilon", "v"]
"""What a network predicts: the noise ε, or the velocity v = √ᾱ·ε − √(1−ᾱ)·z_0 (Salimans & Ho 2022, arXiv 2202.00512)."""

LAST_TIMESTEP = 999


def guided(
    model: Callable[..., Tensor], y_B: Tensor, null: Tensor | int, cfg_scale: float, cfg_channels: int | None = None,
    *, cfg_interval: tuple[float, float] = (0.0, 1.0), variance: bool = False, schedule: NoiseSchedule | None = None,
    parametrisation: Parametrisation = "epsilon",
) -> Predictor:  # fmt: skip
    """Classifier-free guidance: ``ε = ε_u + s·(ε_c − ε_u)`` on the first ``cfg_channels`` channels (all when None).

    The DiT release guides 3 of its 4 latent channels and leaves the rest conditional; published baselines follow it. The
    conditional and the unconditional half run as one batch of 2B. Only the conditional half runs if the scale is 1 or if
    t / 999 lies outside ``cfg_interval`` (Kynkäänniemi et al. 2024, arXiv 2404.07724). ``y_B`` may be one condition [1, …]
    for all samples, which the model then embeds once; ``null`` is the null condition. ``variance`` also returns the
    variance values of the conditional half. A ``model`` that predicts v needs its ``schedule``.
    """
    null_B = torch.as_tensor(null, dtype=y_B.dtype, device=y_B.device).expand_as(y_B)
    low, high = cfg_interval
    model = model if parametrisation == "epsilon" else _as_epsilon(model, schedule or NoiseSchedule())

    def predict(z: Tensor, t_B: Tensor) -> Tensor:
        channels = z.shape[1]
        t_B = t_B.expand(len(y_B))
        if cfg_scale == 1 or (cfg_interval != (0.0, 1.0) and not low <= t_B[0].item() / LAST_TIMESTEP <= high):
            conditional = model(z, t_B, y_B).to(z.dtype)
            return conditional if variance else conditional[:, :channels]
        both = model(torch.cat([z, z]), torch.cat([t_B, t_B]), torch.cat([y_B, null_B])).to(z.dtype)
        conditional, unconditional = both.chunk(2)
        guide = channels if cfg_channels is None else min(cfg_channels, channels)
        eps = unconditional[:, :guide] + cfg_scale * (conditional[:, :guide] - unconditional[:, :guide])
        return torch.cat([eps, conditional[:, guide : None if variance else channels]], dim=1)

    return predict


def predict_z0(z_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float) -> Tensor:
    """Eq. 2: the clean latent implied by ``z_t`` and the predicted noise."""
    return (z_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5


def epsilon_of(
    predicted: Tensor, z_t: Tensor, t_B: Tensor, schedule: NoiseSchedule, parametrisation: Parametrisation
) -> Tensor:
    """The noise [B, C, H, W] that a network's ``predicted`` [B, C, H, W] implies."""
    if parametrisation == "epsilon":
        return predicted
    alpha_bar = per_sample(schedule.on(z_t.device).alpha_bar[t_B.to(z_t.device)], predicted)
    return alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * z_t.to(predicted)


def target_of(z0: Tensor, noise: Tensor, t_B: Tensor, schedule: NoiseSchedule, parametrisation: Parametrisation) -> Tensor:
    """The training target [B, C, H, W] of a network for ``z0`` noised with ``noise`` (Eq. 4)."""
    if parametrisation == "epsilon":
        return noise
    alpha_bar = per_sample(schedule.on(z0.device).alpha_bar[t_B], z0)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z0


def _as_epsilon(model: Callable[..., Tensor], schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Wraps a model that predicts v as one that predicts ε; its variance channels, if any, stay unchanged."""

    def predict(z: Tensor, t_P: Tensor, condition: Tensor) -> Tensor:
        output, channels = model(z, t_P, condition).to(z.dtype), z.shape[1]  # bfloat16 is too coarse for √ᾱ near 0
        t_B = t_P.repeat_interleave(len(z) // len(t_P))
        return torch.cat([epsilon_of(output[:, :channels], z, t_B, schedule, "v"), output[:, channels:]], dim=1)

    return predict
