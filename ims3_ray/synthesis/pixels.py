"""What the methods that optimise pixels share: networks with fresh weights, and images between bytes and normalised values."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ims3_ray.data.transforms import to_pil
from ims3_ray.errors import UserError
from ims3_ray.models.students import build_student, has_batch_norm, tried_out
from ims3_ray.synthesis.base import Costs


def normalised(pixels: Tensor, statistics: tuple[Tensor, Tensor], device: str) -> Tensor:
    """uint8 pixels [N, C, H, W] as float32 values of the same shape on the device, normalised by the mean and standard
    deviation [C, 1, 1] of pixels in [0, 1]."""
    mean, std = statistics
    return (pixels.to(device).float() / 255 - mean) / std


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1], [N, C, H, W], as uint8 pixels of the same shape on the CPU; values outside are clamped. Raises
    :class:`UserError` for values that are not finite."""
    if not images.isfinite().all():
        raise UserError("the optimised images have values that are not finite; lower the synthesis method's learning rate (lr)")
    return (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu()


class FreshNetworks:
    """Students with random weights, which are drawn on the CPU: the same seed gives the same weights on every device."""

    def __init__(self, name: str, width: int, channels: int, size: int, num_classes: int, device: str) -> None:
        self.arguments = (name, channels, size, num_classes, "instance", width)
        self.device = device

    def __call__(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build_student(*self.arguments).to(self.device)  # type: ignore[arg-type]


def without_head(network: nn.Module) -> nn.Module:
    """The network with its last linear layer removed, so that it returns features [B, D]."""
    name = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network


def check_network(method: str, name: str, width: int, pad_to: int | None, costs: Costs) -> None:
    """Raises :class:`UserError` for a network that is not known, that the images do not fit, that cannot tell them apart, whose
    batch norm would couple them, or that has no convolutions or no linear layer at its end."""
    size, classes, key = max(costs.size, pad_to or 0), len(costs.counts), f"synthesis.{method}.network"
    try:
        network, constant = tried_out(name, costs.channels, size, classes, "instance", width)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    linear = any(isinstance(module, nn.Linear) for module in network.modules())
    if not linear or all(parameter.dim() != 4 for parameter in network.parameters()):
        raise UserError(f"{key}: {name} is no convolutional network with a linear layer; choose convnet-DEPTH or resnetap-10")
    if has_batch_norm(network):
        raise UserError(
            f"{key}: {name} has batch norm, by which the images of a batch depend on each other; choose "
            "convnet-DEPTH or resnetap-10"
        )
    if constant:
        raise UserError(
            f"{key}: {name} has a layer ({constant}) that normalises maps of a single pixel for images of "
            f"{size} pixels, so all images look alike to it; choose a network with fewer layers"
        )


def as_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Images uint8 [N, C, H, W] after JPEG compression by Pillow, as published sets are stored."""
    found = []
    for image in pixels:
        buffer = io.BytesIO()
        to_pil(image).save(buffer, "JPEG", quality=quality)
        found.append(image_tensor(Image.open(buffer)))
    return torch.stack(found)


def image_tensor(image: Image.Image) -> Tensor:
    """An 8-bit grey or RGB image as uint8 [C, H, W]."""
    values = torch.from_numpy(np.array(image))
    return values[None] if values.dim() == 2 else values.permute(2, 0, 1)
