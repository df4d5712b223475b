"""Training of a timm network as a classifier, for φ or for a teacher: the code of one worker.

:func:`ims3_ray.engine.loops.encoder_loop` runs it on Ray Train; without Ray it needs only PyTorch and timm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.config import EncoderTraining, canonical
from ims3_ray.data.augment import Scale, augment
from ims3_ray.data.transforms import to_signed
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.training.epochs import EpochTrainer, Wrap

Images = tuple[Tensor, Tensor, tuple[str, ...]]
"""uint8 pixels [N, C, H, W], positions of their classes [N], and the names of the classes."""


class Classifier(nn.Module):
    """φ with its classification head as ``forward``, which is the method that DistributedDataParallel supports."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder.logits(x_BCHW)


def encoder_config(training: EncoderTraining, pixels: Tensor, num_classes: int) -> EncoderConfig:
    """The network that ``training`` asks for, with the mean and standard deviation of the ``pixels``, scaled to [−1, 1]. It
    scales images of other sizes to theirs, since it recognises little at a size that it was not trained at."""
    counts = sum(part.flatten().bincount(minlength=256) for part in pixels.split(1000))
    values = to_signed(torch.arange(256, dtype=torch.uint8)).double()
    shares = counts / pixels.numel()  # from the histogram, to avoid a copy of all images in floats
    mean = (shares * values).sum().item()
    std = (shares * (values - mean).square()).sum().sqrt().item()
    return EncoderConfig(
        model=training.model, model_args=training.model_args, channels=pixels.shape[1], num_classes=num_classes,
        mean=round(mean, 4), std=round(std, 4), size=pixels.shape[-1],
    )  # fmt: skip


class EncoderTrainer(EpochTrainer[EncoderTraining]):
    """A classifier in training. ``wrap`` prepares it for several workers (DistributedDataParallel)."""

    setting = "the learning rate (encoder.lr, evaluation.teacher.training.lr)"

    def __init__(
        self, config: EncoderTraining, images: Images, seed: int, device: torch.device | str = "cpu", rank: int = 0,
        world: int = 1, wrap: Wrap | None = None,
    ) -> None:  # fmt: skip
        self.pixels, labels, self.names = images
        torch.manual_seed(seed_for(seed, "encoder-init"))
        self.encoder = Encoder(encoder_config(config, self.pixels, len(self.names)))
        super().__init__(config, Classifier(self.encoder), labels, seed, device, rank, world, wrap)
        shape = self.encoder.config
        mean, std = (torch.tensor(value).reshape(-1, 1, 1).to(self.device) for value in (shape.mean, shape.std))
        self.scale = Scale((mean + 1) / 2, std / 2)  # of pixels in [0, 1]

    @property
    def trained(self) -> nn.Module:
        return self.encoder

    def loss(self, index: Tensor) -> Tensor:
        """Cross-entropy of augmented images."""
        e = self.config
        rng = torch.Generator(self.device).manual_seed(seed_for(self.seed, "encoder", self.steps, self.rank))
        cpu_rng = generator_for(self.seed, "encoder-choices", self.steps, self.rank)
        images = self.pixels[index].to(self.device).float() / 255
        batch = augment(images, self.pixels.shape[-1], rng, cpu_rng=cpu_rng, scale=self.scale, **dict(e.augment))
        labels = self.labels[index].to(self.device)
        return F.cross_entropy(self.wrapped(2 * batch - 1), labels, label_smoothing=e.label_smoothing)

    def weights(self) -> bytes:
        return pack(self.encoder, canonical(self.encoder.config), "encoder", torch.float16, classes="\n".join(self.names))
