"""L_IM as the paper prints it (Eq. 5, Algorithm 1). The authors' code reads it otherwise: inversion_matching_released."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ims3_ray.diffusion.inversion import invert
from ims3_ray.objectives.base import Objective, TrainingStep


def inversion_matching_loss(z_inv: Tensor, z_t: Tensor, similarity: str = "cosine") -> Tensor:
    """Eq. 5, ``1 − σ(z_t^inv, z_t)``: cosine over all elements of each sample, mean over the batch.

    ``l1`` and ``l2`` are the alternatives of Table 7: mean absolute and mean squared difference.
    """
    z_inv, z_t = z_inv.float().flatten(1), z_t.float().flatten(1)
    if similarity == "cosine":
        return (1 - F.cosine_similarity(z_inv, z_t)).mean()
    return {"l1": F.l1_loss, "l2": F.mse_loss}[similarity](z_inv, z_t)


class InversionMatching(Objective):
    """λ_IM·L_IM: the clean latent, inverted by the conditional model to each sample's own t, is to meet z_t.

    ``z_t`` of Eq. 4 holds no parameter, so L_IM has a gradient through the inversion only, and there through the last
    ``grad_steps`` of its ``n_steps``.
    """

    needs_output = False

    def __init__(self, weight: float, n_steps: int, grad_steps: int, similarity: str = "cosine") -> None:
        super().__init__(inversion_matching=weight)
        self.n_steps, self.grad_steps, self.similarity = n_steps, grad_steps, similarity

    def __call__(self, step: TrainingStep) -> dict[str, Tensor]:
        z_inv = invert(step.predict, step.z0, step.t_B, step.schedule, self.n_steps, self.grad_steps)
        return {"inversion_matching": inversion_matching_loss(z_inv, step.z_t, self.similarity)}
