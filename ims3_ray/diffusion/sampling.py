"""Guided sampling from a noise predictor: DDPM's ancestral steps, DDIM (Eq. 1 and 2), DPM-Solver++(2M)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ims3_ray.diffusion.schedule import NoiseSchedule

Predictor = Callable[[Tensor, Tensor], Tensor]
"""ε(z [B, C, H, W], t [B] or [1] for all) → predicted noise [B, C, H, W]; or [B, 2C, H, W], the values of a learned variance
after it."""

LAST_TIMESTEP = 999

SamplerName = Literal["ddpm", "ddim", "dpm++2m"]


def guided(
    model: nn.Module, y_B: Tensor, null_label: int, cfg_scale: float, cfg_channels: int | None = None,
    *, cfg_interval: tuple[float, float] = (0.0, 1.0), variance: bool = False,
) -> Predictor:  # fmt: skip
    """Classifier-free guidance: ``ε = ε_u + s·(ε_c − ε_u)`` on the first ``cfg_channels`` channels (all when None).

    The DiT release guides 3 of its 4 latent channels and leaves the rest conditional; published baselines follow it. Both
    halves run as one batch of 2B. A scale of 1 runs the conditional half alone, and so do timesteps of which the share of
    the schedule lies outside ``cfg_interval`` (Kynkäänniemi et al. 2024, arXiv 2404.07724). ``y_B`` may be one label [1] for
    all samples, which the model then embeds once. ``variance`` keeps what the model predicts beside the noise, conditional.
    """
    null_B = torch.full_like(y_B, null_label)
    low, high = cfg_interval

    def predict(z: Tensor, t_B: Tensor) -> Tensor:
        channels = z.shape[1]
        t_B = t_B.expand_as(y_B)
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


def ddim_step(
    z_t: Tensor, eps: Tensor, alpha_bar_t: Tensor | float, alpha_bar_next: Tensor | float, *, clip: bool = False
) -> Tensor:  # fmt: skip
    """Eq. 1, from noise level ``alpha_bar_t`` to ``alpha_bar_next``.

    ``clip`` clamps the predicted clean image to [−1, 1], for generators that work on pixels. The noise is then derived again
    from the clamped image, as DiT's own sampler does: with the old one the step would leave the line between the two, and the
    error of early steps, where 1/√ᾱ is large, would pile up (the more steps, the worse the images).
    """
    z0 = predict_z0(z_t, eps, alpha_bar_t)
    if clip:
        z0 = z0.clamp(-1, 1)
        eps = (z_t - alpha_bar_t**0.5 * z0) / (1 - alpha_bar_t) ** 0.5
    return alpha_bar_next**0.5 * z0 + (1 - alpha_bar_next) ** 0.5 * eps


Draw = Callable[[], Tensor]
"""Standard normal noise of the shape of z, each sample's from a stream of its own."""


Drift = Callable[[Tensor, float], Tensor | None]
"""(ẑ_0, share of the steps that are left) → what a step adds to z, in units of its deviation σ_t."""


def ddim(
    predict: Predictor, z: Tensor, draw: Draw, schedule: NoiseSchedule, num_steps: int, clip: bool, *, first: int | None = None
) -> Tensor:  # fmt: skip
    """Deterministic (η = 0), on DiT's "ddimN" timesteps 0, 1000/N, 2000/N …; from the ``first`` of them, where ``z`` is not
    pure noise."""
    timesteps = schedule.respaced(num_steps).tolist()
    levels = [1.0, *schedule.alpha_bar[timesteps].tolist()]
    for i in range(num_steps - 1 if first is None else first, -1, -1):
        eps = predict(z, torch.tensor(timesteps[i : i + 1]))[:, : z.shape[1]]
        z = ddim_step(z, eps, levels[i + 1], levels[i], clip=clip)
    return z


def ddpm(
    predict: Predictor, z: Tensor, draw: Draw, schedule: NoiseSchedule, num_steps: int, clip: bool,
    *, drift: Drift | None = None,
) -> Tensor:  # fmt: skip
    """Ancestral sampling of the process respaced to N of its timesteps (Ho et al. 2020, Alg. 2), as the published baselines do.

    Timesteps run from 0 to the last one, DiT's respacing "N" (for 50: 0, 20, 41 … 979, 999). A predicted variance lies between
    that of the posterior and β of the respaced process, on a logarithmic scale (Nichol & Dhariwal 2021, Eq. 15); without one
    it is the posterior's. ``drift`` guides samples beside the noise.
    """
    timesteps = schedule.respaced(num_steps, "linspace").tolist()
    levels = [1.0, *schedule.alpha_bar[timesteps].tolist()]
    betas = [1 - now / before for before, now in itertools.pairwise(levels)]
    for i in range(num_steps - 1, -1, -1):
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


def dpmpp_2m(predict: Predictor, z: Tensor, draw: Draw, schedule: NoiseSchedule, num_steps: int, clip: bool) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Alg. 2): second order in λ = log(√ᾱ / √(1−ᾱ)), one call a step.

    Timesteps are evenly spaced over (0, 999], as diffusers' "linspace"; the first and the last step are of first order.
    """
    timesteps = schedule.respaced(num_steps + 1, "linspace").tolist()[1:]
    levels = [1.0, *schedule.alpha_bar[timesteps].tolist()]
    log_snr = [math.inf, *(0.5 * math.log(level / (1 - level)) for level in levels[1:])]
    before: Tensor | None = None
    for i in range(num_steps, 0, -1):
        eps = predict(z, torch.tensor(timesteps[i - 1 : i]))[:, : z.shape[1]]
        z0 = predict_z0(z, eps, levels[i])
        if clip:
            z0 = z0.clamp(-1, 1)
        step = log_snr[i - 1] - log_snr[i]
        slope = z0
        if before is not None and i > 1:
            ratio = (log_snr[i] - log_snr[i + 1]) / step
            slope = z0 + (z0 - before) / (2 * ratio)
        sigmas = ((1 - levels[i - 1]) / (1 - levels[i])) ** 0.5
        z = sigmas * z - levels[i - 1] ** 0.5 * math.expm1(-step) * slope
        before = z0
    return z


SAMPLERS: dict[SamplerName, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++2m": dpmpp_2m,
}


@torch.inference_mode()
def sample(
    predict: Predictor,
    shape: Sequence[int],
    generators: Sequence[Generator],
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    sampler: SamplerName = "ddim",
    clip: bool = False,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Draw ``len(generators)`` samples of ``shape`` [C, H, W]; sample b uses noise of ``generators[b]`` alone.

    Noise is drawn on the CPU, so that it is the same for every device. Ends on the clean latent (ᾱ = 1). Returns float32.
    ``start`` [B, C, H, W] takes the place of the first noise; ``options`` are those of the sampler (``first``, ``drift``).
    """

    def draw() -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device, non_blocking=True)

    z = draw() if start is None else start.to(device)
    return SAMPLERS[sampler](predict, z, draw, schedule, num_steps, clip, **options).float()
