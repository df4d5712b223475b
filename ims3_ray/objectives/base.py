"""What a fine-tuning objective sees and gives, and how objectives add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ims3_ray.diffusion.sampling import predict_z0
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample


@dataclass(frozen=True)
class TrainingStep:
    """One batch, noised by Eq. 4, with the forward pass that every objective shares."""

    model: nn.Module
    schedule: NoiseSchedule
    z0: Tensor
    """Clean images or latents, [B, C, H, W]."""
    y_B: Tensor
    """Labels."""
    dropped_B: Tensor
    """Labels with some replaced by the null label, as classifier-free guidance is trained."""
    t_B: Tensor
    noise: Tensor
    z_t: Tensor
    """Eq. 4."""
    output: Tensor
    """``model(z_t, t, dropped)``: predicted noise [B, C, H, W], followed by C channels of variance if it learns one."""

    @classmethod
    def forward(
        cls, model: nn.Module, schedule: NoiseSchedule, z0: Tensor, y_B: Tensor, dropped_B: Tensor, t_B: Tensor, noise: Tensor
    ) -> TrainingStep:
        z_t = schedule.add_noise(z0, noise, t_B)
        return cls(model, schedule, z0, y_B, dropped_B, t_B, noise, z_t, model(z_t, t_B, dropped_B))

    def predict(self, z: Tensor, t_B: Tensor) -> Tensor:
        """The conditional model's noise at ``z``, with gradient."""
        return self.model(z, t_B, self.y_B)[:, : self.z0.shape[1]]

    @property
    def eps(self) -> Tensor:
        """ε_θ(z_t, t), [B, C, H, W] float32."""
        return self.output[:, : self.z0.shape[1]].float()

    @property
    def z0_hat(self) -> Tensor:
        """The clean latent that the shared forward pass implies (Eq. 2), float32, not clamped."""
        alpha_bar = per_sample(self.schedule.alpha_bar.to(self.z_t.device)[self.t_B], self.eps)
        return predict_z0(self.z_t.float(), self.eps, alpha_bar)


class Objective:
    """A weighted sum of named scalar terms of a training step."""

    def __init__(self, **weights: float) -> None:
        self.weights = weights

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        """The terms named in ``weights``, not weighted."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on after an interruption."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""


class Losses(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    """Each term before it was weighted."""


def add_up(objectives: Sequence[Objective], step: TrainingStep) -> Losses:
    """Σ weight·term over all objectives (Eq. 7 for L_Diff and λ_IM·L_IM)."""
    total, terms = torch.zeros((), device=step.z0.device), dict[str, Tensor]()
    for objective in objectives:
        found = objective(step)
        terms |= found
        for name, value in found.items():
            total = total + objective.weights[name] * value
    return Losses(total, terms)
