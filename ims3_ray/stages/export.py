"""Export of a set as a Parquet file in the layout of the Hugging Face Hub."""

from __future__ import annotations

import io
import time
from collections import Counter
from dataclasses import dataclass

import pyarrow.parquet as pq

from ims3_ray.config import RunConfig
from ims3_ray.data.classes import folder_names
from ims3_ray.data.transforms import to_pil
from ims3_ray.engine.planner import PNG_SHARE, Planner, pixel_bytes
from ims3_ray.engine.sets import EXTRAS, read_set
from ims3_ray.engine.shards import commit_units
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes

PARQUET = "train-00000-of-00001.parquet"


@dataclass(eq=False)
class Export(Stage):
    """Exports a set. The only shard is the file :data:`PARQUET`."""

    name, of_arm = "export", True

    @classmethod
    def plan(cls, planner: Planner, images: Stage, config: RunConfig, label: str) -> Export:
        """Plan the export of the set ``images`` of the arm ``label``."""
        params, stored = {"classes": list(planner.classes.names)}, 2 * PNG_SHARE * pixel_bytes(images.images, config)
        return planner.add(
            cls("export", params, {"select": images}, images=images.images, label=label, config=config, stored=stored)
        )  # fmt: skip

    @classmethod
    def stem(cls, unit: str) -> str:
        return PARQUET.rpartition(".")[0]

    def run(self, context: Context) -> None:
        began, names = time.monotonic(), context.classes.names
        found = read_set(self.inputs["select"].artifact(context.storage))
        rows, counts, folders = [], Counter[int](), folder_names(names)
        for image, label in zip(found.pixels, found.labels.tolist(), strict=True):
            rows.append((encode_png(to_pil(image)), f"{folders[label]}/{counts[label]:05d}.png", label))
            counts[label] += 1
        more = {name: tensor.float().numpy() for name in EXTRAS if (tensor := getattr(found, name)) is not None}
        artifact = self.artifact(context.storage)
        digest = artifact.write(PARQUET, parquet_bytes(image_table(rows, names, more)))
        commit_units(artifact, {"result": {"sha256": digest, "images": len(rows)}}, time.monotonic() - began)


def unpack(context: Context, artifact: Artifact, folder: str) -> None:
    """Write the exported set to ``folder`` of the storage, as ``data/*.parquet`` and as one folder of images per class."""
    parquet = artifact.read(PARQUET, "result")
    for row in pq.read_table(io.BytesIO(parquet)).column("image").to_pylist():
        context.storage.write(f"{folder}/images/{row['path']}", row["bytes"])
    context.storage.write(f"{folder}/data/{PARQUET}", parquet)
