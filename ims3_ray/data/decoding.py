"""Decodes encoded images from untrusted sources to 8-bit pixels, whatever mode and bit depth the file has.

docs/data.md lists what is read and how.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are decoded. Pillow reads others too, some of them by starting other programs."""
MOST_PIXELS = 100_000_000
"""Largest number of pixels of an image: a small file may declare any number, for which memory would be allocated."""
READ = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes of 8-bit images that are converted to grey or RGB."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Value of the orientation → what makes the image upright."""


class Undecodable(OSError):
    """An image that is there but cannot be decoded. It is left out and counted, while any other error of reading a file ends
    the work, since the file may be readable again."""


def decode(encoded: bytes) -> Image.Image:
    """The image in ``encoded`` as a viewer shows it: turned as its EXIF data say, with 16 bits scaled to 8. Of an animation it
    is the first frame. Its mode is ``L`` if it is grey, ``RGBA`` if pixels of it are transparent, else ``RGB``.

    Raises :class:`Undecodable` if the image is truncated, if the bytes are no image, or if its values have no known range.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise Undecodable(f"{image.width}×{image.height} pixels are more than {MOST_PIXELS:,}")
        image.load()
        return _as_8_bits(_upright(image), image.format)
    except UnidentifiedImageError as error:
        raise Undecodable(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for broken files
        raise Undecodable(str(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    """``image`` turned and mirrored as its EXIF orientation says. EXIF data that cannot be read are ignored."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises errors of many kinds for damaged EXIF data, and the pixels need none of these data
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _as_8_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """``image`` in mode ``L`` if it is grey, in mode ``RGBA`` if it has transparent pixels, else in mode ``RGB``.

    16-bit grey values are divided by 257, and floating-point values from 0 to 1 are multiplied by 255. Raises
    :class:`Undecodable` for other floating-point values and for integers of more than 16 bits, since nobody knows which of
    them is white, and for colours that are not RGB, CMYK or YCbCr.
    """
    if image.mode == "F" or image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return _from_deep_grey(image)
    if image.mode not in READ:
        raise Undecodable(f"its pixels are of Pillow's mode {image.mode}, which has no known conversion to 8 bits")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        opaque = whole.getchannel("A").getextrema()[0] == 255
        return whole.convert("RGB") if opaque else whole
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    most = 1 if image.mode == "F" else 65_535
    if not (0 <= low <= high <= most):  # also true for values that are not numbers
        raise Undecodable(f"its values reach from {low:g} to {high:g}, and only values from 0 to {most} are read")
    return Image.fromarray((values * (255 / most)).round().astype(np.uint8))
