"""L_Diff (Eq. 6) and the label dropping that classifier-free guidance is trained with."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def diffusion_loss(predicted_noise: Tensor, noise: Tensor) -> Tensor:
    """Eq. 6, ``‖ε_θ(z_t, c) − ε‖²``, as the mean over all elements (the reduction DiT and its descendants use)."""
    return (predicted_noise.float() - noise.float()).square().mean()


def drop_labels(y_B: Tensor, null_label: int, probability: float, generator: Generator | None = None) -> Tensor:
    """Each label replaced by ``null_label`` with the given probability: one decision per sample."""
    drop = torch.rand(y_B.shape, generator=generator, device=y_B.device) < probability
    return torch.where(drop, null_label, y_B)
