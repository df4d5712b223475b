"""What a fine-tuning objective sees and gives, and how objectives add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ims3_ray.diffusion.sampling import predict_z0
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample


@dataclass
class TrainingStep:
    """One batch, noised by Eq. 4, and the forward pass that every objective shares."""

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
    output_is_needed: bool = True
    """Whether an objective looks at ``output``."""
    _output: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.z_t = self.schedule.add_noise(self.z0, self.noise, self.t_B)
        """Eq. 4."""

    @property
    def output(self) -> Tensor:
        """``model(z_t, t, dropped)``: predicted noise [B, C, H, W], followed by C channels of variance if it learns one."""
        if self._output is None:
            self._output = self.model(self.z_t, self.t_B, self.dropped_B)
        return self._output

    def predict(self, z: Tensor, t_B: Tensor) -> Tensor:
        """The conditional model's noise at ``z``.

        The first call with gradient takes the shared forward pass along: at the small batches of fine-tuning one pass over
        twice the batch costs less than two, with half as many kernels to launch (docs/finetuning.md has the figures).
        """
        if self._output is None and self.output_is_needed and torch.is_grad_enabled():
            pairs = ((self.z_t, z), (self.t_B, t_B), (self.dropped_B, self.y_B))
            self._output, output = self.model(*map(torch.cat, pairs)).chunk(2)
        else:
            output = self.model(z, t_B, self.y_B)
        return output[:, : self.z0.shape[1]]

    @property
    def eps(self) -> Tensor:
        """ε_θ(z_t, t), [B, C, H, W] float32."""
        return self.output[:, : self.z0.shape[1]].float()

    @property
    def z0_hat(self) -> Tensor:
        """The clean latent that the shared forward pass implies (Eq. 2), float32, not clamped."""
        alpha_bar = per_sample(self.schedule.on(self.z_t.device).alpha_bar[self.t_B], self.eps)
        return predict_z0(self.z_t.float(), self.eps, alpha_bar)


class Objective(ABC):
    """A weighted sum of named scalar terms of a training step."""

    needs_output = True
    """Whether it looks at the forward pass that objectives share."""

    def __init__(self, **weights: float) -> None:
        self.weights = weights

    @abstractmethod
    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        """The terms named in ``weights``, not weighted."""

    def state(self) -> dict[str, Tensor]:
        """What must be kept to go on after an interruption."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most keep nothing
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
