"""Images that are there twice: in two splits, so that students know test images, or in two classes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources.base import Source, hashed_whole, pieces
from ims3_ray.errors import UserError
from ims3_ray.io.files import concurrently
from ims3_ray.io.listing import Listing


def shared_file(train: Source, test: Source) -> str | None:
    """A file or folder that two splits share, or a file of a split that is a copy of the other; None if they are different, as
    far as their files show."""
    one, other = train.unlimited, test.unlimited
    if (shared := Listing.of(test.files).first_shared(Listing.of(train.files))) is not None:
        return shared.path
    if (folder := _in_both(one.folders, other.folders) or _in_both(other.folders, one.folders)) is not None:
        return folder
    return test.files[0].path if train.files and _same_content(one, other) else None


def _in_both(folders: AbstractSet[str], others: AbstractSet[str]) -> str | None:
    """The first of ``folders`` that is one of ``others`` or in one."""
    return next((each for each in sorted(folders) if {each, *map(str, Path(each).parents)} & others), None)


def _same_content(one: Source, other: Source) -> bool:
    """Whether two sets have the same classes and labels, and equal files, whatever their names are. Of sets of which not all
    bytes are read (:func:`hashed_whole`), pieces of the files are compared."""
    files = Listing.of(one.files), Listing.of(other.files)
    if one.class_names != other.class_names or not np.array_equal(one.labels, other.labels):
        return False
    if not np.array_equal(files[0].sizes, files[1].sizes):
        return False
    if hashed_whole(one) and hashed_whole(other):
        return all(mine.read() == theirs.read() for mine, theirs in zip(*files, strict=True))
    read = (concurrently(lambda piece: piece[0].read_piece(*piece[1:]), pieces(each)) for each in files)
    return next(read) == next(read)


def check_apart(train: Source, other: Source, path: str, split: str) -> None:
    """Raises :class:`UserError` if another split has training images."""
    if shared := shared_file(train, other):
        raise UserError(
            f"the {split} split of '{path}' holds the training images ('{shared}'), so accuracies on it would mean nothing; "
            "put images that are not trained on into a folder of their own (train/ and test/ side by side), name them with "
            "data.test_path, or set a share of all images apart, as in data.test_share=0.2"
        )


class Copies(NamedTuple):
    """Numbers of images that are there twice."""

    in_test: int
    """Number of test images that are training images too."""
    in_two_classes: int
    """Number of training images that another class has too."""


def find_copies(train: Source, test: Source, names: Collection[str] | None = None) -> Copies:
    """Images whose bytes in their files are equal (:meth:`Source.stored`), among those of the classes called ``names`` or of
    all classes. Nothing is found in sets of which not all bytes are read (:func:`hashed_whole`). Of files, only those are read
    whose size another one has."""
    if not (hashed_whole(train) and hashed_whole(test)):
        return Copies(0, 0)
    trained, tested = _of_classes(train, names), _of_classes(test, names)
    if train.sizes is not None and test.sizes is not None:
        found, counts = np.unique(np.concatenate([train.sizes[trained], test.sizes[tested]]), return_counts=True)
        trained, tested = (
            each[np.isin(sizes[each], found[counts > 1])] for each, sizes in ((trained, train.sizes), (tested, test.sizes))
        )
    classes: dict[bytes, list[int]] = {}
    for index, digest in _digests(train, trained):
        classes.setdefault(digest, []).append(int(train.labels[index]))
    in_test = sum(digest in classes for _, digest in _digests(test, tested))
    return Copies(in_test, sum(len(labels) for labels in classes.values() if len(set(labels)) > 1))


def copies_noticed(train: Source, test: Source, trained: str, names: Collection[str] | None = None) -> list[str]:
    """What a user should know of the images of :func:`find_copies`, one sentence each; ``trained`` is what the images to train
    on are called."""
    copies, notices = find_copies(train, test, names), []
    if copies.in_test:
        tested = len(_of_classes(test, names))
        notices.append(
            f"{copies.in_test} of {tested} test images are copies of {trained}; students know them, so that "
            "accuracies are too high"
        )
    if copies.in_two_classes:
        notices.append(
            f"{copies.in_two_classes} {trained} are copies of images of another class, so that one of their labels is wrong"
        )
    return notices


def _of_classes(source: Source, names: Collection[str] | None) -> NDArray[np.int64]:
    """Indices of the images of the classes called ``names``, or of all."""
    labels = [label for label, name in enumerate(source.class_names) if names is None or name in names]
    return np.flatnonzero(np.isin(source.labels, labels))


def _digests(source: Source, indices: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """Index and hash of each image whose bytes are known."""
    for index in indices.tolist():
        try:
            data = source.stored(index)
        except Undecodable:  # a row without an image
            continue
        if data is not None:
            yield index, hashlib.sha256(data).digest()
