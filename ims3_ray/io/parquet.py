"""Parquet in the Hub's image layout: readable by ``datasets.load_dataset`` and shown by the Hub's viewer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG bytes; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


EXTRAS = {"logits": "logits", "weights": "weight"}
"""Optional tensor of a set, beside images and labels → its column: soft labels (a teacher's logits) and the weight of each
image."""


def image_table(
    rows: Iterable[tuple[bytes, str, int]], class_names: Sequence[str] | None = None,
    extras: Mapping[str, NDArray[np.float32]] | None = None,
) -> pa.Table:  # fmt: skip
    """Rows (encoded image, file name, label) as a table with ``image: {bytes, path}`` and a ClassLabel ``label``, which is a
    plain number if ``class_names`` is None. ``extras`` holds those tensors of :data:`EXTRAS` that the set has, with a row per
    image."""
    encoded, paths, labels = zip(*rows, strict=True)
    label = {"dtype": "int64", "_type": "Value"} if class_names is None else {"names": [*class_names], "_type": "ClassLabel"}
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": label}
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    columns = []
    for name, values in (extras or {}).items():
        value = {"dtype": "float32", "_type": "Value"}
        features[EXTRAS[name]] = value if values.ndim == 1 else {"feature": value, "_type": "List"}
        fields.append((EXTRAS[name], pa.float32() if values.ndim == 1 else pa.list_(pa.float32())))
        columns.append(pa.array(values if values.ndim == 1 else list(values), fields[-1][1]))
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    images = pa.StructArray.from_arrays([pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"])
    return pa.table([images, pa.array(labels, pa.int64()), *columns], schema=schema)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
