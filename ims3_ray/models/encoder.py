"""φ: the frozen feature encoder, a timm network behind a fixed normalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ims3_ray.models.checkpoints import load_into, read_metadata


class EncoderConfig(BaseModel):
    """What has to be known to build φ; stored in the metadata of its weights file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    model_args: dict[str, Any] = {}
    channels: int
    num_classes: int
    mean: float
    std: float


class Encoder(nn.Module):
    """Images in [−1, 1], [B, C, H, W], to ℓ2-normalised pooled features φ(x) [B, D] (section 4.2)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        import timm

        self.config = config
        self.network = timm.create_model(
            config.model, in_chans=config.channels, num_classes=config.num_classes, **config.model_args
        )

    @property
    def dim(self) -> int:
        return int(self.network.num_features)

    def _features(self, x_BCHW: Tensor) -> Tensor:
        return self.network.forward_features((x_BCHW - self.config.mean) / self.config.std)

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Class scores [B, num_classes] of the head φ was trained with."""
        return self.network.forward_head(self._features(x_BCHW))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pooled = self.network.forward_head(self._features(x_BCHW), pre_logits=True)
        return torch.nn.functional.normalize(pooled, dim=1)


def encoder_config(path: Path) -> EncoderConfig:
    return EncoderConfig.model_validate(json.loads(read_metadata(path, "encoder")["config"]))


def load_encoder(path: Path) -> Encoder:
    """φ with the weights of ``path``, frozen and in evaluation mode."""
    encoder = Encoder(encoder_config(path))
    load_into(encoder, path)
    return encoder.eval().requires_grad_(False)
