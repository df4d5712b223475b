"""Augmentation of whole batches on the device that holds them: every image draws its own parameters.

Images are float [B, C, H, W] in [0, 1]; ``rng`` is a generator on their device, or on the CPU for draws that are the same for
every device. The distributions are those of torchvision's transforms of the same names, which process one image at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ims3_ray.data.siamese import Family, drawn_families, siamese

CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
LUMA = (0.299, 0.587, 0.114)
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components of ImageNet's colours, in [0, 1] (Krizhevsky et al. 2012); a row per colour."""
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class Scale:
    """The statistics by which images are normalised, each [C, 1, 1] or [1, 1, 1] on the device of the images."""

    mean: Tensor
    std: Tensor


def augment(
    images: Tensor, size: int, rng: Generator, *, cpu_rng: Generator, scale: Scale,
    rand_augment: tuple[int, int] | None = None, shuffle_patches: int = 1, crop: tuple[float, float] | None = None,
    max_shift: int = 0, flip: bool = False, jitter: float = 0.0, lighting: float = 0.0,
    dsa: Sequence[Family | Sequence[Family]] = (), dsa_every: bool = False,
) -> Tensor:  # fmt: skip
    """Apply the augmentations that are switched on, in the order of the config's ``augment`` keys; returns [B, C, size,
    size]. ``cpu_rng`` makes the choices that the host must know, so that it does not wait for the device; ``scale`` is that of
    the network that gets the images."""
    if rand_augment is not None:
        images = rand_augmented(images, *rand_augment, cpu_rng)
    if shuffle_patches > 1:
        images = shuffled_patches(images, shuffle_patches, rng)
    if crop is not None:
        images = random_resized_crop(images, size, crop, rng)
    images = resize(images, size)
    if max_shift:
        images = shifted(images, max_shift, rng)
    if flip:
        images = mirrored(images, rng)
    if jitter:
        images = jittered(images, jitter, rng)
    if lighting:
        images = lit(images, lighting, rng)
    if dsa:
        entries = dsa if dsa_every else [[entry for entry in dsa if isinstance(entry, str)]]
        families = drawn_families(entries, cpu_rng)
        images = siamese((images - scale.mean) / scale.std, families, rng) * scale.std + scale.mean
    return images


def rand_augmented(images: Tensor, operations: int, magnitude: int, rng: Generator) -> Tensor:
    """Each image after ``operations`` random operations of torchvision's RandAugment. ``rng`` is a generator on the CPU."""
    from torchvision.transforms.v2 import RandAugment

    transform = RandAugment(num_ops=operations, magnitude=magnitude)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's own generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return torch.stack([transform(image) for image in images])


def resize(images: Tensor, size: int) -> Tensor:
    """The square images scaled to ``size``, with antialiasing; unchanged if they have this size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def padded(images: Tensor, size: int | None) -> Tensor:
    """The images in the centre of images of ``size``, surrounded by zeros; equal to ``images`` if they are not smaller or
    ``size`` is None.

    The strides of grey images are those of [B, 1, H, W]. Operations before may have left those of [B, H, W, 1], which is the
    same memory, but makes convolutions on a CPU return ``channels_last`` tensors, on which PyTorch's group norm is slow.
    """
    more = max(0, (size or 0) - images.shape[-1])
    images = F.pad(images, (more // 2, more - more // 2) * 2) if more else images
    return images[:, 0][:, None] if images.shape[1] == 1 else images


@cache
def constant(table: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A table of numbers as a tensor. It is sent to the device only once, because sending makes the host wait."""
    return torch.tensor(table, device=device, dtype=dtype)


def uniform(count: int, low: float, high: float, rng: Generator) -> Tensor:
    """Uniform numbers between ``low`` and ``high``, float32 [count], on the device of ``rng``."""
    return torch.rand(count, generator=rng, device=rng.device) * (high - low) + low


def shuffled_patches(images: Tensor, parts: int, rng: Generator) -> Tensor:
    """Each image cut into ``parts`` strips of columns, which are shuffled, then likewise into strips of rows, as in RDED's
    code. Of the 24 arrangements of 2 × 2 patches this reaches 4. Images whose size is not divisible are resampled first."""
    B, C, H, _ = images.shape
    side = -(-H // parts)
    images = F.interpolate(images, (side * parts, side * parts), mode="bilinear") if side * parts != H else images
    tiles = images.reshape(B, C, parts, side, parts, side).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.rand(2, B, parts, generator=rng, device=rng.device).argsort(dim=2).to(images.device)
    tiles = tiles[torch.arange(B, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(B, C, side * parts, side * parts)


def crop_boxes(
    count: int, height: int, width: int, scale: tuple[float, float], rng: Generator, ratio: tuple[float, float] = CROP_RATIO
) -> Tensor:
    """The boxes of RandomResizedCrop in whole pixels, int64 [count, 4]: top, left, height, width."""
    shape = (CROP_TRIES, count)
    low, high = map(math.log, ratio)
    area = uniform(CROP_TRIES * count, *scale, rng).reshape(shape) * height * width
    aspect = uniform(CROP_TRIES * count, low, high, rng).reshape(shape).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.float().argmax(dim=0)  # the first try that fits
    found = fits.any(dim=0)
    pick = torch.arange(count, device=rng.device)
    # If no try fits: the largest box of an allowed ratio, in the centre.
    most_h, most_w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    h, w = torch.where(found, h[first, pick], most_h), torch.where(found, w[first, pick], most_w)
    top = (torch.rand(count, generator=rng, device=rng.device) * (height - h + 1)).long()
    left = (torch.rand(count, generator=rng, device=rng.device) * (width - w + 1)).long()
    top, left = torch.where(found, top, (height - h) // 2), torch.where(found, left, (width - w) // 2)
    return torch.stack([top, left, h, w], dim=1)


def random_resized_crop(images: Tensor, size: int, scale: tuple[float, float], rng: Generator) -> Tensor:
    """A random box of each image, scaled (bilinear) to ``size`` × ``size``."""
    B, _, H, W = images.shape
    return cropped(images, crop_boxes(B, H, W, scale, rng), size)


def cropped(images: Tensor, boxes_B4: Tensor, size: int) -> Tensor:
    """The box (top, left, height, width) of each image, scaled (bilinear, edges repeated) to ``size`` × ``size``."""
    H, W = images.shape[-2:]
    top, left, h, w = boxes_B4.to(images).unbind(dim=1)
    centre = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size

    def inside(first: Tensor, length: Tensor, whole: int) -> Tensor:
        """Positions of the output pixels in grid_sample's coordinates (−1 … 1), clamped to the centres of the box's own
        pixels."""
        at = first[:, None] + (centre * length[:, None]).clamp(min=0.5).minimum(length[:, None] - 0.5)
        return 2 * at / whole - 1

    y, x = inside(top, h, H), inside(left, w, W)
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def shifted(images: Tensor, max_shift: int, rng: Generator) -> Tensor:
    """Each image shifted by up to ``max_shift`` pixels in both directions, edges repeated."""
    B, _, H, W = images.shape
    padded = F.pad(images, (max_shift,) * 4, mode="replicate")
    offset = torch.randint(2 * max_shift + 1, (2, B), generator=rng, device=rng.device).to(images.device)
    rows = offset[0][:, None] + torch.arange(H, device=images.device)
    columns = offset[1][:, None] + torch.arange(W, device=images.device)
    which = torch.arange(B, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirrored(images: Tensor, rng: Generator) -> Tensor:
    """Each image mirrored horizontally with probability one half."""
    chosen = torch.rand(len(images), generator=rng, device=rng.device).to(images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def jittered(images: Tensor, strength: float, rng: Generator) -> Tensor:
    """Brightness, contrast and saturation of each image changed by factors from 1 ± ``strength``, in a random order per image.

    Each change blends the image with a degenerate one: black, the mean grey of the image, or the image in grey. Values are not
    clamped to [0, 1], as in the code of IDC and Minimax and unlike torchvision's.
    """
    B, C = images.shape[:2]
    factors = uniform(3 * B, 1 - strength, 1 + strength, rng).reshape(3, B, 1, 1, 1).to(images)
    drawn = torch.randint(len(ORDERS), (B,), generator=rng, device=rng.device).to(images.device)
    orders = constant(ORDERS, images.device, torch.int64)[drawn]
    for turn in orders.T:
        which = turn[:, None, None, None]
        factor = factors[turn, torch.arange(B, device=images.device)]
        luma = grey(images)
        degenerate = torch.where(which == 0, 0.0, torch.where(which == 1, luma.mean(dim=(2, 3), keepdim=True), luma))
        images = factor * images + (1 - factor) * degenerate.expand(-1, C, -1, -1)
    return images


def grey(images: Tensor) -> Tensor:
    """Luminance [B, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    return (images * constant(LUMA, images.device, images.dtype).reshape(3, 1, 1)).sum(dim=1, keepdim=True)


def lit(images: Tensor, std: float, rng: Generator) -> Tensor:
    """AlexNet's colour noise: a normal multiple of each principal component of ImageNet's colours, one draw per image."""
    alpha = torch.randn(len(images), 3, generator=rng, device=rng.device) * std
    vectors, values = (constant(table, images.device, images.dtype) for table in (EIGENVECTORS, EIGENVALUES))
    return images + (alpha.to(images) @ (vectors * values).T)[:, :, None, None]


def cutmix(images: Tensor, rng: Generator) -> tuple[Tensor, Tensor, float]:
    """CutMix (Yun et al. 2019) with one box and one permutation for the batch, the box's share from Beta(1, 1).

    Returns the mixed images, the permutation [B] of the images that fill the box, and the share of each image that is still its
    own. ``rng`` is a generator on the CPU, so that nothing here waits for the device.
    """
    B, _, H, W = images.shape
    lam, y, x = torch.rand(3, generator=rng).tolist()
    side = math.sqrt(1 - lam)
    half_h, half_w, cy, cx = int(H * side) // 2, int(W * side) // 2, int(y * H), int(x * W)
    top, bottom = max(cy - half_h, 0), min(cy + half_h, H)
    left, right = max(cx - half_w, 0), min(cx + half_w, W)
    order = torch.randperm(B, generator=rng).to(images.device, non_blocking=True)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return mixed, order, 1 - (bottom - top) * (right - left) / (H * W)
