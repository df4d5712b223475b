"""Lists of many files, kept as columns: the names and sizes of a million files take some 60 MB."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute, fs

from ims3_ray.io.files import Place, check_name, is_hidden, natural, readable, remote_files

AT_A_TIME = 2**16
"""Number of names that are Python strings at the same time while a list is read from its columns."""


@dataclass(frozen=True)
class Listing(Sequence[Place]):
    """Files below a folder. An entry becomes a :class:`Place` when it is asked for."""

    filesystem: fs.FileSystem
    root: str
    """Path of the folder; empty if the paths are whole ones."""
    paths: pa.LargeStringArray
    """Path of each file below the folder."""
    sizes: NDArray[np.int64]
    """Size of each file in bytes."""

    @classmethod
    def of(cls, files: Sequence[Place]) -> Listing:
        """``files``, which lie on one file system, as columns."""
        if isinstance(files, Listing):
            return files
        filesystem = files[0].filesystem if files else fs.LocalFileSystem()
        return cls.from_rows(filesystem, "", [(file.path, file.size) for file in files])

    @classmethod
    def below(cls, folder: Place) -> Listing:
        """All files below a folder: see :func:`files_below`."""
        return cls.from_rows(folder.filesystem, folder.path, files_below(folder)[0])

    @classmethod
    def joined(cls, filesystem: fs.FileSystem, root: str, parts: Sequence[tuple[str, Listing]]) -> Listing:
        """One list of all ``parts``, each the name of a folder directly below ``root`` with the files in it."""
        paths = pa.concat_arrays([_in_folder(name, part.paths) for name, part in parts]) if parts else _column([])
        return cls(filesystem, root, paths, np.concatenate([np.zeros(0, np.int64), *(part.sizes for _, part in parts)]))

    @classmethod
    def from_rows(cls, filesystem: fs.FileSystem, root: str, found: Sequence[tuple[str, int]]) -> Listing:
        """The files with these paths below ``root``, and sizes."""
        paths, sizes = [path for path, _ in found], np.array([size for _, size in found], np.int64)
        return cls(filesystem, root, _column(paths), sizes)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Place: ...
    @overload
    def __getitem__(self, index: slice) -> Listing: ...
    def __getitem__(self, index: int | slice) -> Place | Listing:
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        path = self.paths[index].as_py()
        whole = f"{self.root.rstrip('/')}/{path}" if self.root else path
        return Place(self.filesystem, whole, fs.FileType.File, int(self.sizes[index]))

    def chosen(self, indices: NDArray[np.int64]) -> Listing:
        """The files at ``indices``, in their order."""
        return Listing(self.filesystem, self.root, self.paths.take(pa.array(indices)), self.sizes[indices])

    def path(self, index: int) -> str:
        """Path of a file below the folder."""
        return str(self.paths[index].as_py())

    def rows(self) -> Iterator[tuple[str, int]]:
        """Path below the folder and size of every file."""
        for start in range(0, len(self), AT_A_TIME):
            paths = self.paths[start : start + AT_A_TIME].to_pylist()
            yield from zip(paths, self.sizes[start : start + AT_A_TIME].tolist(), strict=True)

    def first_shared(self, other: Listing) -> Place | None:
        """The first file that is in ``other`` too."""
        if self.filesystem.type_name != other.filesystem.type_name:
            return None
        shared = np.flatnonzero(compute.is_in(self._whole(), other._whole()).to_numpy(zero_copy_only=False))
        return self[int(shared[0])] if len(shared) else None

    def _whole(self) -> pa.LargeStringArray:
        return _in_folder(self.root.rstrip("/"), self.paths) if self.root else self.paths


def _column(texts: Sequence[str]) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


def _in_folder(folder: str, paths: pa.LargeStringArray) -> pa.LargeStringArray:
    """``paths`` with ``folder/`` before each."""
    return compute.binary_join_element_wise(pa.scalar(folder, pa.large_string()), paths, pa.scalar("/", pa.large_string()))


def files_below(folder: Place) -> tuple[list[tuple[str, int]], list[str]]:
    """Path below the folder, and size, of all files in and below it in the order of :func:`natural`, without hidden ones; and
    the links to folders, which are not followed. Raises :class:`UserError` for what may not be read."""
    if isinstance(folder.filesystem, fs.LocalFileSystem):
        links = list[str]()
        return sorted(_local_files(folder.path, "", links), key=lambda each: natural(each[0])), links
    start = len(folder.path.rstrip("/")) + 1
    return [(info.path[start:], info.size or 0) for info in remote_files(folder)], []


def _local_files(folder: str, within: str, links: list[str]) -> Iterator[tuple[str, int]]:
    """Path below the top folder, and size, of every file in ``folder``, which is ``within`` the top folder, and below it. Links
    to folders are added to ``links``."""
    with readable(folder), os.scandir(folder) as entries:
        seen = [entry for entry in entries if not is_hidden(check_name(entry.name, folder))]
    for entry in seen:
        try:
            with readable(entry.path):
                state = entry.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):  # a link that leads nowhere
                continue
            raise
        if stat.S_ISREG(state.st_mode):
            yield f"{within}{entry.name}", state.st_size
        elif entry.is_dir(follow_symlinks=False):
            yield from _local_files(entry.path, f"{within}{entry.name}/", links)
        elif stat.S_ISDIR(state.st_mode):
            links.append(entry.path)
