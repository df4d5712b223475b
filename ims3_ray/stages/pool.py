"""Units of work on a Ray Data actor pool: real images decoded, candidates generated, both embedded by φ.

One actor does all that a unit needs (generate → shard → φ → shard), so pixels never cross Ray's object store and no
two pools compete for the same devices. Rows of a few hundred bytes come back.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.config import ActorsConfig, DataConfig, SamplingConfig
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_pixels, to_uint8
from ims3_ray.diffusion.sampling import guided, sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import load_autoencoder
from ims3_ray.progress import Progress
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels
from ims3_ray.stages.base import Context, Stage, commit_units, pack_tensors, parse_unit
from ims3_ray.stages.derived import Derive, Features, Latents
from ims3_ray.stages.weights import Weights

Produced = tuple[Tensor, list[str]]
"""uint8 pixels [n, C, H, W] and the names of images that could not be decoded."""

Producer = Callable[[str], Produced]

DECODED_AT_ONCE = 8
"""Latents per call of the autoencoder, whose activations are many times those of the generator."""


def actor_device() -> str:
    return "cuda" if ray.get_gpu_ids() else "cpu"


class RealImages:
    """Decodes a data source. Unit u of a class is its images u·unit_size … in the source's order."""

    def __init__(self, data: DataConfig, path: str, split: str) -> None:
        self.data, self.source = data, open_source(path, split)

    def __call__(self, unit: str) -> Produced:
        label, number = parse_unit(unit)
        size = self.data.unit_size
        indices = np.flatnonzero(self.source.labels == label)[number * size : (number + 1) * size]
        pixels, broken = [], []
        for index in indices.tolist():
            try:
                pixels.append(to_pixels(self.source.image(index), self.data.size, self.data.channels))
            except OSError as error:
                broken.append(f"{self.source.identify(index)}: {str(error).splitlines()[0]}")
        empty = np.zeros((0, self.data.channels, self.data.size, self.data.size), np.uint8)
        return torch.from_numpy(np.stack(pixels) if pixels else empty), broken


class Candidates:
    """Samples the generator. Image ``index`` of a class starts from noise seeded by (run seed, class, index) alone."""

    def __init__(
        self, sampling: SamplingConfig, weights: Path, adapters: Adapters | None, autoencoder: Path | None, seed: int
    ) -> None:
        self.sampling, self.seed, self.device = sampling, seed, actor_device()
        self.models = GroupModels(weights, adapters, self.device)
        self.autoencoder = load_autoencoder(autoencoder).to(self.device) if autoencoder is not None else None
        self.schedule = NoiseSchedule()

    def __call__(self, unit: str) -> Produced:
        label, number = parse_unit(unit)
        model = self.models.of_class(label)
        s, shape = self.sampling, model.config
        first = number * s.unit_size
        rngs = [generator_for(self.seed, "image", label, index) for index in range(first, first + s.unit_size)]
        y = torch.full((s.unit_size,), label, device=self.device)
        with torch.inference_mode():
            predict = guided(model, y, shape.null_label, s.cfg_scale, s.cfg_channels)
            signed = sample(
                predict, (shape.in_channels, shape.input_size, shape.input_size), rngs, self.schedule, s.steps,
                eta=s.eta, clip=s.clip, device=self.device,
            )  # fmt: skip
            if self.autoencoder is not None:
                signed = torch.cat([self.autoencoder.decode(z) for z in signed.split(DECODED_AT_ONCE)])
        return to_uint8(signed).cpu(), []


class Stored:
    """Reads units that were produced before, so that another φ or an autoencoder can look at them."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    def __call__(self, unit: str) -> Produced:
        return load(self.artifact.read(f"{unit}.safetensors"))["pixels"], []


class UnitWorker:
    """One actor of the pool: produces a unit, stores it, derives features or latents of it, stores them."""

    def __init__(
        self, producer: Callable[[], Producer], pixels: Artifact | None, derive: Callable[[str], Derive] | None,
        derived: Artifact | None, threads: int,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads)
        self.produce = producer()
        self.pixels, self.derived = pixels, derived
        self.derive = derive(actor_device()) if derive is not None else None

    def __call__(self, row: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        unit, began = str(row["unit"][0]), time.monotonic()
        entry: dict[str, Any] = {}
        try:
            pixels, broken = self.produce(unit)
            entry = {"images": len(pixels), "broken": broken}
            if self.pixels is not None:
                entry["sha256"] = self.pixels.write(f"{unit}.safetensors", pack_tensors(pixels=pixels))
            if self.derived is not None and self.derive is not None:
                produced = time.monotonic()
                suffix, content = self.derive(pixels)
                entry["derived_sha256"] = self.derived.write(f"{unit}.{suffix}", content)
                entry["derived_seconds"] = time.monotonic() - produced
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # one bad unit must not take the job with it; the driver decides what to do
            entry = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        entry["seconds"] = time.monotonic() - began
        return {"unit": [unit], "entry": [json.dumps(entry)]}


class IncompletePool(RuntimeError):
    """Units that failed on every attempt."""


def run_units(units: list[str], worker: dict[str, Any], actors: ActorsConfig) -> Iterable[tuple[str, dict[str, Any]]]:
    """Work through ``units`` on the pool; yields (unit, entry) as each is finished, errors included."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.max_consecutive_actor_init_deaths = 10
    for handler in logging.getLogger("ray.data").handlers:  # the terminal is ours; Ray's own log file keeps everything
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    size = min(actors.count, len(units))
    rows = (
        ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
        .map_batches(
            UnitWorker,
            fn_constructor_kwargs=worker,
            batch_size=1,
            num_cpus=actors.cpus,
            num_gpus=actors.gpus or None,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        )
        .iter_rows()
    )
    for row in rows:
        yield row["unit"], json.loads(row["entry"])


def produce(context: Context, source: Stage, derived: Stage | None) -> None:
    """Make what is missing of a pool (real or generated) and of what is derived from it, in one pass where both are."""
    storage = context.storage
    missing = source.missing(storage)
    to_derive = derived.missing(storage) if derived is not None else []
    both = [unit for unit in missing if unit in set(to_derive)]
    alone = [unit for unit in missing if unit not in set(to_derive)]
    again = [unit for unit in to_derive if unit not in set(missing)]
    producer = _producer(context, source)
    _make(context, producer, source, derived, both)
    _make(context, producer, source, None, alone)
    _make(context, partial(Stored, source.artifact(storage)), None, derived, again)


def check_decoded(context: Context, encode: Stage) -> None:
    """:class:`UserError` for a class of which too few images could be decoded."""
    needed = context.config.selection.images_per_class if encode.label == "train" else 1
    units = (encode.manifest(context.storage) or {})["units"]
    for name, label in zip(context.classes.names, context.classes.source_labels, strict=True):
        entries = [entry for unit, entry in units.items() if parse_unit(unit)[0] == label]
        decoded = sum(entry["images"] for entry in entries)
        if decoded < needed:
            broken = sum(len(entry["broken"]) for entry in entries)
            raise UserError(
                f"class '{name}' has {decoded} {encode.label} images that can be decoded ({broken} cannot), fewer than "
                f"{needed}; replace the broken files or leave the class out with data.classes"
            )


def _make(
    context: Context, producer: Callable[[], Producer], source: Stage | None, derived: Stage | None, units: list[str]
) -> None:
    """Run ``units``, commit what succeeded, try failures again, raise :class:`IncompletePool` if some remain."""
    if not units:
        return
    stage = source or derived
    assert stage is not None
    pixels = source.artifact(context.storage) if source else None
    made = derived.artifact(context.storage) if derived else None
    noted = stage.artifact(context.storage)
    done = _already_whole(noted, made, units)
    pending = [unit for unit in units if unit not in done]
    worker = {
        "producer": producer, "pixels": pixels, "derive": _derive(derived) if derived else None, "derived": made,
        "threads": context.config.actors.threads,
    }  # fmt: skip
    began = time.monotonic()
    failed: dict[str, str] = {}
    per_unit = stage.images / len(stage.units)
    with Progress(stage.title, round(per_unit * len(units)), "images") as progress:
        progress.at(round(per_unit * len(done)))
        for _ in range(context.config.actors.max_attempts):
            failed = {}
            for unit, entry in run_units(pending, worker, context.config.actors) if pending else []:
                if "error" in entry:
                    failed[unit] = entry["error"]
                    continue
                done[unit] = entry
                noted.write(f"{unit}.json", json.dumps(entry).encode())
                progress.advance(entry["images"])
            pending = list(failed)
    seconds = time.monotonic() - began
    deriving = seconds * _derived_share(done) if pixels else seconds
    if pixels is not None:
        commit_units(pixels, done, seconds - deriving)
    if made is not None:
        commit_units(made, done, deriving)
    if failed:
        unit, error = next(iter(failed.items()))
        raise IncompletePool(f"{stage.title}: {len(failed)} of {len(units)} units failed every attempt; {unit}: {error}")


def _derived_share(entries: dict[str, dict[str, Any]]) -> float:
    """How much of the actors' time went into what is derived, where one pass does both."""
    total = sum(entry["seconds"] for entry in entries.values())
    return sum(entry.get("derived_seconds", 0.0) for entry in entries.values()) / total if total else 0.0


def _already_whole(noted: Artifact, derived: Artifact | None, units: list[str]) -> dict[str, dict[str, Any]]:
    """Entries of units that an interrupted run had finished: the note is written after the shards, beside one of them."""
    notes = noted.shards()
    whole = {name.split(".")[0] for name in derived.shards()} if derived else set(units)
    return {unit: json.loads(noted.read(f"{unit}.json")) for unit in units if f"{unit}.json" in notes and unit in whole}


def _derive(stage: Stage) -> Callable[[str], Derive]:
    """What an actor builds for itself when it starts, to derive ``stage`` from images."""
    if stage.kind == "latents":
        return partial(_latents, stage.weights["autoencoder"], flips=stage.params["flips"])
    return partial(_features, stage.weights["encoder"])


def _latents(weights: Weights, device: str, flips: int) -> Latents:
    return Latents(weights.path(), device, flips)


def _features(weights: Weights, device: str) -> Features:
    return Features(weights.path(), device)


def _producer(context: Context, source: Stage) -> Callable[[], Producer]:
    """What an actor builds for itself when it starts."""
    config = context.config
    if source.kind == "encode":
        return partial(RealImages, config.data, source.places["path"], source.places["split"])
    adapters = Adapters.of(source.inputs["finetune"], context.storage) if "finetune" in source.inputs else None
    return partial(_candidates, config.sampling, source.weights, adapters, config.seed)


def _candidates(sampling: SamplingConfig, weights: Mapping[str, Weights], adapters: Adapters | None, seed: int) -> Candidates:
    autoencoder = weights["autoencoder"].path() if "autoencoder" in weights else None
    return Candidates(sampling, weights["generator"].path(), adapters, autoencoder, seed)
