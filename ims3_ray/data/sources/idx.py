"""The IDX files of MNIST and of data sets in the same format."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ims3_ray.data.sources.base import Source, check_labels, numbered
from ims3_ray.data.sources.location import Location
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place


class IdxSource(Source):
    """The IDX files of MNIST and of data sets in the same format (`train-images-idx3-ubyte[.gz]` and so on)."""

    name, order = "idx", 10

    @classmethod
    def find(cls, place: Location) -> Source | None:
        files = cls.files_of(place.children, place.split)
        return cls(place.path, *files) if files else None

    def __init__(self, location: str, images: Place, labels: Place, names: Place | None = None) -> None:
        self.location, self.files = location, [images, labels]
        try:
            self._pixels, self.labels = _read_idx(images), _read_idx(labels).astype(np.int64)
        except (OSError, struct.error, ValueError, EOFError, zlib.error) as error:
            raise UserError(f"IDX file in '{location}' cannot be read ({error}); fetch it again") from error
        for file, values, dimensions in ((images, self._pixels, 3), (labels, self.labels, 1)):
            if values.ndim != dimensions and not (dimensions == 3 and values.ndim == 4 and values.shape[-1] == 3):
                raise UserError(f"IDX file '{file.name}' in '{location}' has {values.ndim} dimensions instead of {dimensions}")
        if len(self._pixels) != len(self.labels):
            raise UserError(f"IDX files in '{location}' hold {len(self._pixels)} images but {len(self.labels)} labels")
        if names is not None:
            self.class_names = tuple(names.lines())
        elif "fashion" in str(Path(images.path).resolve().parent).lower() and self._pixels.shape in FASHION_MNIST_SHAPES:
            self.class_names = FASHION_MNIST_CLASSES
        else:
            self.class_names = numbered(self.labels)
        check_labels(location, self.labels, self.class_names)

    @staticmethod
    def files_of(folder: Sequence[Place], split: str) -> tuple[Place, Place, Place | None] | None:
        """The files of images, labels and class names among the files of a folder; None if images or labels are missing."""
        prefix = {"test": "t10k"}.get(split, split)
        patterns = (f"{prefix}-images*ubyte*", f"{prefix}-labels*ubyte*", "classes.txt")
        images, labels, names = ([file for file in folder if file.is_file and fnmatch(file.name, p)] for p in patterns)
        return (images[0], labels[0], names[0] if names else None) if images and labels else None

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def stored(self, index: int) -> bytes:
        return self._pixels[index].tobytes()

    def identify(self, index: int) -> str:
        return f"{self.files[0].name}[{index}]"


def _read_idx(file: Place) -> NDArray[np.uint8]:
    raw = io.BytesIO(file.read())
    with gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw as stream:
        _, kind, dims = struct.unpack(">HBB", stream.read(4))
        if kind != 8:
            raise ValueError(f"{file.name} holds values of kind {kind:#x}, only unsigned bytes are read")
        shape = struct.unpack(f">{dims}I", stream.read(4 * dims))
        values = stream.read(math.prod(shape) + 1)  # one byte more shows an excess; a small file may unpack to far more
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


FASHION_MNIST_SHAPES = ((60_000, 28, 28), (10_000, 28, 28))
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
