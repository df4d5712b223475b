"""The variance-preserving noise schedule of DDPM and the quantities derived from it that the paper uses."""

from __future__ import annotations

import copy
from itertools import accumulate, repeat
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["leading", "linspace", "dit"]


class NoiseSchedule:
    """ᾱ_t of a β schedule: by default the linear one (1e-4 → 0.02 over 1000 steps) that DiT was trained with.

    All tables are float64 ``[num_steps]``; ``alpha_bar[t]`` is the signal power after ``t + 1`` noising steps, as for the
    integer timestep ``t`` of diffusers and DiT.
    """

    def __init__(
        self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, of_roots: bool = False,
        offset: int = 0, ends_clean: bool = True,
    ) -> None:  # fmt: skip
        """``of_roots`` spaces the square roots of β evenly instead of β, as Stable Diffusion does. ``offset`` is added to the
        timesteps of the spacing "leading". Sampling ends at ᾱ = 1 if ``ends_clean``, else at ᾱ_0, where the last step of
        Stable Diffusion's schedulers ends."""
        power = 0.5 if of_roots else 1.0
        betas = torch.linspace(beta_start**power, beta_end**power, num_steps, dtype=torch.float64) ** (1 / power)
        self.num_steps, self.offset = num_steps, offset
        self.beta = betas
        self.alpha_bar = torch.cumprod(1 - betas, dim=0)
        self.alpha_bar_previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        """ᾱ_{t−1}; 1 before the first step."""
        self.last_alpha_bar = 1.0 if ends_clean else self.alpha_bar[0].item()
        """ᾱ at which sampling ends."""
        self.sigma = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        """σ_t = √((1−ᾱ_t)/ᾱ_t), the noise level of the rescaled latent x̄ = z/√ᾱ in which Eq. 3 is an Euler step."""
        self._on: dict[torch.device, NoiseSchedule] = {betas.device: self}

    def on(self, device: torch.device) -> NoiseSchedule:
        """The same schedule with its tables on ``device``. They are copied only once, since each copy blocks the host."""
        if device not in self._on:
            other = copy.copy(self)
            for table in ("beta", "alpha_bar", "alpha_bar_previous", "sigma"):
                setattr(other, table, getattr(self, table).to(device))
            self._on[device] = other
        return self._on[device]

    def add_noise(self, z0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Eq. 4: ``z_t = √ᾱ_t · z_0 + √(1−ᾱ_t) · ε`` for one timestep ``t_B[b]`` per sample; shaped as ``z0``."""
        alpha_bar = per_sample(self.on(z0.device).alpha_bar[t_B], z0)
        return alpha_bar.sqrt() * z0 + (1 - alpha_bar).sqrt() * noise

    def posterior_mean(self, z0: Tensor, z_t: Tensor, t_B: Tensor) -> Tensor:
        """Mean of q(z_{t−1} | z_t, z_0) (DDPM, Ho et al. 2020, Eq. 7): a weighted sum of ``z0`` and ``z_t``."""
        here = self.on(z0.device)
        now, before = here.alpha_bar, here.alpha_bar_previous
        of_z0 = before.sqrt() * here.beta / (1 - now)
        of_z_t = (1 - here.beta).sqrt() * (1 - before) / (1 - now)
        return per_sample(of_z0[t_B], z0) * z0 + per_sample(of_z_t[t_B], z0) * z_t

    @property
    def posterior_log_variance(self) -> Tensor:
        """log β̃_t, float64 [num_steps]: β̃_0 is zero and is replaced by the value of step 1, as in DiT's release."""
        variance = self.beta * (1 - self.alpha_bar_previous) / (1 - self.alpha_bar)
        return torch.cat([variance[1:2], variance[1:]]).log()

    def respaced(self, num_steps: int, spacing: Spacing = "leading") -> Tensor:
        """``num_steps`` evenly spaced timesteps in rising order, int64.

        "leading" counts from ``offset`` with one whole-numbered step size, the smallest that gives so many timesteps, like
        "ddimN" in DiT's code. Where there is none, such as for 600 of 1,000, the step size is the exact one, rounded down at
        each step.
        "dit" runs from zero to the last timestep, as "N" does in DiT's code: the step size is added up and rounded at each
        step. "linspace" is the same in exact arithmetic, as in diffusers; the two differ by 1 at some timesteps of 278 of the
        1,000 numbers of steps. A single step is the last timestep.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"number of sampling steps must lie in 1 … {self.num_steps}, not {num_steps}")
        last = self.num_steps - 1
        if num_steps == 1:
            return torch.tensor([last])
        if spacing == "leading":
            stride = whole_stride(num_steps, self.num_steps)
            timesteps = torch.arange(num_steps) * (stride or self.num_steps) // (1 if stride else num_steps)
            return (timesteps + self.offset).clamp(max=last)
        step = last / (num_steps - 1)
        if spacing == "linspace":
            return (torch.arange(num_steps) * torch.tensor(step, dtype=torch.float64)).round().long()
        return torch.tensor([round(at) for at in accumulate(repeat(step, num_steps - 1), initial=0.0)])


def whole_stride(num_steps: int, of: int = 1000) -> int | None:
    """The smallest step size with which ``num_steps`` timesteps from 0 on reach past the last one; None if there is none."""
    stride = -(-of // num_steps)
    return stride if -(-of // stride) == num_steps else None


def spacing_version(num_steps: int, spacing: Spacing) -> dict[str, int]:
    """Entry for the key of an artifact that depends on timesteps: empty if they are those of the first version of this program,
    otherwise a version."""
    now = NoiseSchedule().respaced(num_steps, spacing)
    if spacing == "leading":
        first = torch.arange(num_steps) * (1000 // num_steps)
        return {} if torch.equal(now, first) else {"spacing": 3 if whole_stride(num_steps) else 2}
    return {} if torch.equal(now, NoiseSchedule().respaced(num_steps, "linspace")) else {"spacing": 2}


def per_sample(value_B: Tensor, like: Tensor) -> Tensor:
    """``value_B`` cast to the dtype of ``like`` and shaped ``[B, 1, …, 1]`` to broadcast over it."""
    return value_B.to(like).reshape(-1, *([1] * (like.dim() - 1)))
