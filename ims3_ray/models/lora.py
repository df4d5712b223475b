"""LoRA (Hu et al. 2021, arXiv 2106.09685): a trained product of two small matrices beside each frozen weight of attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ims3_ray.seeds import generator_for

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of diffusers' attention."""


def projections(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that get LoRA, with their names."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS):
            yield name, module


def add_lora(network: nn.Module, rank: int) -> list[str]:
    """Add to each projection W the product of ``lora_up`` [out, rank], which starts as zero, and ``lora_down`` [rank, in],
    which starts at random, always with the same values. All other parameters are frozen. Returns the names of the trained ones.

    At initialisation, the network computes the same function as before.
    """
    network.requires_grad_(False)
    names = []
    for number, (name, module) in enumerate(projections(network)):
        device = module.weight.device
        down = torch.randn(rank, module.in_features, generator=generator_for(0, "lora", number)) / rank
        module.register_parameter("lora_down", nn.Parameter(down.to(device)))
        module.register_parameter("lora_up", nn.Parameter(torch.zeros(module.out_features, rank, device=device)))
        module.register_forward_hook(_add_product)
        names += [f"{name}.lora_down", f"{name}.lora_up"]
    return names


def _add_product(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added = linear(linear(args[0], module.get_parameter("lora_down")), module.get_parameter("lora_up"))
    return output + added.to(output.dtype)


@torch.no_grad()
def merge_lora(network: nn.Module, adapter: Mapping[str, Tensor]) -> None:
    """Add the trained products to the weights of a plain ``network``, which then computes the fine-tuned function at no
    additional cost."""
    for name, module in projections(network):
        up, down = (adapter[f"{name}.{part}"].to(module.weight.device) for part in ("lora_up", "lora_down"))
        module.weight += (up @ down).to(module.weight.dtype)
