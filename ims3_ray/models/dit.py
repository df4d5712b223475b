"""Diffusion transformer (DiT, Peebles & Xie 2023, arXiv 2212.09748) with adaLN-Zero conditioning.

DiT is implemented here rather than taken from diffusers because fine-tuning needs one label-drop decision per sample
(diffusers' module draws one per block) and one shared time/label embedding. Weights in diffusers' layout are read by
:mod:`ims3_ray.models.dit_files`.

Shape letters: B batch, C channels, H height, W width, T tokens, D width of the model.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class DiTConfig(BaseModel):
    """Shape of a DiT. It is stored in the metadata of the weights file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_size: int = Field(gt=0, description="height and width of the input (latent or image)")
    in_channels: int = Field(gt=0)
    patch_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_classes: int = Field(gt=0, description="the null label of classifier-free guidance is this number")
    learn_sigma: bool = Field(default=False, description="predict a variance beside the noise (as DiT-XL/2 does)")
    prediction: Literal["epsilon", "v"] = Field(default="epsilon", description="what it was trained to predict")
    null_row: bool = Field(
        default=True, description="whether the table of labels ends with a row for no class, as label dropout trains it"
    )

    @model_validator(mode="after")
    def _divisible(self) -> DiTConfig:
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads and of 4")
        return self

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def null_label(self) -> int:
        """The label for no class; without :attr:`null_row` the table does not hold it."""
        return self.num_classes

    @property
    def rows(self) -> int:
        """Number of rows in the table of labels."""
        return self.num_classes + self.null_row

    def forward_flops(self) -> int:
        """Floating-point operations (2 per multiply-add) of one forward pass of one sample."""
        width, tokens = self.hidden_size, self.num_tokens
        patch_values = self.patch_size**2
        per_token = self.depth * (12 * width**2 + 2 * tokens * width)
        per_token += patch_values * (self.in_channels + self.out_channels) * width
        per_sample = self.depth * 6 * width**2 + 2 * width**2 + (256 + width) * width
        return 2 * (tokens * per_token + per_sample)


def _published(depth: int, width: int, heads: int) -> DiTConfig:
    return DiTConfig(
        input_size=32, in_channels=4, patch_size=2, hidden_size=width, depth=depth, num_heads=heads, num_classes=1000,
        learn_sigma=True,
    )  # fmt: skip


PUBLISHED = {
    "S": _published(12, 384, 6),
    "B": _published(12, 768, 12),
    "L": _published(24, 1024, 16),
    "XL": _published(28, 1152, 16),
}
"""The published sizes with patch 2 on the latents of 256-pixel images (Peebles & Xie, Table 1)."""


def sincos_position_embedding(grid_size: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding ``[grid_size**2, dim]``: first half from columns, second from rows (DiT)."""

    def one_axis(position: Tensor) -> Tensor:
        omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
        angle = position.reshape(-1, 1) * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    axis = torch.arange(grid_size, dtype=torch.float64)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.cat([one_axis(columns), one_axis(rows)], dim=1).float()


def timestep_features(t_B: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features ``[B, dim]`` (cosines first) of integer or fractional timesteps ``[B]``."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angle = t_B.float()[:, None] * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return torch.addcmul(shift_BD[:, None], x_BTD, 1 + scale_BD[:, None])


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))


class DiTBlock(nn.Module):
    """Transformer block whose normalisations are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x_BTD: Tensor, condition_PD: Tensor) -> Tensor:
        """``condition_PD`` has one condition for each of P equal parts of the batch; the tokens of a part are modulated as one
        sequence."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_PD).chunk(6, dim=1)
        parts = (len(condition_PD), -1, x_BTD.shape[2])
        attended = self.attn(modulate(self.norm1(x_BTD).reshape(parts), shift1, scale1).reshape(x_BTD.shape))
        x_BTD = torch.addcmul(x_BTD.reshape(parts), gate1[:, None], attended.reshape(parts)).reshape(x_BTD.shape)
        mixed = self.mlp(modulate(self.norm2(x_BTD).reshape(parts), shift2, scale2))
        return torch.addcmul(x_BTD.reshape(parts), gate2[:, None], mixed).reshape(x_BTD.shape)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x_BTD: Tensor, condition_PD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_PD).chunk(2, dim=1)
        parts = (len(condition_PD), -1, x_BTD.shape[2])
        return self.linear(modulate(self.norm_final(x_BTD).reshape(parts), shift, scale)).reshape(*x_BTD.shape[:2], -1)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_features(t_B).to(dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class DiT(nn.Module):
    """Class-conditional noise predictor ε_θ(z_t, t, y).

    Parameter names are those of the DiT release, so its checkpoints load unchanged. ``model(z, t, y)`` takes ``z`` [B, C, H,
    W], ``t`` [B] (0 … 999) and ``y`` [B] (``config.null_label`` for "no class") and returns the predicted noise [B, C, H, W],
    or [B, 2C, H, W] with ``learn_sigma``. If the batch consists of P equal parts and the samples of a part share timestep and
    class, as in guided sampling, ``t`` and ``y`` may be [P]: conditions are then embedded and projected once per part. The
    module drops no labels; callers do: see :func:`ims3_ray.objectives.diffusion.drop_conditions`.
    """

    compute_dtype: torch.dtype | None = None
    """Type to which :meth:`forward` autocasts; None leaves autocasting to the caller."""
    recompute: bool = False
    """Whether the activations inside the blocks are discarded and computed again in the backward pass."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(c.in_channels, c.hidden_size, c.patch_size, c.patch_size)})
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        self.y_embedder = LabelEmbedder(c.rows, c.hidden_size)
        position = sincos_position_embedding(c.input_size // c.patch_size, c.hidden_size)
        self.register_buffer("pos_embed", position[None], persistent=False)
        self.blocks = nn.ModuleList([DiTBlock(c.hidden_size, c.num_heads) for _ in range(c.depth)])
        self.final_layer = FinalLayer(c.hidden_size, c.patch_size**2 * c.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as DiT does: every block starts as the identity, and the output starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder["proj"]
        for name, parameter in projection.named_parameters():
            nn.init.zeros_(parameter) if name == "bias" else nn.init.xavier_uniform_(parameter.flatten(1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def forward(self, z_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        with self._autocast(z_BCHW.device.type):
            tokens = self.x_embedder["proj"](z_BCHW.to(self._dtype)).flatten(2).transpose(1, 2) + self.pos_embed
            condition_PD = self.t_embedder(t_B.to(z_BCHW.device, non_blocking=True)) + self.y_embedder(y_B)
            for block in self.blocks:
                if self.recompute and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, condition_PD, use_reentrant=False)
                else:
                    tokens = block(tokens, condition_PD)
            return self._unpatchify(self.final_layer(tokens, condition_PD))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.x_embedder.parameters()).dtype

    def _autocast(self, device: str) -> AbstractContextManager[object]:
        return torch.autocast(device, self.compute_dtype) if self.compute_dtype else nullcontext()

    def _unpatchify(self, tokens_BTD: Tensor) -> Tensor:
        p, grid = self.config.patch_size, self.config.input_size // self.config.patch_size
        x = tokens_BTD.reshape(-1, grid, grid, p, p, self.config.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, grid * p, grid * p)
