"""The clean images or latents z_0 that the training of a generator draws its batches from."""

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

    @classmethod
    def of_pixels(cls, pixels: Tensor, labels: Tensor, flip: bool = False) -> CleanImages:
        """Images as uint8 pixels [n, C, H, W]."""
        return cls({"pixels": pixels}, labels, flip)

    def to(self, device: torch.device) -> CleanImages:
        """The same images in the memory of a device, which must be that of the generators given to :meth:`batch`."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return CleanImages(tensors, self.labels.to(device), self.flip, self.captions)

    def captions_of(self, index: Tensor) -> list[str | None]:
        """The caption of each of the images at ``index``; None for images without captions."""
        return [None if self.captions is None else self.captions[position] for position in index.tolist()]

    def batch(self, index: Tensor, rng: Generator) -> Tensor:
        """z_0 [n, C, H, W] of the images at ``index``, float32. Random numbers are drawn from ``rng`` for all of these
        images."""
        device, mirror = rng.device, None
        if self.flip:
            mirror = torch.rand(len(index), generator=rng, device=device) < 0.5
        if "pixels" in self.tensors:
            signed = to_signed(self.tensors["pixels"][index])
            return signed if mirror is None else torch.where(mirror[:, None, None, None], signed.flip(-1), signed)
        flips = torch.zeros(len(index), dtype=torch.long, device=device) if mirror is None else mirror.long()
        mean, log_variance = (self.tensors[name][index, flips].float() for name in ("mean", "log_variance"))
        return sample_latents(mean, log_variance, torch.randn(mean.shape, generator=rng, device=device))


def sample_latents(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A sample of latents with this mean and log-variance, given standard normal ``noise``."""
    return mean + (0.5 * log_variance).exp() * noise
