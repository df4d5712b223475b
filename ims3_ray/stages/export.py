"""Export of a set, of a named arm or of the best one, as Parquet files in the layout of the Hugging Face Hub."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.torch import load

from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.data.classes import folder_names
from ims3_ray.data.transforms import to_pil
from ims3_ray.engine.images import ImageStore, pngs_of
from ims3_ray.engine.per_class import each_unit
from ims3_ray.engine.planner import PNG_SHARE, Planner, pixel_bytes
from ims3_ray.engine.pool import ClassUnits
from ims3_ray.engine.sets import EXTRAS, class_shards
from ims3_ray.engine.shards import commit_units, note, read_many, read_notes
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.files import concurrently
from ims3_ray.io.parquet import encode_png, image_table
from ims3_ray.io.storage import Storage
from ims3_ray.stages.select import Select, within_units


class Scored(Protocol):
    """A set of images and the stages that score it, by row of the table."""

    @property
    def images(self) -> Stage: ...

    @property
    def rows(self) -> dict[str, Stage]: ...


FILE_BYTES = 5e8
"""Approximate size of a Parquet file; larger sets are divided into several, as on the Hub."""
ROW_GROUP = 100
"""The least number of images in a row group of a file, unless the file has fewer."""


@dataclass(eq=False)
class Export(Stage):
    """Exports a set. Each unit is a Parquet file ``train-00000-of-00001`` with some of the classes, in order."""

    name, version, of_arm = "export", 3, True

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
        size, names = PNG_SHARE * pixel_bytes(images, config), planner.classes.names
        count = min(len(names), 1 + int(size / FILE_BYTES))
        params = {"classes": list(names), **params, **({"files": count} if count > 1 else {})}
        return planner.add(
            cls(
                "export", params, inputs, images=images, label=label, config=config, stored=2 * size,
                units=tuple(f"train-{number:05d}-of-{count:05d}" for number in range(count)),
            )
        )  # fmt: skip

    def worker(self, config: WorkConfig) -> Worker:
        return Worker("pool", config.actors.cpus)

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

    def run(self, context: Context) -> None:
        began, storage, names = time.monotonic(), context.storage, context.classes.names
        images = self.inputs.get("select") or self.inputs[f"set {self.choice(storage)['arm']}"]
        shared = Exporting(
            images.artifact(storage), self.artifact(storage), names, context.config.actors.encoders,
            StoredPngs.of(images, context),
        )  # fmt: skip
        rows = dict(zip(self.units, np.array_split(np.arange(len(names)), len(self.units)), strict=True))
        if len(rows) == 1:
            write_files(shared, list(rows.items()))
            entries = read_notes(shared.exported, self.units)
        else:
            entries = each_unit(context, self, write_files, shared, rows, what="files")
        commit_units(shared.exported, entries, time.monotonic() - began)


@dataclass(frozen=True)
class StoredPngs:
    """The PNG images of the pool from which a set was chosen."""

    store: ImageStore
    units: Sequence[ClassUnits]

    @classmethod
    def of(cls, images: Stage, context: Context) -> StoredPngs | None:
        """Those of ``images``; None if its images were not stored as PNG or are not as they were stored."""
        if not isinstance(images, Select) or (store := images.pool.store(context.storage)).form != "png":
            return None
        return cls(store, images.pool.class_units(context.storage))

    def __call__(self, position: int, indices: NDArray[np.int64]) -> list[bytes]:
        """The images ``indices``, in ascending order, of the class at ``position``."""
        within = within_units(self.units[position], indices)
        shards = read_many(self.store.artifact, list(within), self.store.suffix)
        return [png for unit, shard in shards for png in pngs_of(shard, within[unit])]


@dataclass(frozen=True)
class Exporting:
    """What a task needs to write some of the files."""

    images: Artifact
    exported: Artifact
    class_names: tuple[str, ...]
    encoders: int
    """Number of threads that encode images."""
    stored: StoredPngs | None


def write_files(task: Exporting, files: Sequence[tuple[str, NDArray[np.int64]]]) -> None:
    """Write some files, each with the classes at some positions, class by class."""
    folders = folder_names(task.class_names)
    units = class_shards(task.images)
    with ThreadPoolExecutor(task.encoders) as encoders:
        for file, positions in files:
            sink, waiting, count = io.BytesIO(), list[pa.Table](), 0
            writer: pq.ParquetWriter | None = None
            for position in positions.tolist():
                tensors = load(task.images.read(f"{units[position]}.safetensors"))
                if task.stored is not None:
                    encoded = task.stored(position, tensors["indices"].numpy())
                else:
                    encoded = list(encoders.map(lambda image: encode_png(to_pil(image)), tensors["pixels"]))
                rows = [(png, f"{folders[position]}/{i:05d}.png", position) for i, png in enumerate(encoded)]
                extras = {name: tensors[name].float().numpy() for name in EXTRAS if name in tensors}
                waiting.append(image_table(rows, task.class_names, extras))
                count += len(rows)
                writer = writer or pq.ParquetWriter(sink, waiting[0].schema, compression="zstd")
                if sum(len(table) for table in waiting) >= ROW_GROUP or position == positions[-1]:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            assert writer is not None
            writer.close()
            digest = task.exported.write(f"{file}.parquet", sink.getvalue())
            note(task.exported, file, {"sha256": digest, "images": count})


def _held_out_accuracy(row: Stage, storage: Storage) -> float | None:
    """Mean accuracy, in per cent, of a row's students with their final weights on held-out training images; None if the set
    leaves none of these images."""
    units = row.artifact(storage).units
    found = [units[unit]["curve"][-1]["val"] for unit in row.units]
    return None if None in found else statistics.fmean(found)


def unpack(context: Context, export: Stage, folder: str) -> None:
    """Write the exported set to ``folder`` of the storage, as ``data/*.parquet`` and as one folder of images per class. What an
    earlier set has left there, which may have had other classes, is deleted."""
    artifact, storage, classes = export.artifact(context.storage), context.storage, set[str]()
    written = {f"data/{unit}.parquet" for unit in export.units}

    def write(image: dict[str, Any]) -> None:
        storage.write(f"{folder}/images/{image['path']}", image["bytes"])
        written.add(f"images/{image['path']}")
        classes.add(image["path"].partition("/")[0])

    for unit in export.units:
        parquet = artifact.read(f"{unit}.parquet")
        for batch in pq.ParquetFile(io.BytesIO(parquet)).iter_batches(ROW_GROUP, columns=["image"]):
            concurrently(write, batch.column("image").to_pylist())
        storage.write(f"{folder}/data/{unit}.parquet", parquet)
    for name in set(storage.folders(f"{folder}/images")) - classes:
        storage.delete(f"{folder}/images/{name}")
    for part in ("data", "images"):
        for name in storage.files(f"{folder}/{part}", recursive=True):
            if f"{part}/{name}" not in written:
                storage.delete_file(f"{folder}/{part}/{name}")
