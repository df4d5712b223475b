"""The class table, and functions that match classes by name."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ims3_ray.errors import UserError


@dataclass(frozen=True)
class ClassTable:
    """The C classes being distilled, in the order of their position in the distilled set."""

    names: tuple[str, ...]
    source_labels: tuple[int, ...]
    """Label of each class in the data source."""
    counts: tuple[int, ...]
    """Number of training images of each class."""


def composed(name: str) -> str:
    """A class name in the composed form of Unicode (NFC). Some systems store "é" as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def repeated(names: Sequence[str]) -> str | None:
    """The first name that stands twice; None if all differ."""
    counts = Counter(names)
    return next((name for name in names if counts[name] > 1), None)


def chosen_labels(class_names: Sequence[str], chosen: Sequence[str] | None) -> list[int]:
    """Source labels of the ``chosen`` classes (all when None). Raises :class:`UserError` for an unknown name, with the most
    similar known one."""
    for name in chosen or ():
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1, cutoff=0.0)
            raise UserError(f"data.classes names '{name}', which the source does not have; did you mean '{near[0]}'?")
    if (twice := repeated(chosen or ())) is not None:
        raise UserError(f"data.classes names '{twice}' twice; name each class once")
    return [class_names.index(name) for name in chosen] if chosen else list(range(len(class_names)))


def count_images(
    labels: NDArray[np.int64], class_names: Sequence[str], chosen: Sequence[int], needed: int,
    key: str = "selection.images_per_class",
) -> list[int]:  # fmt: skip
    """Number of images of each chosen class. Raises :class:`UserError` for a class with fewer than ``needed``, which is what
    the option ``key`` says."""
    counts = np.bincount(labels, minlength=len(class_names))
    for label in chosen:
        if counts[label] < needed:
            raise UserError(
                f"class '{class_names[label]}' has {counts[label]} images, fewer than {key}={needed}; "
                "lower it, or leave the class out with data.classes"
            )
    return [int(counts[label]) for label in chosen]


def match_classes(wanted: Sequence[str], found: Sequence[str], where: str) -> list[int]:
    """Position in ``found`` of each class in ``wanted``, matched by its name or by the name of its folder.

    Raises :class:`UserError` if a wanted class is missing, if ``found`` has another class, and for folders whose names do not
    say which of two classes they hold.
    """
    positions = {name: position for position, name in enumerate(found)}
    labels = []
    keys = wanted if all(name in positions for name in wanted) else folder_names(wanted)
    if keys is not wanted:
        counted = Counter(folder_name(name).casefold() for name in wanted)
        if alike := [name for name in wanted if counted[folder_name(name).casefold()] > 1]:
            raise UserError(
                f"the folders of set '{where}' do not say which of the classes '{alike[0]}' and '{alike[1]}' they hold; give "
                "the set as Parquet, or rename one of the classes"
            )
    for name, key in zip(wanted, keys, strict=True):
        label = positions.get(key)
        if label is None:
            there = ", ".join(found[:10]) + (" …" if len(found) > 10 else "")
            raise UserError(f"set '{where}' has no class '{name}'; it has {there}")
        labels.append(label)
    if extra := set(found) - {found[label] for label in labels}:
        raise UserError(
            f"set '{where}' has a class '{min(extra)}' that the data do not have, or not in data.classes; remove it there"
        )
    return labels


def class_groups(labels: Sequence[int], at_most: int | None) -> list[list[int]]:
    """``labels`` divided, in order, into as few groups as possible of at most ``at_most`` labels (one group when None). The
    sizes of the groups differ by at most one."""
    count = -(-len(labels) // at_most) if at_most else 1
    return [part.tolist() for part in np.array_split(np.asarray(labels), count)]


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ImageNet-1K by label: label i is the i-th of the sorted ids."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def folder_name(class_name: str) -> str:
    """The class name as a folder name that is valid on every file system. Only characters that some file system does not allow
    are replaced, by ``_``; spaces and dots at the ends are left out."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]+', "_", class_name).strip(" .") or "class"


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A folder name for each class. If several classes would have the same folder name, the later ones have their label
    appended."""
    found: list[str] = []
    taken = set[str]()
    for label, name in enumerate(class_names):
        folder = folder_name(name)
        while folder.casefold() in taken:  # some file systems ignore upper and lower case
            folder = f"{folder}-{label}"
        taken.add(folder.casefold())
        found.append(folder)
    return found
