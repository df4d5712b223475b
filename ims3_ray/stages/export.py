"""Export of a set, of a named arm or of the best one, as a Parquet file in the layout of the Hugging Face Hub."""

from __future__ import annotations

import io
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow.parquet as pq

from ims3_ray.config import RunConfig
from ims3_ray.data.classes import folder_names
from ims3_ray.data.transforms import to_pil
from ims3_ray.engine.planner import PNG_SHARE, Planner, pixel_bytes
from ims3_ray.engine.sets import EXTRAS, read_set
from ims3_ray.engine.shards import commit_units
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.io.storage import Storage


class Scored(Protocol):
    """A set of images and the stages that score it, by row of the table."""

    @property
    def images(self) -> Stage: ...

    @property
    def rows(self) -> dict[str, Stage]: ...


PARQUET = "train-00000-of-00001.parquet"


@dataclass(eq=False)
class Export(Stage):
    """Exports a set. The only shard is the file :data:`PARQUET`."""

    name, version, of_arm = "export", 2, True

    @classmethod
    def plan(cls, planner: Planner, images: Stage, config: RunConfig, label: str) -> Export:
        """Plan the export of the set ``images`` of the arm ``label``."""
        return cls._plan(planner, {}, {"select": images}, images.images, config, label)

    @classmethod
    def plan_best(cls, planner: Planner, sets: Mapping[str, Scored], config: RunConfig) -> Export:
        """Plan the export of that one of ``sets``, given by arm, whose students are most accurate on held-out training images.

        Raises :class:`UserError` if no images are held out.
        """
        if config.evaluation.val_per_class == 0:
            raise UserError(
                "export=best chooses by held-out training images, of which evaluation.val_per_class=0 leaves none; name an "
                f"arm, as in export={next(iter(sets))}, or set export=null"
            )
        inputs = {f"set {name}": scored.images for name, scored in sets.items()}
        inputs |= {f"scores {name} {row}": stage for name, scored in sets.items() for row, stage in scored.rows.items()}
        images = next(iter(sets.values())).images.images
        # The number of students is not part of the key of their stages, but it matters to the choice.
        students = {f"{name} {row}": list(stage.units) for name, scored in sets.items() for row, stage in scored.rows.items()}
        return cls._plan(planner, {"best of": list(sets), "students": students}, inputs, images, config, "best")

    @classmethod
    def _plan(
        cls, planner: Planner, params: Mapping[str, Any], inputs: Mapping[str, Stage], images: int, config: RunConfig,
        label: str,
    ) -> Export:  # fmt: skip
        params, stored = {"classes": list(planner.classes.names), **params}, 2 * PNG_SHARE * pixel_bytes(images, config)
        return planner.add(cls("export", params, inputs, images=images, label=label, config=config, stored=stored))

    def choice(self, storage: Storage) -> dict[str, Any]:
        """The exported ``arm``, and what chose it: ``held_out``, the accuracy of each arm, in per cent (empty for a named
        arm). An arm whose set holds all held-out images takes no part. Raises :class:`UserError` if none is
        left."""
        if "best of" not in self.params:
            return {"arm": self.label, "held_out": {}}
        found: dict[str, float] = {}
        for name in self.params["best of"]:
            rows = [stage for key, stage in self.inputs.items() if key.startswith(f"scores {name} ")]
            scores = [_held_out_accuracy(row, storage) for row in rows]
            if None not in scores:
                found[name] = statistics.fmean(score for score in scores if score is not None)
        if not found:
            raise UserError(
                "export=best chooses by held-out training images, and every set holds all of these; name an arm, as in "
                f"export={self.params['best of'][0]}, or lower selection.images_per_class"
            )
        return {"arm": max(found, key=lambda name: found[name]), "held_out": found}

    def results(self, storage: Storage) -> dict[str, Any]:
        return {"exported": self.choice(storage)}

    @classmethod
    def stem(cls, unit: str) -> str:
        return PARQUET.rpartition(".")[0]

    def run(self, context: Context) -> None:
        began, names = time.monotonic(), context.classes.names
        images = self.inputs.get("select") or self.inputs[f"set {self.choice(context.storage)['arm']}"]
        found = read_set(images.artifact(context.storage))
        rows, counts, folders = [], Counter[int](), folder_names(names)
        for image, label in zip(found.pixels, found.labels.tolist(), strict=True):
            rows.append((encode_png(to_pil(image)), f"{folders[label]}/{counts[label]:05d}.png", label))
            counts[label] += 1
        more = {name: tensor.float().numpy() for name in EXTRAS if (tensor := getattr(found, name)) is not None}
        artifact = self.artifact(context.storage)
        digest = artifact.write(PARQUET, parquet_bytes(image_table(rows, names, more)))
        commit_units(artifact, {"result": {"sha256": digest, "images": len(rows)}}, time.monotonic() - began)


def _held_out_accuracy(row: Stage, storage: Storage) -> float | None:
    """Mean accuracy, in per cent, of a row's students with their final weights on held-out training images; None if the set
    leaves none of these images."""
    units = row.artifact(storage).units
    found = [units[unit]["curve"][-1]["val"] for unit in row.units]
    return None if None in found else statistics.fmean(found)


def unpack(context: Context, artifact: Artifact, folder: str) -> None:
    """Write the exported set to ``folder`` of the storage, as ``data/*.parquet`` and as one folder of images per class."""
    parquet = artifact.read(PARQUET, "result")
    for row in pq.read_table(io.BytesIO(parquet)).column("image").to_pylist():
        context.storage.write(f"{folder}/images/{row['path']}", row["bytes"])
    context.storage.write(f"{folder}/data/{PARQUET}", parquet)
