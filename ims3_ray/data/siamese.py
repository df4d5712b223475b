"""Differentiable Siamese augmentation (DSA, Zhao & Bilen 2021): augmentations that real and synthetic images can share.

Images are float [B, C, H, W] in any range; published methods apply DSA to normalised images, whose mean colour is 0. Every
augmentation is differentiable in the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Family = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
"""A family of augmentations: `color` changes brightness, saturation and contrast, `crop` shifts, `cutout` covers a square."""

MAX_SHIFT, CUTOUT = 0.125, 0.5
"""Largest shift, and side of the square of `cutout`, as shares of the image's side."""
MAX_SCALE, MAX_ANGLE = 1.2, 15.0
"""Largest factor of `scale` (the least is its inverse), and largest angle of `rotate` in degrees."""

Draw = Callable[[], Tensor]
"""Draws uniform numbers in [0, 1), one for each image or one for all: float [B] or [1]."""


def drawn_families(entries: Sequence[Family | Sequence[Family]], rng: Generator) -> list[Family]:
    """The families of a batch: of each entry that is a list of families, one of them, all with the same probability. ``rng``
    is a generator on the CPU."""
    return [entry if isinstance(entry, str) else entry[int(torch.randint(len(entry), (), generator=rng))] for entry in entries]


def siamese(images: Tensor, families: Sequence[Family], rng: Generator, alike: bool = False) -> Tensor:
    """``images`` after the augmentations of all ``families``, in their order.

    With ``alike`` all images share the random draws; two calls with generators of the same state then augment their images
    identically, whatever their numbers. Otherwise every image draws for itself. ``rng`` may be on another device.
    """
    count = 1 if alike else len(images)

    def draw() -> Tensor:
        return torch.rand(count, generator=rng, device=rng.device).to(images.device, images.dtype)

    for family in families:
        images = _AUGMENTATIONS[family](images, draw)
    return images


def _color(images: Tensor, draw: Draw) -> Tensor:
    """Brightness shifted by up to 0.5; saturation multiplied by up to 2; contrast multiplied by 0.5 to 1.5."""
    images = images + (_per_image(draw()) - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * _per_image(draw())) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_per_image(draw()) + 0.5) + mean


def _crop(images: Tensor, draw: Draw) -> Tensor:
    """Shifted by up to an eighth of the side in both directions; 0 appears at the edges."""
    B, _, H, W = images.shape
    most = [int(side * MAX_SHIFT + 0.5) for side in (H, W)]
    top, left = (((2 * shift + 1) * draw()).long().expand(B) for shift in most)
    padded = F.pad(images, (most[1], most[1], most[0], most[0]))
    rows = top[:, None] + torch.arange(H, device=images.device)
    columns = left[:, None] + torch.arange(W, device=images.device)
    which = torch.arange(B, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, draw: Draw) -> Tensor:
    """A square of half the side, centred anywhere in the image, is set to 0."""

    def covered(side: int) -> Tensor:
        length = int(side * CUTOUT + 0.5)
        first = ((side + 1 - length % 2) * draw()).long()[:, None] - length // 2
        places = torch.arange(side, device=images.device)
        return (places >= first) & (places < first + length)

    rows, columns = covered(images.shape[2]), covered(images.shape[3])
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(images: Tensor, draw: Draw) -> Tensor:
    """Mirrored horizontally with probability one half."""
    return torch.where(_per_image(draw()) < 0.5, images.flip(3), images)


def _scale(images: Tensor, draw: Draw) -> Tensor:
    """Height and width scaled about the centre by independent factors from 1/1.2 to 1.2."""
    low = 1 / MAX_SCALE
    x, y = (draw() * (MAX_SCALE - low) + low for _ in range(2))
    zero = torch.zeros_like(x)
    return _warped(images, [[x, zero], [zero, y]])


def _rotate(images: Tensor, draw: Draw) -> Tensor:
    """Rotated about the centre by up to 15 degrees."""
    angle = (2 * draw() - 1) * math.radians(MAX_ANGLE)
    return _warped(images, [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])


def _warped(images: Tensor, matrix: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sampled (bilinear) at positions multiplied by a 2 × 2 matrix of draws; 0 outside of the image."""
    theta = torch.stack([torch.stack([*row, torch.zeros_like(row[0])], dim=1) for row in matrix], dim=1)
    grid = F.affine_grid(theta.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


_AUGMENTATIONS: dict[Family, Callable[[Tensor, Draw], Tensor]] = {
    "color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate,
}  # fmt: skip
