"""Student networks that are trained from scratch on a distilled set."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """The ConvNet of the distillation literature: ``depth`` × (3×3 conv, instance norm, ReLU, 2×2 average pool), linear.

    Instance norm is affine, written as group norm with one group per channel (Minimax's protocol); convolutions are
    He-normal over fan-out. Input [B, in_channels, size, size], output logits [B, num_classes].
    """

    def __init__(self, in_channels: int, size: int, num_classes: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        if size >> depth == 0:
            raise ValueError(f"a ConvNet of depth {depth} needs images of at least {2**depth} pixels, not {size}")
        layers: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(in_channels if i == 0 else width, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            layers += [conv, nn.GroupNorm(width, width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.classifier(self.features(x_BCHW).flatten(1))
