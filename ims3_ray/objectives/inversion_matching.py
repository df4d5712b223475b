"""L_IM as printed in the paper (Eq. 5, Algorithm 1). The authors' code differs: see inversion_matching_released."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ims3_ray.component import Section
from ims3_ray.diffusion.inversion import invert
from ims3_ray.objectives.base import Objective, TrainingStep


def inversion_matching_loss(z_inv: Tensor, z_t: Tensor, similarity: str = "cosine") -> Tensor:
    """Eq. 5, ``1 − σ(z_t^inv, z_t)``: σ is the cosine over all elements of a sample; the mean is taken over the batch.

    ``l1`` and ``l2`` are the alternatives of Table 7: mean absolute and mean squared difference.
    """
    z_inv, z_t = z_inv.float().flatten(1), z_t.float().flatten(1)
    if similarity == "cosine":
        return (1 - F.cosine_similarity(z_inv, z_t)).mean()
    return {"l1": F.l1_loss, "l2": F.mse_loss}[similarity](z_inv, z_t)


class InversionMatching(Objective):
    """λ_IM·L_IM: the clean latent, inverted by the conditional model to each sample's own t, should match z_t.

    ``z_t`` of Eq. 4 does not depend on the parameters, so the gradient of L_IM flows through the inversion only, and there
    through the last ``grad_steps`` of its ``n_steps`` steps.
    """

    name = "inversion_matching"
    needs_output = False
    term_titles: ClassVar[Mapping[str, str]] = {"inversion_matching": "L_IM"}

    class Config(Section):
        """L_IM as printed in the paper (Eq. 5, Algorithm 1)."""

        weight: float = Field(default=0.002, ge=0)
        """Weight λ_IM of Eq. 7; 0 leaves the term out."""
        n_steps: int = Field(default=2, ge=1)
        """Number of inversion steps from z_0 to each sample's own t (N of Eq. 3)."""
        grad_steps: int = Field(default=1, ge=1)
        """Number of inversion steps, counted from the last, through which the gradient flows."""
        similarity: Literal["cosine", "l1", "l2"] = "cosine"
        """Measure by which z_inv is compared with z_t (Table 7)."""

        @model_validator(mode="after")
        def _grad_steps_within(self) -> InversionMatching.Config:
            if self.grad_steps > self.n_steps:
                raise ValueError(f"grad_steps={self.grad_steps} exceeds n_steps={self.n_steps}; lower it")
            return self

    config: Config

    @classmethod
    def terms(cls, config: Config) -> Mapping[str, float]:
        return {"inversion_matching": config.weight}

    @classmethod
    def title(cls, config: Config) -> str:
        return "IM"

    @classmethod
    def described(cls, config: Config) -> str:
        how = f"{config.n_steps} inversion steps, gradient through the last {config.grad_steps}, {config.similarity}"
        return f"{super().described(config)} as the paper prints it ({how})"

    @classmethod
    def passes(cls, config: Config) -> tuple[int, int]:
        return config.n_steps, config.grad_steps

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        c = self.config
        z_inv = invert(step.predict, step.z0, step.t_B, step.schedule, c.n_steps, c.grad_steps)
        return {"inversion_matching": inversion_matching_loss(z_inv, step.z_t, c.similarity)}
