"""Labelled image sets, wherever they lie: embedded, IDX files, Parquet in the Hub's layout, folders of images.

Every source answers the same few questions: how many images, of which classes, and the encoded or raw image at
an index. Opening one reads names and labels only.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from ims3_ray.data.decoding import decode
from ims3_ray.data.files import Place, check_bucket, is_remote
from ims3_ray.errors import UserError
from ims3_ray.models.hub import fetch, is_hub_id

LONGEST_NAME = 200
"""Bytes of a class's name, which names a folder."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
EMBEDDED_PREFIX = "embedded:"
SPLIT_NAMES = {"train", "test", "val", "valid", "validation"}
LISTINGS = 16
"""Folders that are listed at a time: object storage answers slowly."""
HASH_WHOLE_BELOW = 256 * 2**20  # files larger than this in sum are fingerprinted by name and size


class ImageSource(Protocol):
    """A labelled image set. ``labels`` [N] index ``class_names``; indices run over the whole set."""

    location: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    files: list[Place]

    def image(self, index: int) -> Image.Image:
        """The decoded image; raises ``OSError`` for one that cannot be decoded."""

    def identify(self, index: int) -> str:
        """A name by which a person finds the image again."""


def open_source(path: str, split: str) -> ImageSource:
    """The image set at ``path`` (``embedded:NAME``, a folder, a Parquet file, a URI of either or a hub id), of one ``split``.

    Raises :class:`UserError` if nothing readable lies there or it holds no image.
    """
    source = _find(path, split)
    if len(source.labels) == 0:
        raise UserError(f"data source '{path}' (split '{split}') holds no image; check the path and data.*_split")
    return source


def fingerprint(source: ImageSource) -> str:
    """Hash that changes when classes, labels or files do: of the files' bytes, or of names and sizes for large sets and for
    those on object storage."""
    digest = hashlib.sha256(json.dumps(source.class_names).encode() + source.labels.tobytes())
    whole = sum(file.size for file in source.files) < HASH_WHOLE_BELOW and not is_remote(source.location)
    for file in source.files:
        digest.update(f"{file.name} {file.size}\n".encode())
        if whole:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _find(path: str, split: str) -> ImageSource:
    if path.startswith(EMBEDDED_PREFIX):
        return _open_embedded(path, split)
    check_bucket(path)
    root = Place.at(path)
    if not root.exists and is_hub_id(path):
        root = Place.at(str(fetch(path, [f"{split}*.parquet", f"*/{split}*.parquet"], "data source", "dataset")))
    if not root.exists:
        raise UserError(f"data source '{path}' does not exist; set data.path to a folder, a Parquet file or embedded:NAME")
    if root.is_file:
        return ParquetSource(path, [root])
    children = root.children()
    if idx := IdxSource.files_of(children, split):
        return IdxSource(path, *idx)
    folders = {child.name: child for child in children if child.is_folder}
    nearby = [*children, *itertools.chain(*_each(Place.children, list(folders.values())))]
    parquet = [file for file in nearby if file.is_file and fnmatch(file.name, f"{split}*.parquet")]
    if parquet:
        return ParquetSource(path, parquet)
    if split in folders:
        return FolderSource(path, folders[split])
    if folders and not set(folders) & SPLIT_NAMES:  # without folders per split the whole folder is one
        return FolderSource(path, root)
    raise UserError(
        f"data source '{path}' holds neither IDX files, nor {split}*.parquet, nor one folder per class for split '{split}'"
    )


def embedded_names() -> list[str]:
    """Names that may follow ``embedded:``."""
    folder = resources.files("ims3_ray.data") / "embedded"
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("_"))


def _open_embedded(path: str, split: str) -> ImageSource:
    name = path.removeprefix(EMBEDDED_PREFIX)
    file = Path(str(resources.files("ims3_ray.data") / "embedded" / name / f"{split}.parquet"))
    if not file.is_file():
        raise UserError(f"no embedded data set '{name}' with split '{split}'; there is: {', '.join(embedded_names())}")
    return ParquetSource(path, [Place.at(str(file))])


class IdxSource:
    """The IDX files of MNIST and its kin (`train-images-idx3-ubyte[.gz]` and so on)."""

    def __init__(self, location: str, images: Place, labels: Place, names: Place | None = None) -> None:
        self.location, self.files = location, [images, labels]
        try:
            self._pixels, self.labels = _read_idx(images), _read_idx(labels).astype(np.int64)
        except (OSError, struct.error, ValueError, EOFError, zlib.error) as error:
            raise UserError(f"IDX file in '{location}' cannot be read ({error}); fetch it again") from error
        if len(self._pixels) != len(self.labels):
            raise UserError(f"IDX files in '{location}' hold {len(self._pixels)} images but {len(self.labels)} labels")
        if names is not None:
            self.class_names = tuple(name.strip() for name in names.read().decode().splitlines() if name.strip())
        elif "fashion" in str(Path(images.path).resolve().parent).lower():
            self.class_names = FASHION_MNIST_CLASSES
        else:
            self.class_names = _numbered(self.labels)
        _check_labels(location, self.labels, self.class_names)

    @staticmethod
    def files_of(folder: Sequence[Place], split: str) -> tuple[Place, Place, Place | None] | None:
        """Images, labels and names of the classes among the files of a folder."""
        prefix = {"test": "t10k"}.get(split, split)
        patterns = (f"{prefix}-images*ubyte*", f"{prefix}-labels*ubyte*", "classes.txt")
        images, labels, names = ([file for file in folder if file.is_file and fnmatch(file.name, p)] for p in patterns)
        return (images[0], labels[0], names[0] if names else None) if images and labels else None

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def identify(self, index: int) -> str:
        return f"{self.files[0].name}[{index}]"


class ParquetSource:
    """Parquet files in the Hub's image layout: ``image: {bytes, path}`` (the column may have another name, such as ``img``) and
    an integer ``label`` with ClassLabel names."""

    def __init__(self, location: str, files: Sequence[Place]) -> None:
        self.location, self.files = location, list(files)
        try:
            opened = [_open_parquet(file) for file in self.files]
            image = _image_column(opened[0].schema_arrow)
            tables = [file.read(columns=[image, "label"]).select([image, "label"]) for file in opened]
        except Exception as error:  # pyarrow raises many kinds; each means the same to the user
            raise UserError(f"Parquet data source '{location}' cannot be read: {str(error).splitlines()[0]}") from error
        for file, table in zip(self.files, tables, strict=True):
            held, label = (table.schema.field(name).type for name in (image, "label"))
            if not (_holds_images(held) and pa.types.is_integer(label)):
                raise UserError(
                    f"Parquet file '{file.path}' holds {image}: {held}, label: {label}; what is read is the Hub's image "
                    "layout, image: struct<bytes, path> and label: an integer"
                )
            if table["label"].null_count:
                raise UserError(f"Parquet file '{file.path}' has {table['label'].null_count} rows without a label; remove them")
        self.labels = np.concatenate([t["label"].to_numpy().astype(np.int64) for t in tables])
        self._bytes = [t[image].combine_chunks().field("bytes") for t in tables]
        self._starts = np.cumsum([0, *(t.num_rows for t in tables)])
        self.class_names = class_names_of(tables[0].schema.metadata) or _numbered(self.labels)
        _check_labels(location, self.labels, self.class_names)

    def image(self, index: int) -> Image.Image:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return decode(self._bytes[part][index - int(self._starts[part])].as_py())

    def identify(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.files[part].name} row {index - int(self._starts[part])}"


def _open_parquet(file: Place) -> pq.ParquetFile:
    """Of this machine's files only the pages that are looked at are read; others are held in memory."""
    if isinstance(file.filesystem, fs.LocalFileSystem):
        return pq.ParquetFile(file.path, memory_map=True)
    return pq.ParquetFile(file.path, filesystem=file.filesystem)


def _holds_images(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _image_column(schema: pa.Schema) -> str:
    """``image``, or the first column that holds encoded images."""
    others = [name for name in schema.names if _holds_images(schema.field(name).type)]
    return "image" if "image" in schema.names or not others else str(others[0])


class FolderSource:
    """One folder per class, named by the class; images anywhere below it."""

    def __init__(self, location: str, folder: Place) -> None:
        self.location, self._folder = location, folder
        classes = sorted((child for child in folder.children() if child.is_folder), key=lambda child: child.name)
        self.class_names = tuple(child.name for child in classes)
        found = _each(_images_below, classes)
        self.files = [file for files in found for file in files]
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files in found]).astype(np.int64)
        _check_names(location, self.class_names)

    def image(self, index: int) -> Image.Image:
        return decode(self.files[index].read())

    def identify(self, index: int) -> str:
        return self.files[index].path[len(self._folder.path) + 1 :]


def _each(look: Callable[[Place], list[Place]], folders: Sequence[Place]) -> list[list[Place]]:
    with ThreadPoolExecutor(LISTINGS) as pool:
        return list(pool.map(look, folders))


def _images_below(folder: Place) -> list[Place]:
    found = folder.children(recursive=True)
    return [file for file in found if file.is_file and Path(file.name).suffix.lower() in IMAGE_SUFFIXES]


def class_names_of(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """ClassLabel names in the ``huggingface`` schema metadata of a Parquet file, if it has them."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) else None


def _numbered(labels: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def _check_labels(location: str, labels: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
    _check_names(location, class_names)
    outside = np.unique(labels[(labels < 0) | (labels >= len(class_names))])
    if len(outside):
        raise UserError(
            f"data source '{location}' names {len(class_names)} classes but has images labelled {int(outside[0])}; "
            "labels count from 0, so name every class or correct the labels"
        )


def _check_names(location: str, class_names: tuple[str, ...]) -> None:
    """Names become names of folders, lines of files and keys of tables."""
    for name in class_names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"data source '{location}' has a class called {str(name)[:40]!r}; names must be printable text of at most "
                f"{LONGEST_NAME} bytes"
            )
    if len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if class_names.count(name) > 1)
        raise UserError(f"data source '{location}' has two classes called '{twice}'; give each a name of its own")


def _read_idx(file: Place) -> NDArray[np.uint8]:
    raw = io.BytesIO(file.read())
    with gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw as stream:
        _, kind, dims = struct.unpack(">HBB", stream.read(4))
        if kind != 8:
            raise ValueError(f"{file.name} holds values of kind {kind:#x}, only unsigned bytes are read")
        shape = struct.unpack(f">{dims}I", stream.read(4 * dims))
        values = stream.read(math.prod(shape) + 1)  # and not all that a small file may unpack to
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
