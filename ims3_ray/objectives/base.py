"""The interface of a fine-tuning objective, and the weighted sum of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ims3_ray.component import Component, Registry
from ims3_ray.diffusion.prediction import Parametrisation, epsilon_of, predict_z0, target_of
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample


@dataclass
class TrainingStep:
    """One batch, noised by Eq. 4, and the forward pass that every objective shares."""

    model: nn.Module
    schedule: NoiseSchedule
    z0: Tensor
    """Clean images or latents, [B, C, H, W]."""
    y_B: Tensor
    """The condition that the model is given for each image, [B, …]; for DiT the label of the image's class."""
    dropped_B: Tensor
    """``y_B`` with some conditions replaced by the null condition, to train for classifier-free guidance."""
    t_B: Tensor
    noise: Tensor
    output_is_needed: bool = True
    """Whether any objective uses ``output``."""
    parametrisation: Parametrisation = "epsilon"
    """The quantity that the model predicts."""
    labels_B: Tensor | None = None
    """Label of each image's class, int64 [B]; None where ``y_B`` holds the labels."""
    _output: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.z_t = self.schedule.add_noise(self.z0, self.noise, self.t_B)
        """``z0`` with noise added (Eq. 4), [B, C, H, W]."""
        self.class_B = self.y_B if self.labels_B is None else self.labels_B
        """Label of each image's class, int64 [B]."""

    @property
    def output(self) -> Tensor:
        """``model(z_t, t, dropped)``: its prediction [B, C, H, W], followed by C channels of variance if it learns one."""
        if self._output is None:
            self._output = self.model(self.z_t, self.t_B, self.dropped_B)
        return self._output

    def predict(self, z: Tensor, t_B: Tensor) -> Tensor:
        """The noise that the conditional model predicts at ``z``.

        The first call with gradient also computes the shared forward pass: at the small batches of fine-tuning one pass over
        twice the batch costs less than two passes, as half as many kernels are launched (figures: docs/finetuning.md).
        """
        if self._output is None and self.output_is_needed and torch.is_grad_enabled():
            pairs = ((self.z_t, z), (self.t_B, t_B), (self.dropped_B, self.y_B))
            self._output, output = self.model(*map(torch.cat, pairs)).chunk(2)
        else:
            output = self.model(z, t_B, self.y_B)
        return self.epsilon(output, z, t_B)

    def epsilon(self, output: Tensor, z: Tensor, t_B: Tensor) -> Tensor:
        """The noise [B, C, H, W] that the model's ``output`` at ``z`` implies."""
        predicted = output[:, : self.z0.shape[1]]
        if self.parametrisation == "v":  # bfloat16 is too coarse for √ᾱ near 0
            predicted, z = predicted.float(), z.float()
        return epsilon_of(predicted, z, t_B, self.schedule, self.parametrisation)

    @property
    def predicted(self) -> Tensor:
        """The model's prediction at z_t, [B, C, H, W] float32."""
        return self.output[:, : self.z0.shape[1]].float()

    @property
    def target(self) -> Tensor:
        """What the model should predict at z_t, [B, C, H, W]."""
        return target_of(self.z0, self.noise, self.t_B, self.schedule, self.parametrisation)

    @property
    def eps(self) -> Tensor:
        """The predicted noise ε_θ(z_t, t), [B, C, H, W] float32."""
        return self.epsilon(self.output.float(), self.z_t.float(), self.t_B)

    @property
    def z0_hat(self) -> Tensor:
        """The clean latent that the shared forward pass implies (Eq. 2), float32, not clamped."""
        alpha_bar = per_sample(self.schedule.on(self.z_t.device).alpha_bar[self.t_B], self.eps)
        return predict_z0(self.z_t.float(), self.eps, alpha_bar)


class Objective(Component, ABC):
    """A weighted sum of named scalar terms of a training step, made from its ``Config``.

    Its settings are ``finetune.objectives.NAME`` in a config. A weight of 0 leaves a term out and costs nothing.
    """

    registry = Registry["type[Objective]"]("objective", "ims3_ray.objectives")
    needs_output: ClassVar[bool] = True
    """Whether the objective uses the forward pass that objectives share."""
    couples_samples: ClassVar[bool] = False
    """Whether the objective compares the images of a batch with each other; its value depends on how a batch is divided."""

    term_titles: ClassVar[Mapping[str, str]] = {}
    """Name of a term → its name in figures, where the two differ."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.weights = {name: weight for name, weight in self.terms(config).items() if weight}
        """Name of each term whose weight is not 0 → its weight."""

    @classmethod
    @abstractmethod
    def terms(cls, config: Any) -> Mapping[str, float]:
        """Name of each term → its weight."""

    @classmethod
    def title(cls, config: Any) -> str:
        """Name of the objective for titles."""
        return cls.name

    @classmethod
    def described(cls, config: Any) -> str:
        """What the report says of it: its terms with their weights."""
        terms = {name: weight for name, weight in cls.terms(config).items() if weight}
        return " + ".join(f"{weight:g}·{cls.term_titles.get(name, name)}" for name, weight in terms.items())

    @classmethod
    def is_on(cls, config: Any) -> bool:
        """Whether the weight of any of its terms is not 0."""
        return any(cls.terms(config).values())

    @classmethod
    def passes(cls, config: Any) -> tuple[int, int]:
        """Number of forward passes that the objective makes besides the shared one, and how many of them carry a gradient."""
        return 0, 0

    @classmethod
    def needs_variance(cls, config: Any) -> bool:
        """Whether the generator must predict a variance."""
        return False

    @abstractmethod
    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        """The terms named in ``weights``, before weighting."""

    def state(self) -> dict[str, Tensor]:
        """State that is needed to resume after an interruption."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""


class Losses(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    """Name of each term → its value before weighting."""


def add_up(objectives: Sequence[Objective], step: TrainingStep) -> Losses:
    """Σ weight·term over all objectives (with L_Diff and λ_IM·L_IM this is Eq. 7)."""
    total, terms = torch.zeros((), device=step.z0.device), dict[str, Tensor]()
    for objective in objectives:
        found = objective(step)
        terms |= found
        for name, value in found.items():
            total = total + objective.weights.get(name, 0.0) * value
    return Losses(total, terms)
