"""Seconds and memory of the parts that grow with the number of classes and images, on stand-ins, as JSON.

    python benchmarks/scale.py                          C = 1000, K = 50, G = 20: 1.3 million files, some 60 GB of disk, an hour
    python benchmarks/scale.py classes=20 per_class=5 images=50 rows=100 units=100         in a minute

`plan` lists a folder with `images` files a class and plans IMS3 from it. `parquet` opens a Parquet file of `rows` images and
reads some. `s3` adds up the embeddings of all candidates and solves Eq. 10. `export` writes the first of the Parquet files of a
set (`files` says how many there are; they are written side by side). `student` is what one student reads: its set, the test
images (50 a class) and the held-out ones, when nothing is cached on the machine and when all is. `driver` passes units without
work through the actor pool, with two actors.

`seconds` is wall time, `cpu_s` the processor time of the process, `peak_gb` the largest amount of memory of the process that is
not mapped from files, above that of the imported libraries (`base_gb`). Each part runs in a process of its own, and so does
each of the two rows of `student`; what a part reads is written before, and removed after it. Files are as large as photographs
but hold random or no data.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.cli import main
from ims3_ray.cluster.hardware import hardware
from ims3_ray.config import ActorsConfig, ClusterConfig, EvaluationConfig, RunConfig, Section
from ims3_ray.data.sources import open_source
from ims3_ray.engine.images import ImageStore, Produced
from ims3_ray.engine.planner import PNG_SHARE, class_units
from ims3_ray.engine.sets import RealSplit, commit_set, held_out, read_set, write_class
from ims3_ray.engine.shards import commit_units, pack_tensors, unit_name, units_of
from ims3_ray.engine.worker import Work
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import image_table
from ims3_ray.io.storage import Storage
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.plan import make_plan
from ims3_ray.selection.s3 import S3, S3Config
from ims3_ray.stages.export import FILE_BYTES, Exporting, write_files
from ims3_ray.stages.s3 import Part, S3Selector
from ims3_ray.training.generator import packed

Name = Literal["plan", "parquet", "s3", "export", "student", "driver"]
PHOTOGRAPH_BYTES = 110_000
UNIT = 50
"""Number of images per shard of embeddings."""


class BenchmarkConfig(Section):
    parts: tuple[Name, ...] = ("plan", "parquet", "s3", "export", "student", "driver")
    classes: int = Field(default=1000, ge=2)
    per_class: int = Field(default=50, ge=1)
    """K, the number of images of each class in a set."""
    groups: int = Field(default=20, ge=1)
    """G, the number of candidate subgroups of each class."""
    images: int = Field(default=1281, ge=1)
    """Number of training images of each class that are listed."""
    rows: int = Field(default=7300, ge=1)
    """Number of images in the Parquet file; 7,300 are 0.8 GB."""
    size: int = Field(default=256, ge=8)
    """Height and width of the stored images; students take seven eighths of it."""
    features: int = Field(default=512, ge=2)
    units: int = Field(default=20_000, ge=1)
    """Number of units that the driver passes: once as for two actors, one by one, and once as for 500, ten at a time."""
    folder: str | None = None
    """Folder for the stand-ins, on a disk with enough space; a temporary one when unset."""


class Meter:
    """The memory of this process that is not mapped from files, looked at fifty times a second."""

    def __init__(self) -> None:
        self.base = self.peak = anonymous_bytes()
        self.rows: dict[str, dict[str, float]] = {}
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.02)

    @contextmanager
    def measured(self, name: str) -> Iterator[dict[str, float]]:
        self.peak, began, worked = anonymous_bytes(), time.perf_counter(), time.process_time()
        row: dict[str, float] = {}
        yield row
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
        peak = max(self.peak, anonymous_bytes()) - self.base
        self.rows[name] = {"seconds": round(seconds, 2), "cpu_s": round(cpu, 2), "peak_gb": round(peak / 1e9, 3), **row}


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def random_images(count: int, size: int, seed: int) -> Tensor:
    """uint8 [count, 3, size, size] of smooth noise, which PNG makes about as small as photographs."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(size=(count, 3, max(2, size // 8), max(2, size // 8))))
    smooth = torch.nn.functional.interpolate(coarse.float(), (size, size), mode="bicubic") * 50 + 128
    return (smooth + torch.from_numpy(rng.normal(size=smooth.shape)).float() * 4).clamp(0, 255).byte()


# plan


def write_folder(config: BenchmarkConfig, folder: Path) -> None:
    """Empty files of the size of photographs, which take no space, and a small generator that knows the classes."""
    names = [f"n{label:08d}" for label in range(config.classes)]
    for split, count in (("train", config.images), ("test", max(1, min(50, config.images)))):
        for name in names:
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                file = place / f"{split}_{number * 7}.JPEG"
                file.touch()
                os.truncate(file, PHOTOGRAPH_BYTES)
    shape = DiTConfig(
        input_size=28, in_channels=1, patch_size=14, hidden_size=16, depth=1, num_heads=2, num_classes=config.classes
    )
    (folder / "dit.safetensors").write_bytes(packed(DiT(shape), names))


def plan(config: BenchmarkConfig, folder: Path, meter: Meter) -> None:
    photos = str(folder / "photos")
    with meter.measured("list"):
        source = open_source(photos, "train")
    with meter.measured("fingerprint"):
        source.fingerprint  # noqa: B018
    del source
    arm = {"title": "IMS3", "images": "generated", "finetune": True, "select": "s3"}
    run = RunConfig.model_validate(
        {
            "data": {"path": photos}, "generator": str(folder / "dit.safetensors"), "arms": {"ims3": arm}, "export": "ims3",
            "selection": {"groups": config.groups, "images_per_class": config.per_class}, "sampling": {"unit_size": UNIT},
        }
    )  # fmt: skip
    with meter.measured("plan") as row:
        stages = make_plan(run).stages
        row |= {"stages": len(stages), "units": sum(len(stage.units) for stage in stages)}


# parquet


def write_parquet(config: BenchmarkConfig, folder: Path) -> None:
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rows = [(rng.bytes(PHOTOGRAPH_BYTES), f"{number}.jpg", number % config.classes) for number in range(config.rows)]
    names = [str(label) for label in range(config.classes)]
    pq.write_table(image_table(rows, names), folder / "train.parquet", row_group_size=100)


def parquet(config: BenchmarkConfig, folder: Path, meter: Meter) -> None:
    from ims3_ray.data.sources.parquet import ParquetSource

    with meter.measured("open"):
        source = open_source(str(folder / "train.parquet"), "train")
    assert isinstance(source, ParquetSource)
    with meter.measured("read"):
        for index in range(0, config.rows, max(1, config.rows // 1000)):
            source.stored(index)


# s3


def artifact(folder: Path, stage: str, key: str) -> Artifact:
    return Artifact(Storage.at(str(folder)), stage, key)


def write_embeddings(config: BenchmarkConfig, folder: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for name, count in (("candidates", config.groups * config.per_class), ("references", config.images)):
        embeddings, entries = artifact(folder, "embed", name), {}
        for label in range(config.classes):
            for unit in units_of(label, count, UNIT):
                features = torch.randn(UNIT, config.features, generator=rng).half() + label % 7
                digest = embeddings.write(f"{unit}.safetensors", pack_tensors(features=features))
                entries[unit] = {"sha256": digest, "images": UNIT}
        commit_units(embeddings, entries, 0.0)


def s3(config: BenchmarkConfig, folder: Path, meter: Meter) -> None:
    parts = {}
    for name, count, size in (
        ("candidates", config.groups * config.per_class, config.per_class), ("references", config.images, config.images),
    ):  # fmt: skip
        first = {unit: i * UNIT for label in range(config.classes) for i, unit in enumerate(units_of(label, count, UNIT))}
        labels = tuple(range(config.classes))
        groups = count // size
        parts[name] = Part(artifact(folder, "embed", name), labels, first, dict.fromkeys(labels, count), size, groups)
    with meter.measured("read"):
        selector = S3Selector(parts, S3(S3Config()))
    with meter.measured("select"):
        assert selector.select() is not None


# export and student


def write_images(config: BenchmarkConfig, folder: Path, kind: str, classes: int, per_class: int, seed: int = 0) -> Artifact:
    """A set of images, the same number of each class. Another ``seed`` gives other images."""
    images, units, entries = artifact(folder, kind, "images"), class_units(classes), {}
    for number, unit in enumerate(units):
        entries[unit] = write_class(images, unit, random_images(per_class, config.size, seed + number))
    commit_set(images, entries, 0.0)
    return images


def files_of(config: BenchmarkConfig) -> int:
    """Number of Parquet files of the exported set."""
    size = PNG_SHARE * config.classes * config.per_class * 3 * config.size**2
    return min(config.classes, 1 + int(size / FILE_BYTES))


def write_first_classes(config: BenchmarkConfig, folder: Path) -> None:
    write_images(config, folder, "select", -(-config.classes // files_of(config)), config.per_class)


def export(config: BenchmarkConfig, folder: Path, meter: Meter) -> None:
    images, exported = artifact(folder, "select", "images"), artifact(folder, "export", "images")
    names = tuple(str(label) for label in range(len(images.units)))
    with meter.measured("one file") as row:
        write_files(Exporting(images, exported, names, 2, None), [("train", np.arange(len(names)))])
        written = folder / exported.folder / "shards" / "train.parquet"
        row |= {"images": len(names) * config.per_class, "file_gb": round(written.stat().st_size / 1e9, 3)}
        row["files"] = files_of(config)


def write_student(config: BenchmarkConfig, folder: Path) -> None:
    write_images(config, folder, "select", config.classes, config.per_class)
    write_images(config, folder, "held_out", config.classes, EvaluationConfig().held_out(config.classes), config.classes)
    test, entries = artifact(folder, "encode", "test"), {}
    for label in range(config.classes):
        pixels = random_images(50, config.size, label)
        digest = test.write(f"{unit_name(label, 0)}.safetensors", pack_tensors(pixels=pixels))
        entries[unit_name(label, 0)] = {"sha256": digest, "images": len(pixels)}
    commit_units(test, entries, 0.0)


def student(config: BenchmarkConfig, folder: Path, meter: Meter, name: str = "nothing cached") -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    size = config.size * 7 // 8
    units = tuple((unit_name(label, 0),) for label in range(config.classes))
    with meter.measured(name) as row:
        chosen, val = artifact(folder, "select", "images"), artifact(folder, "held_out", "images")
        found = read_set(chosen, size=size)
        test = RealSplit(ImageStore(artifact(folder, "encode", "test"), "pixels"), units).read(size, 0.875)
        held = held_out(val, chosen, size, 0.875)
        for pixels in (found.pixels, test[0], held[0]):
            for image in pixels[:: max(1, len(pixels) // 1000)]:
                assert image.max() > 0
        row["images"] = len(found.pixels) + len(test[0]) + len(held[0])


# driver


def driver(config: BenchmarkConfig, folder: Path, meter: Meter) -> None:
    from ims3_ray.cluster.joining import connected
    from ims3_ray.engine.actors import MOST_AT_ONCE, run_units

    def empty(unit: str) -> Produced:
        return Produced(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), [unit])

    actors, cluster = ActorsConfig(count=2, cpus=0.5), ClusterConfig()
    work = Work(lambda device: empty, None, (), artifact(folder, "encode", "nothing"))
    with connected(cluster, {}), redirect_stdout(sys.stderr):
        list(run_units([(0, unit_name(0, number)) for number in range(4)], [work], actors, cluster))
        for number, (name, at_once) in enumerate((("one by one", 1), ("ten at a time", MOST_AT_ONCE)), 1):
            units = [(0, unit_name(number, unit)) for unit in range(config.units)]
            with meter.measured(name) as row:
                began, done = time.perf_counter(), iter(run_units(units, [work], actors, cluster, at_once))
                next(done)
                row["first_unit_s"] = round(time.perf_counter() - began, 2)
                row["units"] = 1 + sum(1 for _ in done)
            of_units = meter.rows[name]
            of_units["units_per_s"] = round(config.units / of_units["seconds"], 1)
            of_units["cpu_ms_per_unit"] = round(1000 * of_units["cpu_s"] / config.units, 2)


def nothing(config: BenchmarkConfig, folder: Path) -> None:
    """The driver reads nothing."""


Measured = Callable[[BenchmarkConfig, Path, Meter], None]
PARTS: dict[Name, tuple[Callable[[BenchmarkConfig, Path], None], *tuple[Measured, ...]]] = {
    "plan": (write_folder, plan), "parquet": (write_parquet, parquet), "s3": (write_embeddings, s3),
    "export": (write_first_classes, export), "student": (write_student, student, partial(student, name="cached")),
    "driver": (nothing, driver),
}  # fmt: skip
"""Part → what writes its stand-ins, and what is measured, each in a process of its own."""


def measure(measured: Measured, config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    os.environ.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
    meter = Meter()
    with redirect_stdout(sys.stderr):
        measured(config, folder, meter)
    return {name: {**row, "base_gb": round(meter.base / 1e9, 3)} for name, row in meter.rows.items()}


def benchmark(config: BenchmarkConfig) -> None:
    found: dict[str, Any] = {}
    for name in config.parts:
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=config.folder))
        try:
            context, (write, *measured) = multiprocessing.get_context("spawn"), PARTS[name]
            found[name] = {}
            for work in (write, *(partial(measure, each) for each in measured)):
                with context.Pool(1) as process:
                    found[name] |= process.apply(work, (config, folder)) or {}
        finally:
            shutil.rmtree(folder)
        print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    print(json.dumps({"machine": hardware("cpu"), "config": config.model_dump(), **found}, indent=1))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
