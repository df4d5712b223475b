"""From decoded images to tensors and back."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ims3_ray.data.decoding import MOST_PIXELS, Undecodable

Filter = Literal["area", "bilinear"]
"""How images are scaled. ``area``: halved by averaging while they are at least twice too large, then bicubic, as for ADM and
DiT. ``bilinear``: with antialiasing, as by torchvision's Resize and CenterCrop, which is usual for classifiers."""


Colour = tuple[int, int, int]
"""Red, green and blue, from 0 to 255."""
WHITE: Colour = (255, 255, 255)


def is_transparent(image: Image.Image) -> bool:
    """Whether pixels of a decoded image are transparent."""
    return image.mode == "RGBA"


def opaque(image: Image.Image, channels: int, background: Colour = WHITE) -> Image.Image:
    """A decoded image in mode ``L`` (for 1 channel) or ``RGB``, laid on ``background`` where it is transparent."""
    if is_transparent(image):
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("L" if channels == 1 else "RGB")


def to_pixels(
    image: Image.Image, size: int, channels: int, filter: Filter = "area", background: Colour = WHITE
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """``image`` as uint8 ``[channels, size, size]``: laid on ``background``, shorter side scaled to ``size`` by ``filter``,
    centre cropped."""
    image = opaque(image, channels, background)
    while filter == "area" and min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != size:
        shorter = min(image.size)
        if filter == "area":
            target = [max(size, round(side * (size / shorter))) for side in image.size]
        else:
            target = [side * size // shorter for side in image.size]
        if target[0] * target[1] > MOST_PIXELS:
            raise Undecodable(f"its sides, {image.width} and {image.height} pixels, differ too much")
        image = image.resize(
            (target[0], target[1]), Image.Resampling.BICUBIC if filter == "area" else Image.Resampling.BILINEAR
        )
    margins = [side - size for side in image.size]
    left, top = (margin // 2 if filter == "area" else round(margin / 2) for margin in margins)
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


def scaled(signed_BCHW: Tensor, size: int) -> Tensor:
    """Images in [−1, 1] scaled to ``size`` × ``size`` by antialiased bicubic interpolation, as Pillow does it."""
    return interpolate(signed_BCHW.clamp(-1, 1), (size, size), mode="bicubic", antialias=True)


def to_pil(pixels_CHW: Tensor) -> Image.Image:
    """uint8 ``[1 or 3, H, W]`` as a Pillow image."""
    array = pixels_CHW.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
