"""The clean images or latents z_0 that fine-tuning draws its batches from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from ims3_ray.data.transforms import to_signed


class CleanImages:
    """Labelled z_0 in memory: pixels, or latents drawn from their cached moments. With ``flip`` they are mirrored at random.

    ``tensors`` hold either ``pixels`` (uint8 [n, C, H, W]) or ``mean`` and ``log_variance`` ([n, flips, C, h, w] each).
    ``captions`` are the texts of the images, if they have any.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], labels: Tensor, flip: bool, captions: Sequence[str] | None = None
    ) -> None:  # fmt: skip
        self.tensors, self.labels, self.flip, self.captions = tensors, labels, flip, captions
        self.shape = next(iter(tensors.values())).shape[-3:]
        if captions is not None and len(captions) != len(labels):
            raise ValueError(f"{len(captions)} captions of {len(labels)} images")

    def captions_of(self, index: Tensor) -> list[str | None]:
        """The caption of each of the images at ``index``; None for images without captions."""
        return [None if self.captions is None else self.captions[position] for position in index.tolist()]

    def batch(self, index: Tensor, rng: Generator) -> Tensor:
        """z_0 [n, C, H, W] of the images at ``index``, float32. Random numbers are drawn from ``rng`` for all of these
        images."""
        mirror = torch.rand(len(index), generator=rng) < 0.5 if self.flip else torch.zeros(len(index), dtype=torch.bool)
        if "pixels" in self.tensors:
            signed = to_signed(self.tensors["pixels"][index])
            return torch.where(mirror[:, None, None, None], signed.flip(-1), signed)
        mean, log_variance = (self.tensors[name][index, mirror.long()].float() for name in ("mean", "log_variance"))
        return sample_latents(mean, log_variance, torch.randn(mean.shape, generator=rng))


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A sample of latents with this mean and log-variance, given standard normal ``noise``."""
    return mean + (0.5 * log_variance).exp() * noise
