"""What the report shows of images."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from ims3_ray.data.contact_sheet import contact_sheet


def opened(sheet: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sheet)))


def test_small_images_lie_on_the_sheet_as_they_are():
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    sheet = opened(contact_sheet(images, columns=2))
    assert sheet.shape == (26, 17, 3)
    assert (sheet[9:17, 9:17] == images[3].permute(1, 2, 0).numpy()).all()
    assert (sheet[18:, 9:] == 255).all()


def test_large_images_become_thumbnails():
    images = torch.zeros(2, 3, 256, 192, dtype=torch.uint8)
    images[1, 0] = 200
    sheet = opened(contact_sheet(images, columns=1))
    assert sheet.shape == (193, 72, 3)
    assert (sheet[:96] == 0).all()
    assert (np.abs(sheet[97:].astype(int) - [200, 0, 0]) <= 1).all()
