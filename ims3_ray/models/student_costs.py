"""What a student costs, counted on networks without weights: operations and memory."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ims3_ray.models.students import Norm, build_student


@cache
def forward_flops(name: str, channels: int, size: int, num_classes: int, norm: Norm, width: int) -> float:
    """Floating-point operations of one forward pass of one image, counted on a network without weights."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_student(name, channels, size, num_classes, norm, width).eval()(torch.zeros(1, channels, size, size))
    return float(counter.get_total_flops())


@cache
def training_bytes(name: str, channels: int, size: int, num_classes: int, norm: Norm, width: int) -> tuple[int, int]:
    """Bytes of a student's weights, and of what a training step keeps of each image for the backward pass, in float32; counted
    on a network without weights."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[id(tensor)] = tensor
        return tensor

    images = 2  # layers of batch norm take no single image
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network = build_student(name, channels, size, num_classes, norm, width)
        network(torch.zeros(images, channels, size, size))
    weights = {id(weight): weight.nbytes for weight in network.parameters()}
    of_images = sum(tensor.nbytes for key, tensor in kept.items() if key not in weights)
    return sum(weights.values()), of_images // images
