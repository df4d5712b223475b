"""Export: the chosen images as Parquet in the Hub's layout."""

from __future__ import annotations

import io
import time

import pyarrow.parquet as pq

from ims3_ray.artifacts import Artifact
from ims3_ray.data.classes import folder_names
from ims3_ray.data.hub import encode_png, image_table, parquet_bytes
from ims3_ray.data.transforms import to_pil
from ims3_ray.stages.base import Context, Stage, commit_units
from ims3_ray.stages.sets import read_set

PARQUET = "train-00000-of-00001.parquet"


def run(context: Context, stage: Stage) -> None:
    """Commit the distilled set as one Parquet shard."""
    began = time.monotonic()
    pixels, labels = read_set(stage.inputs["select"].artifact(context.storage))
    names, k = context.classes.names, stage.run.selection.images_per_class
    rows = []
    folders = folder_names(names)
    for position, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        rows.append((encode_png(to_pil(image)), f"{folders[label]}/{position % k:05d}.png", label))
    artifact = stage.artifact(context.storage)
    digest = artifact.write(PARQUET, parquet_bytes(image_table(rows, names)))
    commit_units(artifact, {"result": {"sha256": digest, "images": len(rows)}}, time.monotonic() - began)


def unpack(context: Context, artifact: Artifact, folder: str) -> None:
    """Lay the exported set out in ``folder`` of the storage: ``data/*.parquet`` and one image folder per class."""
    parquet = artifact.read(PARQUET)
    for row in pq.read_table(io.BytesIO(parquet)).column("image").to_pylist():
        context.storage.write(f"{folder}/images/{row['path']}", row["bytes"])
    context.storage.write(f"{folder}/data/{PARQUET}", parquet)
