"""The augmented batches of a set on which a student is trained, and which a teacher labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ims3_ray.config import ProtocolConfig
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.data.augment import Scale, augment, cutmix
from ims3_ray.errors import UserError
from ims3_ray.seeds import generator_for, seed_for

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNTED_ABOVE = 2**26
"""Number of values; of more, mean and standard deviation are computed from the counts of the 256 values, since the values as
floating-point numbers would take four times the memory. They agree to seven digits."""
SHARED_SEED = 42
"""Seed of the batches that all students share because their labels are stored; it is that of SRe2L's code."""


class Batch(NamedTuple):
    images: Tensor
    """Images in [0, 1] after augmentation and CutMix, float32 [B, C, H, W]."""
    members: Tensor
    """Position of each image in the set, int64 [B]."""
    order: Tensor | None
    """Permutation of the batch whose images fill the box of CutMix; None without CutMix."""
    share: float
    """Share of each image that is still its own."""


def epochs_and_batch_size(protocol: ProtocolConfig, labels: Tensor) -> tuple[int, int]:
    """Number of epochs and of images in a batch for a set with these labels [N]. Where they depend on the images per class, the
    largest class counts; a batch never has more images than the set."""
    ipc = int(labels.bincount().max())
    return for_ipc(protocol.epochs, ipc), min(for_ipc(protocol.batch_size, ipc), len(labels))


def scale_of(pixels: Tensor, protocol: ProtocolConfig, real: tuple[Tensor, Tensor] | None = None) -> Scale:
    """The statistics by which a protocol normalises the images of a set, uint8 [N, C, H, W], as values in [0, 1]. ``real`` are
    the mean and standard deviation of the real training pixels, [C, 1, 1] each.

    Raises :class:`UserError` for a set of one grey value, and ``ValueError`` if the protocol needs ``real`` and it is None.
    """
    if protocol.normalise == "real":
        if real is None:
            raise ValueError("normalise: real needs the statistics of the real images")
        return Scale(*real)
    if protocol.normalise == "imagenet":
        return Scale(*(torch.tensor(values).reshape(-1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)))
    mean, std = (value.reshape(1, 1, 1) for value in mean_and_std(pixels))
    if not std > 0:
        raise UserError("all pixels of the set have the same value, so students learn nothing from it; look at its images")
    return Scale(mean, std)


def mean_and_std(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all values of uint8 images, as values in [0, 1]."""
    if pixels.numel() <= COUNTED_ABOVE:
        scaled = pixels.float() / 255
        return scaled.mean(), scaled.std()
    counts = sum(part.flatten().int().bincount(minlength=256) for part in pixels.split(1000)).double()
    values = torch.arange(256, device=pixels.device, dtype=torch.float64) / 255
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1)
    return mean.float(), variance.sqrt().float()


class AugmentedBatches:
    """The batches of a protocol, drawn anew for every epoch.

    By default the seed is a student's, and the random numbers are those of the device. With ``shared`` an epoch depends on its
    number alone and its random numbers are drawn on the CPU, so that it is the same for all students and, but for rounding, on
    all devices.
    """

    def __init__(
        self, pixels: Tensor, protocol: ProtocolConfig, batch_size: int, scale: Scale, seed: int, device: str,
        shared: bool = False,
    ) -> None:  # fmt: skip
        """``pixels`` uint8 [N, C, H, W] of the size at which students take images, on the device or on the host."""
        self.protocol, self.batch_size, self.shared = protocol, batch_size, shared
        self.pixels, self.device, self.scale = pixels, device, Scale(scale.mean.to(device), scale.std.to(device))
        self.cpu_rng = generator_for(seed, "student")
        self.rng = torch.Generator(device).manual_seed(seed_for(seed, "student-augment"))

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, on the device. ``number`` counts from 0."""
        if self.shared:
            self.cpu_rng = generator_for(SHARED_SEED, "labelled", number)
            self.rng = generator_for(SHARED_SEED, "labelled-augment", number)
        for index in torch.randperm(len(self.pixels), generator=self.cpu_rng).split(self.batch_size):
            yield self._batch(index)

    def _batch(self, index: Tensor) -> Batch:
        p, cpu_rng, size = self.protocol, self.cpu_rng, self.pixels.shape[-1]
        members = index.to(self.device, non_blocking=True)
        chosen = self.pixels[index.to(self.pixels.device, non_blocking=True)]
        images = chosen.to(self.device, non_blocking=True).float() / 255
        images = augment(images, size, self.rng, cpu_rng=cpu_rng, scale=self.scale, **dict(p.augment))
        order, share = None, 1.0
        if p.cutmix == 1 or (p.cutmix and torch.rand((), generator=cpu_rng).item() < p.cutmix):
            images, order, share = cutmix(images, cpu_rng)
        return Batch(images, members, order, share)
