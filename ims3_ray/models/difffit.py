"""DiffFit (Xie et al. 2023, arXiv 2304.06648): train biases, norms, label embedding and scale vectors γ only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ims3_ray.models.dit import DiT

TRAINABLE = ("bias", "norm", "gamma", "y_embed")
"""A parameter is trained iff its name contains one of these (the rule Minimax and IMS3 use)."""


def _scaled_modules(model: DiT, blocks: int) -> Iterator[nn.Module]:
    for block in list(model.blocks)[:blocks]:
        attention = block.get_submodule("attn")
        yield from (attention.get_submodule("qkv"), attention.get_submodule("proj"), attention, block.get_submodule("mlp"))


def _apply_gamma(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * module.get_parameter("gamma")


def add_difffit(model: DiT, scaled_blocks: int) -> list[str]:
    """Add scale vectors γ, initialised to one, to the first ``scaled_blocks`` blocks and freeze all parameters that are not
    trained. Returns the names of the trained parameters.

    In a block of width D, γ has 3D values for the qkv output, D for the projection, and D for each of the two branches. At
    initialisation, the model computes the same function as before.
    """
    for module in _scaled_modules(model, scaled_blocks):
        linear = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
        module.register_parameter("gamma", nn.Parameter(linear.weight.new_ones(linear.out_features)))
        module.register_forward_hook(_apply_gamma)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINABLE))
        if parameter.requires_grad:
            trained.append(name)
    return trained


@torch.no_grad()
def merge_adapter(model: DiT, adapter: dict[str, Tensor]) -> None:
    """Load an adapter into a plain pretrained ``model`` with each γ folded into the weights before it.

    The result has the same parameters and cost as the pretrained model, and computes the fine-tuned function.
    """
    plain = {name: tensor for name, tensor in adapter.items() if not name.endswith("gamma")}
    model.load_state_dict({**model.state_dict(), **plain})
    for i, block in enumerate(model.blocks):
        folds = {"attn.qkv": ["attn.qkv"], "attn.proj": ["attn.proj", "attn"], "mlp.fc2": ["mlp"]}
        for target, owners in folds.items():
            linear = block.get_submodule(target)
            for owner in owners:
                gamma = adapter.get(f"blocks.{i}.{owner}.gamma")
                if gamma is not None:
                    linear.get_parameter("weight").mul_(gamma[:, None])
                    linear.get_parameter("bias").mul_(gamma)
