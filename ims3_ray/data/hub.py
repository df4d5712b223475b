"""Parquet in the Hub's image layout: readable by ``datasets.load_dataset`` and shown by the Hub's viewer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG bytes; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def image_table(rows: Iterable[tuple[bytes, str, int]], class_names: Sequence[str] | None = None) -> pa.Table:
    """Rows (encoded image, file name, label) as a table with ``image: {bytes, path}`` and a ClassLabel ``label``, a plain
    number where classes have no names here."""
    encoded, paths, labels = zip(*rows, strict=True)
    label = {"dtype": "int64", "_type": "Value"} if class_names is None else {"names": [*class_names], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    images = pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"])
    return pa.table([images, pa.array(labels, pa.int64())], schema=schema)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
