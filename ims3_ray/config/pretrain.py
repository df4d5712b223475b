"""Training of the weights that a distillation starts from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ims3_ray.config.base import Fraction, Section, Text, with_length
from ims3_ray.config.candidates import SamplingConfig
from ims3_ray.config.evaluation import EncoderTraining, ProtocolConfig
from ims3_ray.config.finetune import TrainerConfig
from ims3_ray.config.work import ClusterConfig, DataConfig, TrackingConfig

MOST_PATCHES = 64
"""Largest number of patches of an image if the config does not give their size."""
GROUPS = 8
"""Number of groups of channels that an autoencoder normalises together."""


class GeneratorTraining(Section):
    """Pretraining of a class-conditional DiT on pixels or, with an `autoencoder`, on its latents."""

    patch_size: int | None = Field(default=None, gt=0)
    """Side of the square patches in pixels or latents; it divides the side of the images. When unset, it is the smallest side
    that gives at most 64 patches, from 2 on for pixels: 4 for images of 28 or 32 pixels, 1 for latents of 7 or 8."""
    hidden_size: int = Field(default=224, gt=0)
    """Width of the transformer."""
    depth: int = Field(default=4, gt=0)
    """Number of transformer blocks."""
    num_heads: int = Field(default=4, gt=0)
    """Number of attention heads of each block; it divides the width."""
    prediction: Literal["epsilon", "v"] = "epsilon"
    """Quantity that the generator learns to predict: the noise ε (`epsilon`) or the velocity (`v`)."""
    min_snr: float | None = Field(default=None, gt=0)
    """γ of min-SNR weighting, which gives timesteps with little noise a smaller weight in the loss; no weighting when unset."""
    steps: int | None = Field(default=None, ge=1)
    """Number of steps. It is an alternative to `minutes`."""
    minutes: float | None = Field(default=30.0, gt=0)
    """Time for as many steps as fit into it, used when `steps` is not set. The number of steps then depends on the machine, so
    that a second training does not give the same weights."""
    batch_size: int = Field(default=128, ge=1)
    """Number of images per step, over all workers."""
    lr: float = Field(default=6e-4, gt=0)
    """Learning rate of AdamW."""
    warmup: Fraction = 0.05
    """Share of the training, at its start, over which the learning rate rises linearly from zero."""
    cooldown: Fraction = 0.25
    """Share of the training, at its end, over which the learning rate falls linearly to zero."""
    label_dropout: Fraction = 0.1
    """Share of the images whose label is replaced by "no class", which guidance needs."""
    ema_decay: Fraction = 0.999
    """Decay per step of the moving average of the weights, which is what is written."""
    flip: bool = False
    """Whether each image is mirrored with probability one half."""
    checkpoint_every: int = Field(default=250, ge=1)
    """Number of steps between two checkpoints."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the arithmetic; `auto` is bf16 on devices that compute it natively, and fp32 on others, on which bf16
    is several times slower."""
    compile: bool = False
    """Whether each transformer block is compiled with torch.compile. All blocks share one compilation, which pays off after
    some minutes of GPU work. On one GPU a compiled step is also captured as a CUDA graph, which saves the time that the host
    needs to launch its kernels."""

    @model_validator(mode="before")
    @classmethod
    def _the_given_length(cls, values: Any) -> Any:
        """With ``steps`` alone, ``minutes`` is null."""
        return with_length(values, "steps", "minutes")

    @model_validator(mode="after")
    def _one_length(self) -> GeneratorTraining:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("set one of steps and minutes, and leave the other out")
        return self

    def patch_side(self, size: int, latents: bool = False) -> int:
        """Side of the patches of images of ``size`` × ``size`` pixels or latents."""
        if self.patch_size is not None:
            return self.patch_size
        sides = range(1 if latents else 2, size + 1)
        return next(side for side in sides if size % side == 0 and (size // side) ** 2 <= MOST_PATCHES)


class AutoencoderTraining(Section):
    """Training of an autoencoder, diffusers' AutoencoderKL, in whose latent space a generator can be trained. It minimises the
    mean absolute error of the pixels plus `kl` times the divergence of the latents from a normal distribution."""

    widths: tuple[int, ...] = Field(default=(32, 64, 64), min_length=1)
    """Channels of each level of the network, from the pixels to the latents; each level but the first halves the side of the
    images. Each is a multiple of 8."""
    layers: int = Field(default=1, ge=1)
    """Number of residual blocks of each level of the encoder; the decoder has one more."""
    latent_channels: int = Field(default=4, ge=1)
    """Number of channels of the latents."""
    kl: float = Field(default=1e-4, ge=0)
    """Weight of the Kullback-Leibler divergence, which is a mean over the values of the latents."""
    epochs: int = Field(default=20, ge=1)
    """Number of passes over the training images."""
    batch_size: int = Field(default=128, ge=1)
    """Number of images in the global batch, over all workers."""
    lr: float = Field(default=1e-3, gt=0)
    """Largest learning rate of AdamW, which rises to it over 30 % of the steps and then falls (one cycle)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    flip: bool = False
    """Whether each image is mirrored with probability one half."""

    @model_validator(mode="after")
    def _groups(self) -> AutoencoderTraining:
        if any(width < 1 or width % GROUPS for width in self.widths):
            raise ValueError(f"widths={list(self.widths)} must be multiples of {GROUPS}")
        return self


class QualityConfig(Section):
    """How a trained generator is judged: a student that was trained on the real training split classifies its samples."""

    preview_minutes: float = Field(default=5.0, gt=0)
    """Minutes between two sheets of samples while a generator is trained."""

    images_per_class: int = Field(default=100, ge=1)
    """Number of samples of each class that are judged."""
    sampling: SamplingConfig = SamplingConfig()
    judge: ProtocolConfig | None = ProtocolConfig(width=64, epochs=8, batch_size=128, validations=1)
    """Protocol of the judge; the first of its students is trained on the real training split. With null there is no judge, and
    the card shows samples alone."""
    threads: int = Field(default=2, ge=1)
    """Number of PyTorch threads of the judge."""

    @model_validator(mode="after")
    def _steered_by_nothing(self) -> QualityConfig:
        if (steering := self.sampling.steering) is not None:
            raise ValueError(
                f"sampling.{steering.name}.{steering.switch} steers by real images, which no judge does; set it to 0"
            )
        return self


class PretrainConfig(Section):
    """Training of the weights that a distillation starts from (`ims3 pretrain`)."""

    name: str = Field(default="fashion-mnist-dit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The weights go to {storage}/{name}/{name}.safetensors."""
    storage: Text = "runs/pretrain"
    """Folder that holds the weights and the state of the training; all nodes of the training have to reach it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all random numbers of the training."""
    target: Literal["generator", "encoder", "autoencoder"] = "generator"
    """What is trained: the generator, the encoder φ, or an autoencoder for generators of latents."""
    data: DataConfig = DataConfig()
    autoencoder: Text | None = None
    """Autoencoder in whose latent space the generator is trained; pixels when unset. A file that `ims3 pretrain` made, a folder
    of diffusers or a hub id."""
    generator: GeneratorTraining = GeneratorTraining()
    encoder: EncoderTraining = EncoderTraining()
    autoencoding: AutoencoderTraining = AutoencoderTraining()
    quality: QualityConfig = QualityConfig()
    trainer: TrainerConfig = TrainerConfig(num_workers=1, threads_per_worker=2)
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _latents_of_a_generator(self) -> PretrainConfig:
        if self.autoencoder is not None and self.target != "generator":
            raise ValueError(f"autoencoder={self.autoencoder} is for target=generator, and target={self.target} takes none")
        return self

    @model_validator(mode="after")
    def _an_image_for_each_worker(self) -> PretrainConfig:
        name = "autoencoding" if self.target == "autoencoder" else self.target
        size, workers = getattr(self, name).batch_size, self.trainer.most_workers
        if size < workers:
            raise ValueError(f"{name}.batch_size={size} is too small for {workers} workers; raise it or lower the other")
        return self
