"""φ: a classifier of timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ims3_ray.config import canonical
from ims3_ray.data.transforms import to_signed
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.encoder import Encoder, EncoderConfig, embedding_cost, load_encoder
from ims3_ray.plan.estimate import scaled
from ims3_ray.pretraining.by_epochs import EpochTarget
from ims3_ray.pretraining.quality import Quality, Splits
from ims3_ray.stages.teacher import check_training, shape_in_training


class EncoderTarget(EpochTarget):
    """The training of an encoder as a classifier. The accuracy of its own head on the test split judges it."""

    name, section, loop_name = "encoder", "encoder", "encoder_loop"

    def check(self) -> None:
        _ = self.flops  # counted on a network that is built for it
        check_training(self.config.encoder, self.config.data.channels, self.classes, "encoder")

    @property
    def network(self) -> str:
        return f"{self.config.encoder.model} of timm, {scaled(self.flops)}FLOP per image forwards"

    @property
    def judging(self) -> str:
        return "its own classification head on the test split"

    def judge(self, weights: Path, splits: Splits, device: str) -> Quality:
        torch.set_num_threads(self.config.quality.threads)
        pixels, labels = splits.test
        encoder = load_encoder(weights).to(device)
        with torch.inference_mode():
            parts = [encoder.logits(to_signed(part.to(device))).argmax(dim=1).cpu() for part in pixels.split(500)]
        share = 100 * (torch.cat(parts) == labels).float().mean().item()
        line = f"its classification head: {share:.1f} % on the test split; features have {encoder.dim} dimensions"
        return Quality([line])

    def untrained(self, names: Sequence[str]) -> bytes:
        encoder = Encoder(self._shape)
        return pack(encoder, canonical(encoder.config), "encoder", torch.float16, classes="\n".join(names))

    @property
    def _shape(self) -> EncoderConfig:
        data = self.config.data
        return shape_in_training(self.config.encoder, data.channels, self.classes, data.size)

    @property
    def flops(self) -> float:
        return embedding_cost(self._shape.model_dump_json(), self.config.data.size)[0]
