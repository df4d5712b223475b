"""Student networks that are trained from scratch on a distilled set: those of the Minimax and RDED protocols, and timm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.errors import UserError, first_line

Norm = Literal["instance", "batch"]
Downsample = Literal["stride", "pool"]

TIMM = "timm/"
CONVNET = re.compile(r"convnet-([1-9])")


Builder = Callable[[int, int, int, "Norm", int], nn.Module]
"""(channels, size, num_classes, norm, width) → a network with fresh weights, which maps images [B, channels, size, size] to
logits [B, num_classes]."""

STUDENTS: dict[str, Builder] = {}
"""Name → builder, for the students that have a fixed name, including those of plugins."""


def student(name: str) -> Callable[[Builder], Builder]:
    """Decorator that registers a builder under a name, which ``evaluation.protocols.NAME.students`` can then use."""

    def enter(build: Builder) -> Builder:
        there = STUDENTS.get(name)
        same = there is None or _place(there) == _place(build)
        if not same or CONVNET.fullmatch(name) or name.startswith(TIMM):
            raise UserError(f"there are two students called '{name}'; call the one of the plugin otherwise")
        STUDENTS[name] = build
        return build

    return enter


def _place(build: Builder) -> tuple[str, str]:
    return getattr(build, "__module__", ""), getattr(build, "__qualname__", "")


def student_builder(name: str) -> Builder:
    """The builder of the student of that name. Raises :class:`UserError` for an unknown name."""
    if depth := CONVNET.fullmatch(name):
        return partial(_convnet, int(depth[1]))
    if name in STUDENTS:
        return STUDENTS[name]
    if name.startswith(TIMM):
        import timm

        if timm.is_model(name.removeprefix(TIMM)):
            return partial(_of_timm, name.removeprefix(TIMM))
    raise UserError(
        f"no student '{name}'; there is convnet-DEPTH, {', '.join(sorted(STUDENTS))}, and timm/NAME for timm's networks"
    )


def build_student(
    name: str, channels: int, size: int, num_classes: int, norm: Norm = "instance", width: int = 128
) -> nn.Module:
    """A student with fresh weights, which maps images [B, channels, size, size] to logits [B, num_classes].

    ``width`` is the number of channels of a ConvNet's layers. Networks of timm keep their own normalisation. Raises
    :class:`UserError` for an unknown name and ``ValueError`` for images too small for a ConvNet.
    """
    return student_builder(name)(channels, size, num_classes, norm, width)


def _convnet(depth: int, channels: int, size: int, num_classes: int, norm: Norm, width: int) -> nn.Module:
    return ConvNet(channels, size, num_classes, width, depth, norm)


def _of_timm(architecture: str, channels: int, size: int, num_classes: int, norm: Norm, width: int) -> nn.Module:
    import timm

    config = timm.get_pretrained_cfg(architecture)
    more = {"img_size": size} if config is not None and config.fixed_input_size else {}
    network: nn.Module = timm.create_model(architecture, in_chans=channels, num_classes=num_classes, **more)
    return network


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """An affine normalisation layer. Instance norm is implemented as group norm with one group per channel, as in Minimax's
    protocol."""
    return nn.GroupNorm(channels, channels) if norm == "instance" else nn.BatchNorm2d(channels)


def he_normal(network: nn.Module) -> None:
    """Initialise each convolution with the normal distribution of He et al. 2015, scaled by its fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class AveragePool2(nn.Module):
    """The mean over 2×2 pixels, as ``nn.AvgPool2d(2)`` computes it up to rounding; an odd last row or column is left out.

    On CPUs, adding strided views is six times as fast as PyTorch's kernel for contiguous tensors.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.device.type != "cpu" or min(x_BCHW.shape[-2:]) < 2:  # which PyTorch refuses
            return F.avg_pool2d(x_BCHW, 2)
        height, width = (size // 2 * 2 for size in x_BCHW.shape[-2:])
        rows = x_BCHW[..., :height:2, :] + x_BCHW[..., 1:height:2, :]
        return 0.25 * (rows[..., :width:2] + rows[..., 1:width:2])


class ConvNet(nn.Module):
    """The ConvNet of the distillation literature: ``depth`` × (3×3 conv, norm, ReLU, 2×2 average pool), then a linear layer.
    Weights have PyTorch's default initialisation, as in the code of DC, IDC and Minimax.

    The input is [B, in_channels, size, size], the output logits [B, num_classes].
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
            layers += [conv, norm_layer(norm, width), nn.ReLU(inplace=True), AveragePool2()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.classifier(self.features(x_BCHW).flatten(1))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut. ``downsample="pool"`` replaces stride 2 by stride 1 and a 2×2 average pool, after
    the first convolution's ReLU and after the shortcut's convolution."""

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
    """1×1, 3×3 and 1×1 convolutions and a shortcut. Downsampling is that of :class:`BasicBlock`, after the 3×3 convolution."""

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
    """The layers that bring a block's input to the shape of its output."""
    if pooled:
        return nn.Sequential(conv(inputs, outputs, 1), nn.AvgPool2d(2), norm(outputs))
    if stride != 1 or inputs != outputs:
        return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))
    return nn.Identity()


class ResNet(nn.Module):
    """The ResNet of He et al. 2016, and ResNetAP, which has average pooling in place of strides (Minimax's protocol).
    Parameters have the names that torchvision gives them.

    The stem depends on the size of the images: up to 64 pixels a 3×3 convolution at full resolution, up to 128 pixels the same
    followed by 2-fold pooling, beyond that a 7×7 convolution and 4-fold downsampling. The input is [B, channels, size, size],
    the output logits [B, num_classes].
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


def _resnet(
    downsample: Downsample, block: type[BasicBlock | Bottleneck], blocks: tuple[int, int, int, int], channels: int, size: int,
    num_classes: int, norm: Norm, width: int,
) -> nn.Module:  # fmt: skip
    return ResNet(block, blocks, downsample, channels, size, num_classes, norm)


STUDENTS |= {
    "resnetap-10": partial(_resnet, "pool", BasicBlock, (1, 1, 1, 1)),
    "resnet-18": partial(_resnet, "stride", BasicBlock, (2, 2, 2, 2)),
    "resnet-50": partial(_resnet, "stride", Bottleneck, (3, 4, 6, 3)),
    "resnet-101": partial(_resnet, "stride", Bottleneck, (3, 4, 23, 3)),
}


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network normalises over the images of a batch, which therefore has to hold more than one."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def tried_out(
    name: str, channels: int, size: int, num_classes: int, norm: Norm, width: int
) -> tuple[nn.Module, str | None]:  # fmt: skip
    """The network on the meta device, and the name of its first layer that normalises each channel of each image over a single
    pixel; None if there is none. The output of such a layer is the same for all images, so the network cannot learn.

    Raises :class:`UserError` for a network that cannot take images of this size.
    """
    try:
        with torch.device("meta"):
            network = build_student(name, channels, size, num_classes, norm, width)
        return network, _constant_norms(network, channels, size)
    except (ValueError, RuntimeError, AssertionError) as error:  # raised by networks for images that are too small
        raise UserError(f"{name} cannot take these images ({first_line(error)}); choose another") from error


def _constant_norms(network: nn.Module, channels: int, size: int) -> str | None:
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        each = isinstance(module, nn.modules.instancenorm._InstanceNorm) or (
            isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
        )
        if each and inputs[0].dim() > 2 and inputs[0][0, 0].numel() == 1:
            found.append(name)

    for name, module in network.named_modules():
        module.register_forward_pre_hook(partial(look, name))
    network.to("meta").eval()(torch.zeros(2, channels, size, size, device="meta"))
    return found[0] if found else None


@cache
def _check(name: str, channels: int, size: int, num_classes: int, norm: Norm, width: int) -> tuple[str | None, bool]:
    network, constant = tried_out(name, channels, size, num_classes, norm, width)
    return constant, has_batch_norm(network)


def check_student(
    name: str, channels: int, size: int, num_classes: int, norm: Norm, width: int, batch_size: int | None = None
) -> None:  # fmt: skip
    """Raises :class:`UserError` for a student that cannot learn from images of this size, or in batches of this size."""
    constant, batched = _check(name, channels, size, num_classes, norm, width)
    if constant:
        raise UserError(
            f"student {name} has a layer ({constant}) that normalises maps of a single pixel for images of {size} pixels, so "
            "it would never learn; set evaluation.protocols.NAME.norm to batch, choose a network with fewer layers, or larger "
            "images (evaluation.protocols.NAME.size)"
        )
    if batched and batch_size == 1:
        raise UserError(batch_of_one(name))


def batch_of_one(name: str) -> str:
    """The error message for a student that cannot be trained in batches of one image."""
    return (
        f"student {name} normalises over the images of a batch, which needs more than one image, but the batch size is 1; "
        "raise evaluation.protocols.NAME.batch_size, or set its norm to instance"
    )
