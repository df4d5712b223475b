"""The interface of a source of labelled images, and :func:`open_source`, which finds the source that can read a path.

Every source gives the number of images, their classes, and the image at an index. Opening a source decodes no image.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ims3_ray.component import Component, Registry
from ims3_ray.data.classes import composed, repeated
from ims3_ray.data.sources.location import Location
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place, concurrently, is_remote
from ims3_ray.io.listing import Listing

LONGEST_NAME = 200
"""Largest length of a class name in bytes; class names become folder names."""
HASH_WHOLE_BELOW = 256 * 2**20
"""Files that have fewer bytes in total are fingerprinted by all of them, others by names, sizes and pieces."""
PIECES, PIECE_BYTES = 64, 2**16
"""Number and length of the pieces, at even distances over all files of a large set, that its fingerprint covers."""


class Source(Component, ABC):
    """A labelled image set. ``labels`` [N] index ``class_names``; indices run over the whole set."""

    registry = Registry["type[Source]"]("data source", "ims3_ray.data.sources")
    order: ClassVar[int] = 0
    """Sources try to read a path in ascending order of this number."""
    version: ClassVar[int] = 1
    """Version of the images and their order. It is raised when they change for the same files, so that images which an older
    version has decoded are not used."""

    location: str
    """The path that was given."""
    asked: tuple[str, str] = ("", "")
    """Path and split with which :func:`open_source` opened the set."""
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    files: Sequence[Place] = ()
    """The files that hold the image set."""
    notices: Sequence[str] = ()
    """What a user should know of the image set, such as files that are not read; one sentence each."""

    @classmethod
    @abstractmethod
    def find(cls, place: Location) -> Source | None:
        """The image set at ``place``; None if this kind of source cannot read it. Raises :class:`UserError` for a damaged
        set."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The decoded image; raises :class:`~ims3_ray.data.decoding.Undecodable` for one that cannot be decoded."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process that is sent the source opens it again."""
        return open_source, self.asked

    @property
    def unlimited(self) -> Source:
        """The image set with all its images."""
        return self

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes when classes, labels or files change. It covers the bytes of the files; of large sets and of sets
        on object storage their names and sizes, and pieces of their bytes: a set that is made anew has another one, but one
        image that is replaced by another of the same size may not be noticed."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode() + self.labels.tobytes())
        files, whole = Listing.of(self.files), hashed_whole(self)
        for index, (path, size) in enumerate(files.rows()):
            digest.update(f"{path.rpartition('/')[2]} {size}\n".encode())
            if whole:
                digest.update(files[index].read())
        if not whole:
            for piece in concurrently(lambda place: place[0].read_piece(*place[1:]), pieces(files)):
                digest.update(piece)
        return digest.hexdigest()[:16]

    @property
    def folders(self) -> AbstractSet[str]:
        """Paths of the folders of the classes, with all links followed, if each class has one on this machine's disks."""
        return frozenset()

    def stored(self, index: int) -> bytes | None:
        """The image as the set's files hold it: images that are equal in these bytes are copies of each other. None for sets in
        which copies are not looked for."""
        return None

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        """Number of bytes of each image in its file; None if that is not known without reading the images."""
        return None

    @abstractmethod
    def identify(self, index: int) -> str:
        """A name by which a person can find the image."""

    def extras(self, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Other values of these images: ``logits`` [n, num_classes] and ``weights`` [n]; empty if the set has neither."""
        return {}

    def texts(self, column: str) -> Sequence[str | None] | None:
        """The text of each image, if it has one, in a column of the set's own files; None if there is no such column of
        texts."""
        return None


SLACK = 0.02
"""How far numbers that were rounded may lie beyond what they should be."""


def check_logits(logits: NDArray[np.float32], path: str) -> None:
    """Raises :class:`UserError` for soft labels [N, num_classes] that are not finite, or that are no logits."""
    if not np.isfinite(logits).all():
        raise UserError(f"'{path}' holds soft labels that are no finite floating-point numbers; save logits")
    if (logits >= 0).all() and (np.abs(logits.sum(axis=1) - 1) < SLACK).all():
        raise UserError(f"'{path}' holds probabilities, which would be taken for logits; save their logarithms")


class Subset(Source):
    """The images of another source at ``indices``, in the order of that source."""

    def __init__(self, whole: Source, indices: NDArray[np.int64]) -> None:
        self.whole, self.indices = whole, np.sort(indices)
        self.location, self.class_names, self.labels = whole.location, whole.class_names, whole.labels[self.indices]
        self.files, self.notices = whole.files, whole.notices

    @classmethod
    def find(cls, place: Location) -> Source | None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return Subset, (self.whole, self.indices)

    @property
    def unlimited(self) -> Source:
        return self.whole.unlimited

    def image(self, index: int) -> Image.Image:
        return self.whole.image(int(self.indices[index]))

    def stored(self, index: int) -> bytes | None:
        return self.whole.stored(int(self.indices[index]))

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        return None if (sizes := self.whole.sizes) is None else sizes[self.indices]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.whole.fingerprint.encode() + self.indices.tobytes()).hexdigest()[:16]

    def identify(self, index: int) -> str:
        return self.whole.identify(int(self.indices[index]))

    def extras(self, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        return self.whole.extras(self.indices[list(indices)].tolist())

    def texts(self, column: str) -> Sequence[str | None] | None:
        found = self.whole.texts(column)
        return None if found is None else [found[index] for index in self.indices.tolist()]


def first_of_each(whole: Source, limit: int) -> NDArray[np.int64]:
    """The first ``limit`` images of each class."""
    return np.concatenate([np.flatnonzero(whole.labels == label)[:limit] for label in range(len(whole.class_names))])


def set_apart(whole: Source, share: float, tested: bool) -> NDArray[np.int64]:
    """The images of each class that are set apart for testing, a ``share`` of them and at least one, or (not ``tested``) the
    others. The hashes of their names choose, so that images that are added later move few others from one part to the
    other. Raises :class:`UserError` for a class of one image."""
    found = []
    for label, name in enumerate(whole.class_names):
        mine = np.flatnonzero(whole.labels == label)
        if len(mine) == 1:
            raise UserError(f"class '{name}' of '{whole.location}' has one image, of which none can be set apart")
        hashed = [hashlib.sha256(whole.identify(index).encode()).digest() for index in mine.tolist()]
        order = np.array(sorted(range(len(mine)), key=hashed.__getitem__), np.int64)
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        found.append(mine[order[:count] if tested else order[count:]])
    return np.concatenate(found)


def _from_anywhere(path: str) -> str:
    """``path`` for other processes, whose working folders differ: a local one is made absolute."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def open_source(path: str, split: str, limit: int | None = None, apart: tuple[float, bool] | None = None) -> Source:
    """The image set at ``path`` (``embedded:NAME``, a folder, a Parquet file, a URI of either or a hub id), of one ``split``;
    with ``apart`` one of the two parts of :func:`set_apart`; with a ``limit`` the first so many images of each class.

    Raises :class:`UserError` if there is nothing readable at the path or no image in the set.
    """
    place = Location(path, split)
    for kind in sorted(Source.registry.values(), key=lambda kind: kind.order):
        if (source := kind.find(place)) is not None:
            source.asked = _from_anywhere(path), split
            if (names := spelled(path, source.class_names)) != source.class_names:
                source.class_names = names
            if len(source.labels) == 0:
                raise UserError(f"data source '{path}' (split '{split}') holds no image; check the path and data.*_split")
            if apart is not None:
                whole, source = source, Subset(source, set_apart(source, *apart))
                if apart[1]:
                    used = f"{len(source.labels)} of {len(whole.labels)} images of '{path}' are set apart for testing"
                    if others := [f"'{name}'" for name in place.splits if name != split]:
                        used += f" (data.test_share); its split {' and '.join(others)} is not used"
                    source.notices = (*whole.notices, used)
            if limit is None or np.bincount(source.labels).max() <= limit:
                return source
            few = Subset(source, first_of_each(source, limit))
            used = f"{len(few.labels)} of {len(source.labels)} images of '{path}' are used, at most {limit} a class"
            few.notices = (*source.notices, used)
            return few
    there, splits = "", place.split_folders
    if splits:
        there = f"; it has the splits {', '.join(splits)}: set data.train_split and data.test_split (for ims3 pack: split)"
    if splits == ["train"]:
        there = "; it has the split train alone: put other images into a folder 'test' beside it, or set data.test_share=0.2"
    alike = [file.name for file in place.nearby if file.is_file and fnmatch(file.name, f"{split}*.parquet")]
    if alike:
        there = f"; '{alike[0]}' is not read as a part of '{split}': call it {split}.parquet or {split}-00000-of-00001.parquet"
    raise UserError(
        f"data source '{path}' holds neither IDX files, nor {split}.parquet or parts of it, nor one folder per class"
        f"{', nor images.pt with labels.pt (a set)' if split == 'train' else ''} for split '{split}'{there}"
    )


def pieces(files: Listing) -> list[tuple[Place, int, int]]:
    """(file, first byte, number of bytes) of pieces at even distances over all bytes of the files."""
    ends = np.cumsum(files.sizes)
    last = max(0, int(ends[-1]) - PIECE_BYTES) if len(files) else 0
    found = []
    for start in np.unique(np.linspace(0, last, PIECES).astype(np.int64)).tolist():
        number = int(np.searchsorted(ends, start, side="right"))
        if number < len(files):  # all bytes are before its end
            found.append((files[number], start - int(ends[number] - files.sizes[number]), PIECE_BYTES))
    return found


def hashed_whole(source: Source) -> bool:
    """Whether the fingerprint covers the bytes of the source's files."""
    return int(Listing.of(source.files).sizes.sum()) < HASH_WHOLE_BELOW and not is_remote(source.location)


def numbered(labels: NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def check_labels(location: str, labels: NDArray[np.int64], class_names: Sequence[str]) -> None:
    outside = np.unique(labels[(labels < 0) | (labels >= len(class_names))])
    if len(outside):
        raise UserError(
            f"data source '{location}' names {len(class_names)} classes but has images labelled {int(outside[0])}; "
            "labels count from 0, so name every class or correct the labels"
        )


def spelled(location: str, names: Iterable[str]) -> tuple[str, ...]:
    """The class names in the composed form of Unicode, so that names are equal that look so.

    Raises :class:`UserError` for names that cannot be names of folders, lines of files and keys of tables.
    """
    class_names = tuple(composed(name) if isinstance(name, str) else name for name in names)
    for name in class_names:
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"data source '{location}' has a class called {str(name)[:40]!r}; names must be printable text of at most "
                f"{LONGEST_NAME} bytes"
            )
    if (twice := repeated(class_names)) is not None:
        raise UserError(f"data source '{location}' has two classes called '{twice}'; give each a name of its own")
    return class_names
