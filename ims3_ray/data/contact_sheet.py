"""Contact sheets: one picture that shows many images."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ims3_ray.data.transforms import to_pil, to_signed, to_uint8
from ims3_ray.io.parquet import encode_png

THUMBNAIL = 96
"""Largest length, in pixels, of the longer side of an image on a contact sheet."""


def contact_sheet(pixels_NCHW: torch.Tensor, columns: int, gap: int = 1) -> bytes:
    """One PNG with uint8 images in rows of ``columns`` on white. Images larger than a thumbnail are scaled down to one."""
    n, c, h, w = pixels_NCHW.shape
    if (larger := max(h, w) / THUMBNAIL) > 1:
        h, w = round(h / larger), round(w / larger)
        pixels_NCHW = to_uint8(F.interpolate(to_signed(pixels_NCHW), (h, w), mode="bicubic", antialias=True))
    rows = -(-n // columns)
    sheet = torch.full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels_NCHW):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[:, y : y + h, x : x + w] = image
    return encode_png(to_pil(sheet))
