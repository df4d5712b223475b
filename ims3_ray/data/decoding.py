"""Decodes encoded images from untrusted sources to pixels."""

from __future__ import annotations

import io

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are decoded. Pillow reads others too, some of them by starting other programs."""
MOST_PIXELS = 100_000_000
"""Largest number of pixels of an image: a small file may declare any number, for which memory would be allocated."""


def decode(encoded: bytes) -> Image.Image:
    """The image in ``encoded``, fully decoded. Raises ``OSError`` if the image is truncated or the bytes are no image."""
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise OSError(f"{image.width}×{image.height} pixels are more than {MOST_PIXELS:,}")
        image.load()
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for some broken files
        raise OSError(str(error)) from error
    return image
