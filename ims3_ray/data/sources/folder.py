"""Folders of images: one folder per class, and the layouts in which ImageNet and Tiny-ImageNet are downloaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from ims3_ray.data.decoding import decode
from ims3_ray.data.sources.base import Source
from ims3_ray.data.sources.location import SPLIT_LIKE, SPLIT_NAMES, Location
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place, concurrently, natural, open_filesystem
from ims3_ray.io.listing import Listing, files_below

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip
"""Endings of the file names, in lower case, that are read as images."""
KAGGLE = "ILSVRC/Data/CLS-LOC"
"""Folder of the splits in ImageNet as Kaggle distributes it."""
SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"
"""File of TensorFlow's ImageNet scripts: line i is the class of the i-th validation image."""


class FolderSource(Source):
    """One folder per class, named after the class, with images at any depth below it. A split may instead be a flat folder of
    images whose classes are listed in a file: see :func:`listed_labels`."""

    name, order, version = "folder", 30, 2

    files: Listing

    @classmethod
    def find(cls, place: Location) -> Source | None:
        root = place.root
        if root.is_folder and (kaggle := root.child(KAGGLE)).is_folder:
            root = kaggle
        if not root.is_folder:
            return None
        inside = place.children if root is place.root else root.children()
        folders = {child.name: child for child in inside if child.is_folder}
        if place.split in folders:
            split = folders[place.split]
            if (found := cls._of_split(place, split, split.children(), [place.root, root, split])) is not None:
                return found
        if any(is_split(folders[name].children()) for name in SPLIT_NAMES if name in folders):
            return None
        # Without folders per split the whole folder is one split, such as data.test_path=/data/imagenet/val.
        return cls._of_split(place, root, inside, [root]) or cls._of_classes(place, root, inside)

    @classmethod
    def _of_split(cls, place: Location, split: Place, inside: Sequence[Place], around: Sequence[Place]) -> Source | None:
        """The split in the folder ``split`` with the content ``inside``; None if the folder is a class of images."""
        labels = listed_labels(split, inside, around)
        if labels is not None:
            return cls(place.path, split, *_grouped(split, labels))
        return cls._of_classes(place, split, inside) if is_split(inside) else None

    @classmethod
    def _of_classes(cls, place: Location, folder: Place, inside: Sequence[Place]) -> Source | None:
        classes = [child for child in inside if child.is_folder]
        tars = [child for child in inside if child.is_file and child.name.endswith(".tar")]
        if len(tars) > len(classes):
            raise UserError(
                f"'{folder.path}' holds {len(tars)} tar files such as '{tars[0].name}'; unpack each into a folder of its name"
            )
        if [child.name for child in classes] == ["images"]:
            raise UserError(
                f"'{folder.path}' holds images without classes; give a split that has them (data.test_split=val), or sort "
                "the images into one folder per class"
            )
        if not classes:
            return None
        found = concurrently(_class_files, classes)
        full = [len(images) > 0 for images, *_ in found]
        chosen = [number for number, some in enumerate(full) if some or not any(full)]
        files = Listing.joined(folder.filesystem, folder.path, [(classes[number].name, found[number][0]) for number in chosen])
        counts = [len(found[number][0]) for number in chosen]
        source = cls(place.path, folder, [classes[number].name for number in chosen], files, counts)
        notices = []
        if others := sum((found[number][1] for number in chosen), Counter[str]()):
            kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
            notices.append(f"'{folder.path}' holds {others.total()} files that are not read as images ({kinds})")
        if links := [link for number in chosen for link in found[number][2]]:
            more = f"{len(links)} links to folders ('{links[0]}')" if len(links) > 1 else f"a link to a folder ('{links[0]}')"
            verb = "are" if len(links) > 1 else "is"
            notices.append(f"'{folder.path}' holds {more} inside its classes, which {verb} not followed")
        if empty := [child.name for child, some in zip(classes, full, strict=True) if not some]:
            which = f"{len(empty)} folders without images ({', '.join(empty[:5])})" if len(empty) > 1 else ""
            which = which or f"a folder without images ({empty[0]})"
            notices.append(f"'{folder.path}' holds {which}, which {'is' if len(empty) == 1 else 'are'} not read")
        if stray := [child.name for child in inside if is_image(child)]:
            which = f"{len(stray)} images beside its classes ('{stray[0]}')"
            notices.append(f"'{folder.path}' holds {which}, which are not read")
        source.notices = notices
        return source

    def __init__(self, location: str, folder: Place, classes: Sequence[str], files: Listing, counts: Sequence[int]) -> None:
        """``files`` holds the images of each class in turn, and ``counts`` how many there are of each."""
        self.location, self._folder = location, folder
        self.class_names, self.files = tuple(classes), files
        self.labels = np.repeat(np.arange(len(classes)), counts).astype(np.int64)

    @property
    def folders(self) -> set[str]:
        if not isinstance(self._folder.filesystem, fs.LocalFileSystem):
            return set()
        firsts = np.unique(self.labels, return_index=True)[1].tolist()
        below = {self.files.path(index).rpartition("/")[0].partition("/")[0] for index in firsts}
        return {os.path.realpath(f"{self._folder.path}/{name}") for name in below}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the list of files, since listing a million of them takes long."""
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        files = self.files.paths, self.files.sizes
        return type(self)._sent, (self.location, self._folder.path, self.class_names, *files, counts)

    @classmethod
    def _sent(
        cls, location: str, folder: str, classes: Sequence[str], paths: Any, sizes: NDArray[np.int64], counts: Sequence[int]
    ) -> FolderSource:  # fmt: skip
        filesystem, _ = open_filesystem(location)
        place = Place(filesystem, folder, fs.FileType.Directory)
        return cls(location, place, classes, Listing(filesystem, folder, paths, sizes), counts)

    def image(self, index: int) -> Image.Image:
        return decode(self.stored(index))

    def stored(self, index: int) -> bytes:
        """Raises :class:`UserError` for a file of another size than when it was listed: the key of what is made of it has that
        of the set as it was."""
        file = self.files[index]
        if len(data := file.read()) != file.size:
            raise UserError(
                f"'{file.path}' has changed since it was listed; run the command again, and leave the data as they are"
            )
        return data

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.files.sizes

    def identify(self, index: int) -> str:
        return self.files.path(index)


def _class_files(folder: Place) -> tuple[Listing, Counter[str], list[str]]:
    """The images in the folder of a class, how many other files there are of each ending, and the links to folders in it."""
    images: list[tuple[str, int]] = []
    others = Counter[str]()
    files, links = files_below(folder)
    for path, size in files:
        if (ending := ending_of(path)) in IMAGE_SUFFIXES:
            images.append((path, size))
        else:
            others[ending or "no ending"] += 1
    return Listing.from_rows(folder.filesystem, folder.path, images), others, links


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()


def is_image(place: Place) -> bool:
    return place.is_file and ending_of(place.name) in IMAGE_SUFFIXES


def is_split(inside: Sequence[Place]) -> bool:
    """Whether a folder that is named like a split and has this content is one: it holds folders or packed classes. A folder
    with images alone is a class of that name."""
    return any(child.is_folder or child.name.endswith(".tar") for child in inside)


def listed_labels(split: Place, inside: Sequence[Place], around: Sequence[Place]) -> dict[str, str] | None:
    """File name → class of the images of a flat split, as a file lists them; None for a split with a folder per class.

    Three lists are known: ``val_annotations.txt`` of Tiny-ImageNet in the split's folder, and for ImageNet Kaggle's
    ``LOC_val_solution.csv`` and TensorFlow's ``imagenet_2012_validation_synset_labels.txt``, in any of the folders ``around``
    or their parents. Raises :class:`UserError` for a flat split without any of them.
    """
    annotations = next((child for child in inside if child.name == f"{split.name}_annotations.txt"), None)
    if annotations is not None:
        rows = [line.split("\t") for line in annotations.lines()]
        return {row[0]: row[1] for row in rows if len(row) > 1}
    images = [child.name for child in inside if is_image(child)]
    if not images or any(child.is_folder for child in inside) or split.name not in ("val", "validation"):
        return None
    for folder in {above.path: above for place in around for above in (place, *place.parents(3))}.values():
        if (solution := folder.child("LOC_val_solution.csv")).is_file:
            pairs = [(line.partition(",")[0], line.partition(",")[2].split()) for line in solution.lines()[1:]]
            names = {Path(image).stem: image for image in images}
            return {names[stem]: found[0] for stem, found in pairs if stem in names and found}
        if (synsets := folder.child(SYNSET_LABELS)).is_file:
            classes = synsets.lines()
            if len(classes) != len(images):
                raise UserError(f"'{synsets.path}' lists {len(classes)} classes for {len(images)} images; fetch both again")
            return dict(zip(sorted(images, key=natural), classes, strict=True))
    if not images[0].startswith("ILSVRC2012_val"):
        return None
    raise UserError(
        f"'{split.path}' holds images but not their classes; put LOC_val_solution.csv (Kaggle) or {SYNSET_LABELS} beside it, "
        "or sort the images into one folder per class. The ground truth of the development kit is not read, since it numbers "
        "the classes in an order of its own"
    )


def _grouped(split: Place, labels: Mapping[str, str]) -> tuple[list[str], Listing, list[int]]:
    """Classes of a flat split, its images class by class, and their number of each. Raises :class:`UserError` for an image that
    is not listed."""
    by_class: dict[str, list[int]] = {}
    files = Listing.below(split)
    for index, (path, _) in enumerate(files.rows()):
        name = path.rpartition("/")[2]
        if ending_of(name) not in IMAGE_SUFFIXES:
            continue
        if name not in labels:
            raise UserError(f"'{split.path}' holds '{name}', whose class is not listed; fetch the list again")
        by_class.setdefault(labels[name], []).append(index)
    classes = sorted(by_class, key=natural)
    order = np.array([index for name in classes for index in by_class[name]], np.int64)
    return classes, files.chosen(order), [len(by_class[name]) for name in classes]


def check_classes_are_no_splits(source: Source, path: str) -> None:
    """Raises :class:`UserError` if folders at ``path`` that are called like splits were read as classes."""
    names = source.class_names
    if not isinstance(source.unlimited, FolderSource) or not all(SPLIT_LIKE.fullmatch(name) for name in names):
        return
    found = " and ".join(f"'{name}'" for name in names)
    if not any(name.count("/") > 1 for name in map(source.identify, range(len(source.labels)))):
        raise UserError(f"{found} in '{path}' hold images without classes; sort them into one folder per class")
    trained = next((name for name in names if name.lower().startswith("train")), names[-1])
    others = [name for name in names if name != trained]
    tested = next((name for name in others if name.lower().startswith("test")), others[0] if others else None)
    says = f"data.train_split={trained}" + (f" data.test_split={tested}" if tested else "")
    raise UserError(f"'{path}' holds {found}, which would be read as classes; name the folders of the splits: {says}")
