"""From decoded images to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image, size: int, channels: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """``image`` as uint8 ``[channels, size, size]``: shorter side scaled to ``size`` (area, then bicubic), centre cropped.

    Halving the image repeatedly before the final bicubic step is the preprocessing of ADM and DiT; it avoids aliasing.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        target = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[None].copy() if channels == 1 else pixels.transpose(2, 0, 1).copy()


def to_signed(pixels: Tensor) -> Tensor:
    """Convert uint8 values 0 … 255 to float32 values in [−1, 1], the range in which generators work."""
    return pixels.float() / 127.5 - 1


def to_uint8(signed: Tensor) -> Tensor:
    """Convert float values in [−1, 1] (values outside are clamped) to uint8, rounding to the nearest integer. Raises
    ``ValueError`` if a value is not finite."""
    if not signed.isfinite().all():
        raise ValueError("the generated images have values that are not finite; check the weights and the sampling settings")
    return ((signed.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(pixels_CHW: Tensor) -> Image.Image:
    """uint8 ``[1 or 3, H, W]`` as a Pillow image."""
    array = pixels_CHW.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
