"""Training of the weights that a distillation starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ims3_ray.config.base import Fraction, Section
from ims3_ray.config.candidates import SamplingConfig
from ims3_ray.config.evaluation import EncoderTraining, ProtocolConfig
from ims3_ray.config.finetune import TrainerConfig
from ims3_ray.config.work import ClusterConfig, DataConfig


class GeneratorTraining(Section):
    """Pretraining of a class-conditional DiT in pixel space."""

    patch_size: int = Field(default=4, gt=0)
    hidden_size: int = Field(default=224, gt=0)
    depth: int = Field(default=4, gt=0)
    num_heads: int = Field(default=4, gt=0)
    prediction: Literal["epsilon", "v"] = "epsilon"
    """Quantity that the generator learns to predict: the noise ε (`epsilon`) or the velocity (`v`)."""
    steps: int = Field(default=6000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=6e-4, gt=0)
    warmup_steps: int = Field(default=300, ge=0)
    cooldown_steps: int = Field(default=1500, ge=0)
    """Number of steps at the end, over which the learning rate falls linearly to zero."""
    label_dropout: Fraction = 0.1
    ema_decay: Fraction = 0.999
    flip: bool = False
    checkpoint_every: int = Field(default=250, ge=1)
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    """Whether each transformer block is compiled with torch.compile. All blocks share one compilation, which pays off after
    some minutes of GPU work."""


class QualityConfig(Section):
    """How a trained generator is judged: a student that was trained on the real training split classifies its samples."""

    images_per_class: int = Field(default=100, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    judge: ProtocolConfig = ProtocolConfig(width=64, epochs=8, batch_size=128, validations=1)
    """Protocol of the judge; the first of its students is trained on the real training split."""
    threads: int = Field(default=2, ge=1)


class PretrainConfig(Section):
    """Training of the weights that a distillation starts from (`jobs/pretrain.py`)."""

    name: str = Field(default="fashion-mnist-dit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: str = "runs/pretrain"
    seed: int = Field(default=0, ge=0)
    target: Literal["generator", "encoder"] = "generator"
    data: DataConfig = DataConfig()
    generator: GeneratorTraining = GeneratorTraining()
    encoder: EncoderTraining = EncoderTraining()
    quality: QualityConfig = QualityConfig()
    trainer: TrainerConfig = TrainerConfig(num_workers=1, threads_per_worker=2)
    cluster: ClusterConfig = ClusterConfig()
