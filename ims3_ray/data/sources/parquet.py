"""Parquet files in the Hub's image layout."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from pyarrow import fs

from ims3_ray.data.decoding import Undecodable, decode
from ims3_ray.data.sources.base import Source, check_labels, check_logits, numbered
from ims3_ray.data.sources.location import Location, parquet_files
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.files import Place, concurrently
from ims3_ray.io.node_cache import cached
from ims3_ray.io.parquet import EXTRAS

KEPT_BYTES = 2**28
"""Encoded images of this many bytes in total are kept in memory, in every process that reads them."""
HUB_METADATA = b"huggingface"
"""Entry of a Parquet file's metadata that holds the names of the classes, as the library datasets writes it."""
ROWS_AT_A_TIME = 256
"""Number of images in memory while a file is copied to the cache."""


class ParquetSource(Source):
    """Parquet files in the Hub's image layout: ``image: {bytes, path}`` (the column may have another name, such as ``img``) and
    an integer ``label`` with ClassLabel names."""

    name, order, version = "parquet", 20, 2

    @classmethod
    def find(cls, place: Location) -> Source | None:
        if place.root.is_file:
            if not place.root.name.endswith(".parquet"):
                raise UserError(f"'{place.path}' is no folder and no Parquet file; unpack it into one folder per class")
            return cls(place.path, [place.root])
        below = [folder for folder in place.nearby if folder.is_folder and folder.name == place.split]
        deeper = itertools.chain(*concurrently(parquet_files, [folder for folder in below if folder not in place.children]))
        there = [file for file in (*place.nearby, *deeper) if file.is_file]
        files = [file for file in there if is_part_of(file, place.split, place.root)]
        check_one_configuration(place.path, files)
        return cls(place.path, files) if files else None

    def __init__(self, location: str, files: Sequence[Place]) -> None:
        """Reads labels, class names and the numbers of a set (:data:`EXTRAS`); images are read when they are asked for."""
        self.location, self.files = location, list(files)
        try:
            opened = concurrently(_open_parquet, self.files)
            self._image = _image_column(opened[0].schema_arrow)
            extras = [name for name in EXTRAS if _holds_numbers(name, opened[0].schema_arrow)]
            columns = ["label", *(EXTRAS[name] for name in extras)]
            for file, table in zip(self.files, opened, strict=True):
                self._check_columns(file, table.schema_arrow)
            tables = concurrently(lambda table: table.read(columns=columns).select(columns), opened)
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds of error; all mean the same to the user
            raise UserError(f"Parquet data source '{location}' cannot be read: {first_line(error)}") from error
        for file, table in zip(self.files, tables, strict=True):
            if table["label"].null_count:
                raise UserError(f"Parquet file '{file.path}' has {table['label'].null_count} rows without a label; remove them")
        self.labels = np.concatenate([t["label"].to_numpy().astype(np.int64) for t in tables])
        self._numbers = {name: [table[EXTRAS[name]] for table in tables] for name in extras}
        self._starts = np.cumsum([0, *(t.num_rows for t in tables)])
        self._kept = sum(_encoded_bytes(file, self._image) for file in opened) <= KEPT_BYTES
        self._parts: dict[int, pa.ChunkedArray] = {}
        self._reading = threading.Lock()
        self.class_names = self._common_names([class_names_of(file.schema_arrow.metadata) for file in opened])
        check_labels(location, self.labels, self.class_names)
        unreadable = [file for file, table in zip(self.files, opened, strict=True) if _unreadable_names(table.schema_arrow)]
        if unreadable:
            self.notices = [
                f"'{unreadable[0].path}' has metadata of the Hub that cannot be read; its classes are called by their numbers"
            ]

    def _check_columns(self, file: Place, schema: pa.Schema) -> None:
        """Raise :class:`UserError` for a file whose columns are not those of labelled images."""
        held, label = (schema.field(name).type for name in (self._image, "label"))
        if not (_holds_images(held) and pa.types.is_integer(label)):
            raise UserError(
                f"Parquet file '{file.path}' holds {self._image}: {held}, label: {label}; what is read is the Hub's image "
                "layout, image: struct<bytes, path> and label: an integer"
            )

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
        return decode(self.stored(index))

    def stored(self, index: int) -> bytes:
        """An image as the file has it, as PNG or JPEG. Raises :class:`Undecodable` for a row without one."""
        part = self._part(index)
        data: bytes | None = self._encoded(part)[index - int(self._starts[part])].as_py()
        if data is None:
            raise Undecodable("its row holds no bytes of an image; a path alone is not followed")
        return data

    def _part(self, index: int) -> int:
        """The number of the file that holds an image."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _encoded(self, part: int) -> pa.ChunkedArray:
        """The encoded images of a file. Those of a small data set are kept in memory; those of a large one are mapped from this
        machine's cache, where they can be read in any order and all processes share them."""
        with self._reading:
            if part not in self._parts:
                file = self.files[part]
                if self._kept:
                    column = _open_parquet(file).read(columns=[f"{self._image}.bytes"])[self._image]
                else:
                    column = _mapped(file, self._image)
                kind = column.type.field("bytes").type
                self._parts[part] = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], kind)
            return self._parts[part]

    def identify(self, index: int) -> str:
        part = self._part(index)
        return f"{self.files[part].name} row {index - int(self._starts[part])}"

    def texts(self, column: str) -> list[str | None] | None:
        tables = [_open_parquet(file) for file in self.files]
        kinds = [table.schema_arrow.field(column).type for table in tables if column in table.schema_arrow.names]
        if len(kinds) < len(tables) or not all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
            return None
        return [text for table in tables for text in table.read(columns=[column])[column].to_pylist()]

    def extras(self, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Raises :class:`UserError` for soft labels and weights that are none."""
        return {name: values[list(indices)] for name, values in self._extras.items()}

    @cached_property
    def _extras(self) -> dict[str, NDArray[np.float32]]:
        return {
            name: np.concatenate([_rows(name, column, self.location) for column in columns])
            for name, columns in self._numbers.items()
        }


def is_part_of(file: Place, split: str, root: Place) -> bool:
    """Whether a Parquet file below ``root`` holds a part of ``split`` by the Hub's naming: ``train.parquet``,
    ``train-00000-of-00002.parquet``, ``train_part1.parquet``, or any file in a folder called ``train``; but not
    ``train_extra-00000-of-00001.parquet``, which is another split, nor ``metadata.parquet``, which describes image files."""
    if file.name == "metadata.parquet":
        return False
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


def _mapped(file: Place, image: str) -> pa.ChunkedArray:
    """The column ``image`` of a Parquet file, mapped from an uncompressed copy in this machine's cache."""
    opened, column = _open_parquet(file), f"{image}.bytes"
    size = _encoded_bytes(opened, image)

    def copy(target: Path) -> None:
        schema = pa.schema([(image, pa.struct([("bytes", pa.large_binary())]))])
        with pa.OSFile(str(target), "wb") as out, pa.ipc.new_file(out, schema) as written:
            for batch in opened.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[column]):
                written.write_batch(batch.cast(schema))

    described = repr([file.filesystem.type_name, file.path, file.size, file.mtime_ns, column])
    name = f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.arrow"
    path = cached(name, copy, size, f"an uncompressed copy of the images in '{file.path}'")
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()[image]


def _encoded_bytes(file: pq.ParquetFile, image: str) -> int:
    """Bytes of the encoded images of a Parquet file."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    columns = [group.column(position) for group in groups for position in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == f"{image}.bytes")


def _open_parquet(file: Place) -> pq.ParquetFile:
    """Open a Parquet file, of which only the parts in use are read. A local one is mapped to memory."""
    if isinstance(file.filesystem, fs.LocalFileSystem):
        return pq.ParquetFile(file.path, memory_map=True)
    return pq.ParquetFile(file.path, filesystem=file.filesystem)


def _holds_images(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _image_column(schema: pa.Schema) -> str:
    """``image``, or the first column that holds encoded images."""
    others = [name for name in schema.names if _holds_images(schema.field(name).type)]
    return "image" if "image" in schema.names or not others else str(others[0])


def _holds_numbers(name: str, schema: pa.Schema) -> bool:
    """Whether a file has the column of ``name`` in :data:`EXTRAS`: lists of numbers for ``logits``, numbers for ``weights``. A
    column of the same name and another kind belongs to the data and says nothing of labels."""
    if EXTRAS[name] not in schema.names:
        return False
    kind = schema.field(EXTRAS[name]).type
    if name == "weights":
        return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def _rows(name: str, column: pa.ChunkedArray, location: str) -> NDArray[np.float32]:
    """The numbers [N] or lists of numbers [N, n] of the column of ``name`` in :data:`EXTRAS`. Raises :class:`UserError` for
    soft labels that are no logits of equal length, and for weights that are not above 0."""
    try:
        values = np.asarray(column.to_pylist(), np.float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"column '{EXTRAS[name]}' of '{location}' has rows that are missing or differ in length") from error
    if name == "logits":
        check_logits(values, location)
    elif not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"column '{EXTRAS[name]}' of '{location}' holds weights that are not above 0; correct or remove it")
    return values


def _unreadable_names(schema: pa.Schema) -> bool:
    """Whether a Parquet file has metadata of the Hub that are no JSON, so that names of classes may be lost."""
    try:
        json.loads((schema.metadata or {}).get(HUB_METADATA, b"{}"))
    except (ValueError, RecursionError):
        return True
    return False


def class_names_of(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """ClassLabel names in the ``huggingface`` schema metadata of a Parquet file, if it has them."""
    try:
        names = json.loads((metadata or {})[HUB_METADATA])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) else None
