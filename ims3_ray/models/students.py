"""Student networks that are trained from scratch on a distilled set: those of the Minimax and RDED protocols, and timm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["instance", "batch"]
Downsample = Literal["stride", "pool"]

RESNETS: dict[str, tuple[Downsample, type[BasicBlock | Bottleneck], tuple[int, int, int, int]]]
"""Student → how it downsamples, its block, blocks per stage."""

TIMM = "timm/"
CONVNET = re.compile(r"convnet-([1-9])")


def check_student(name: str) -> str:
    """``name`` if :func:`build_student` knows it; ``ValueError`` otherwise."""
    if name.startswith(TIMM):
        import timm

        known = timm.is_model(name.removeprefix(TIMM))
    else:
        known = name in RESNETS or CONVNET.fullmatch(name) is not None
    if not known:
        raise ValueError(
            f"no student '{name}'; there is convnet-DEPTH, {', '.join(RESNETS)}, and timm/NAME for timm's networks"
        )
    return name


def build_student(
    name: str, channels: int, size: int, num_classes: int, norm: Norm = "instance", width: int = 128
) -> nn.Module:
    """A student with fresh weights: images [B, channels, size, size] to logits [B, num_classes].

    ``width`` is that of a ConvNet's layers. Networks of timm keep the normalisation that they come with.
    Raises ``ValueError`` for an unknown name and for images too small for a ConvNet.
    """
    if depth := CONVNET.fullmatch(check_student(name)):
        return ConvNet(channels, size, num_classes, width, int(depth[1]), norm)
    if name in RESNETS:
        downsample, block, blocks = RESNETS[name]
        return ResNet(block, blocks, downsample, channels, size, num_classes, norm)
    import timm

    architecture = name.removeprefix(TIMM)
    config = timm.get_pretrained_cfg(architecture)
    more = {"img_size": size} if config is not None and config.fixed_input_size else {}
    network: nn.Module = timm.create_model(architecture, in_chans=channels, num_classes=num_classes, **more)
    return network


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Affine. Instance norm is written as group norm with one group per channel, as in Minimax's protocol."""
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.BatchNorm2d(channels)


def he_normal(network: nn.Module) -> None:
    """He et al. 2015: normal over the fan-out of each convolution."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ConvNet(nn.Module):
    """The ConvNet of the distillation literature: ``depth`` × (3×3 conv, norm, ReLU, 2×2 average pool), linear.

    Input [B, in_channels, size, size], output logits [B, num_classes].
    """

    def __init__(
        self, in_channels: int, size: int, num_classes: int, width: int = 128, depth: int = 3, norm: Norm = "instance"
    ) -> None:  # fmt: skip
        super().__init__()
        if size >> depth == 0:
            raise ValueError(f"a ConvNet of depth {depth} needs images of at least {2**depth} pixels, not {size}")
        layers: list[nn.Module] = []
        for i in range(depth):
            conv = nn.Conv2d(in_channels if i == 0 else width, width, 3, padding=1)
            layers += [conv, norm_layer(norm, width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, num_classes)
        he_normal(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.classifier(self.features(x_BCHW).flatten(1))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut. ``downsample="pool"`` puts stride 1 and a 2×2 average pool in place of stride 2,
    behind the first convolution's ReLU and behind the shortcut's convolution."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: Downsample, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        pooled = downsample == "pool" and stride == 2
        step = 1 if pooled else stride
        self.conv1, self.bn1 = conv(inputs, planes, 3, step), norm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2) if pooled else nn.Identity()
        self.downsample = shortcut(inputs, planes * self.expansion, stride, pooled, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; downsampling as in :class:`BasicBlock`, behind the 3×3."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: Downsample, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        pooled = downsample == "pool" and stride == 2
        step = 1 if pooled else stride
        self.conv1, self.bn1 = conv(inputs, planes, 1), norm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, step), norm(planes)
        self.conv3, self.bn3 = conv(planes, planes * self.expansion, 1), norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2) if pooled else nn.Identity()
        self.downsample = shortcut(inputs, planes * self.expansion, stride, pooled, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.pool(self.relu(self.bn2(self.conv2(out))))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def shortcut(inputs: int, outputs: int, stride: int, pooled: bool, norm: Callable[[int], nn.Module]) -> nn.Module:
    """What brings a block's input to the shape of its output."""
    if pooled:
        return nn.Sequential(conv(inputs, outputs, 1), nn.AvgPool2d(2), norm(outputs))
    if stride != 1 or inputs != outputs:
        return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))
    return nn.Identity()


class ResNet(nn.Module):
    """He et al. 2016, and ResNetAP with average pooling in place of strides (Minimax's protocol). Parameters are named as
    torchvision names them.

    The stem goes by the images' size: to 64 pixels 3×3 at full resolution, to 128 the same and a 2×2 pool, beyond that 7×7 and
    4-fold downsampling. Input [B, channels, size, size], output logits [B, num_classes].
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], downsample: Downsample, channels: int, size: int,
        num_classes: int, norm: Norm,
    ) -> None:  # fmt: skip
        super().__init__()
        normed = partial(norm_layer, norm)
        pooled = downsample == "pool"
        self.conv1 = conv(channels, 64, 3) if size <= 128 else conv(channels, 64, 7, 1 if pooled else 2)
        self.bn1, self.relu = normed(64), nn.ReLU(inplace=True)
        if size <= 64:
            self.maxpool: nn.Module = nn.Identity()
        elif pooled:
            self.maxpool = nn.AvgPool2d(2 if size <= 128 else 4)
        else:
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, count in enumerate(blocks):
            layers = []
            for number in range(count):
                stride = 2 if stage and not number else 1
                layers.append(block(inputs, 64 << stage, stride, downsample, normed))
                inputs = (64 << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, num_classes)
        he_normal(self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW))))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(stage)(x)
        return self.fc(x.mean(dim=(2, 3)))


RESNETS = {
    "resnetap-10": ("pool", BasicBlock, (1, 1, 1, 1)),
    "resnet-18": ("stride", BasicBlock, (2, 2, 2, 2)),
    "resnet-50": ("stride", Bottleneck, (3, 4, 6, 3)),
    "resnet-101": ("stride", Bottleneck, (3, 4, 23, 3)),
}


@cache
def forward_flops(name: str, channels: int, size: int, num_classes: int, norm: Norm, width: int) -> float:
    """Floating-point operations of one image, counted on a network without weights."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_student(name, channels, size, num_classes, norm, width).eval()(torch.zeros(1, channels, size, size))
    return float(counter.get_total_flops())
