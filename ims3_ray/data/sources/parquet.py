"""Parquet files in the Hub's image layout."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from ims3_ray.data.decoding import decode
from ims3_ray.data.sources.base import Location, Source, check_labels, numbered
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place, concurrently
from ims3_ray.io.parquet import EXTRAS


class ParquetSource(Source):
    """Parquet files in the Hub's image layout: ``image: {bytes, path}`` (the column may have another name, such as ``img``) and
    an integer ``label`` with ClassLabel names."""

    name, order, version = "parquet", 20, 2

    @classmethod
    def find(cls, place: Location) -> Source | None:
        if place.root.is_file:
            return cls(place.path, [place.root])
        below = [folder for folder in place.nearby if folder.is_folder and folder.name == place.split]
        deeper = itertools.chain(*concurrently(Place.children, [folder for folder in below if folder not in place.children]))
        there = [file for file in (*place.nearby, *deeper) if file.is_file and file.name.endswith(".parquet")]
        files = [file for file in there if is_part_of(file, place.split, place.root)]
        check_one_configuration(place.path, files)
        return cls(place.path, files) if files else None

    def __init__(self, location: str, files: Sequence[Place]) -> None:
        self.location, self.files = location, list(files)
        try:
            opened = [_open_parquet(file) for file in self.files]
            image = _image_column(opened[0].schema_arrow)
            names = [image, "label", *(column for column in EXTRAS.values() if column in opened[0].schema_arrow.names)]
            tables = [file.read(columns=names).select(names) for file in opened]
        except Exception as error:  # pyarrow raises many kinds of error; all mean the same to the user
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
        self._extras = {
            name: np.concatenate([_rows(t[column]) for t in tables]) for name, column in EXTRAS.items() if column in names
        }
        self._bytes = [t[image].combine_chunks().field("bytes") for t in tables]
        self._starts = np.cumsum([0, *(t.num_rows for t in tables)])
        self.class_names = self._common_names([class_names_of(table.schema.metadata) for table in tables])
        check_labels(location, self.labels, self.class_names)

    def _common_names(self, names: Sequence[tuple[str, ...] | None]) -> tuple[str, ...]:
        """The class names that all files give. Raises :class:`UserError` if they disagree, since the same label would then
        stand for different classes."""
        for file, mine in zip(self.files, names, strict=True):
            if mine != names[0]:
                one, other = (
                    ", ".join(each[:5]) + (" …" if len(each) > 5 else "") if each else "none" for each in (names[0], mine)
                )
                raise UserError(
                    f"Parquet files '{self.files[0].path}' and '{file.path}' name their classes differently ({one}; {other}); "
                    "give files of one data set"
                )
        return names[0] or numbered(self.labels)

    def image(self, index: int) -> Image.Image:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return decode(self._bytes[part][index - int(self._starts[part])].as_py())

    def identify(self, index: int) -> str:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"{self.files[part].name} row {index - int(self._starts[part])}"

    def texts(self, column: str) -> list[str | None] | None:
        tables = [_open_parquet(file) for file in self.files]
        kinds = [table.schema_arrow.field(column).type for table in tables if column in table.schema_arrow.names]
        if len(kinds) < len(tables) or not all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
            return None
        return [text for table in tables for text in table.read(columns=[column])[column].to_pylist()]

    def extras(self, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        return {name: values[list(indices)] for name, values in self._extras.items()}


def is_part_of(file: Place, split: str, root: Place) -> bool:
    """Whether a Parquet file below ``root`` holds a part of ``split`` by the Hub's naming: ``train.parquet``,
    ``train-00000-of-00002.parquet``, ``train_part1.parquet``, or any file in a folder called ``train``; but not
    ``train_extra-00000-of-00001.parquet``, which is another split."""
    if file.path.rpartition("/")[0] != root.path and file.path.split("/")[-2] == split:
        return True
    return re.fullmatch(rf"{re.escape(split)}([-._ ]?(part|shard)?[-._ ]?\d.*)?\.parquet", file.name) is not None


def check_one_configuration(location: str, files: Sequence[Place]) -> None:
    """Raise :class:`UserError` for files of several folders, which are different data sets (configurations, on the Hub), and
    for a numbered set of files of which some are missing."""
    folders = list(dict.fromkeys(file.path.rpartition("/")[0] for file in files))
    if len(folders) > 1:
        names = ", ".join(folder.rpartition("/")[2] for folder in folders)
        raise UserError(
            f"data source '{location}' has Parquet files in several folders ({names}), which are read as different data sets; "
            f"choose one, as in data.path={folders[0]}"
        )
    counts = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)", file.name))}
    if counts and counts != {len(files)}:
        raise UserError(
            f"data source '{location}' has {len(files)} Parquet files ('{files[0].name}' …), whose names say that there are "
            f"{' or '.join(map(str, sorted(counts)))}; fetch the missing ones, or remove those of another download"
        )


def _open_parquet(file: Place) -> pq.ParquetFile:
    """Open a Parquet file. A local file is memory-mapped, so that only the parts in use are read; a remote file is read into
    memory."""
    if isinstance(file.filesystem, fs.LocalFileSystem):
        return pq.ParquetFile(file.path, memory_map=True)
    return pq.ParquetFile(file.path, filesystem=file.filesystem)


def _holds_images(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _image_column(schema: pa.Schema) -> str:
    """``image``, or the first column that holds encoded images."""
    others = [name for name in schema.names if _holds_images(schema.field(name).type)]
    return "image" if "image" in schema.names or not others else str(others[0])


def _rows(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """A column of numbers [N] or of lists of equal length [N, n]."""
    return np.asarray(column.to_pylist(), np.float32)


def class_names_of(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """ClassLabel names in the ``huggingface`` schema metadata of a Parquet file, if it has them."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) else None
