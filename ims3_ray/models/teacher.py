"""The teacher: a classifier of the classes that are distilled, whose outputs and statistics methods use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ims3_ray.models.encoder import Encoder


class TeacherNetwork(nn.Module):
    """Maps images in [0, 1], [B, C, H, W], to logits [B, num_classes] in the order of the classes that are distilled.

    The network is frozen, in evaluation mode, and differentiable in the images.
    """

    positions: Tensor

    def __init__(self, encoder: Encoder, positions: Sequence[int]) -> None:
        """``positions`` holds the encoder's own position of each class."""
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.register_buffer("positions", torch.tensor(positions), persistent=False)

    @property
    def mean(self) -> Tensor:
        """Mean colour by which the network normalises, of pixels in [0, 1], [C, 1, 1] or [1, 1, 1]."""
        return (self.encoder.get_buffer("mean") + 1) / 2

    @property
    def std(self) -> Tensor:
        """The standard deviation that belongs to :attr:`mean`."""
        return self.encoder.get_buffer("std") / 2

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.encoder.logits(2 * images_BCHW - 1)[:, self.positions]
