"""Fine-tuning on Ray Train: groups of classes side by side, each a worker group of its own with its own adapter."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from ims3_ray.artifacts import Artifact, Storage
from ims3_ray.cluster import here
from ims3_ray.config import ClusterConfig, FinetuneConfig, TrainerConfig, canonical
from ims3_ray.cost import finetune_flops
from ims3_ray.data.batches import batch_indices
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.models.generator import load_generator
from ims3_ray.progress import Progress
from ims3_ray.room import Bundle, Request, holds, wait_for_room
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.speed import matmul_rate
from ims3_ray.stages.adapters import Adapters, group_checkpoints, group_unit, series
from ims3_ray.stages.base import Context, Stage, parse_unit, read_class
from ims3_ray.stages.derived import read_latents
from ims3_ray.stages.train import fit
from ims3_ray.stages.zero import ZeroEngine
from ims3_ray.training.finetuning import Finetuner, Row

POST_EVERY = 5
GROW_S = 900.0
"""After which a cluster that has not grown is taken to be as large as it will be: more is asked for no longer."""


class LossBoard:
    """Where rank 0 of each group posts its steps' losses and speed while Ray Train runs, for the driver to show and log."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, Row]] = {}

    def post(self, group: int, rows: list[Row]) -> None:
        self.rows.setdefault(group, {}).update({int(row["step"]): row for row in rows})

    def read(self, group: int, after: int) -> list[Row]:
        """The group's rows of steps later than ``after``."""
        rows = self.rows.get(group, {})
        return [rows[step] for step in sorted(rows) if step > after]


def read_images(pixels: Artifact, latents: Artifact | None, classes: list[tuple[int, list[str]]], flip: bool) -> CleanImages:
    """The images of the given (label of the generator, units), from their latents if there are any."""
    if latents is None:
        parts = [{"pixels": read_class(pixels, units, "pixels")} for _, units in classes]
    else:
        parts = [read_latents(latents, units) for _, units in classes]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    counts = [len(next(iter(part.values()))) for part in parts]
    labels = torch.cat([torch.full((n,), label) for (label, _), n in zip(classes, counts, strict=True)])
    return CleanImages(tensors, labels, flip)


def finetune_loop(plain: dict[str, Any]) -> dict[str, Any]:
    """One worker. Rank 0 returns the adapter (EMA of the trained parameters, safetensors) and the rows of all steps.

    A loss or gradient that is not finite ends the loop; ``diverged`` then says at which step and on which images
    (positions in the order of the classes' images), and there is no adapter.
    """
    config, seed, group = FinetuneConfig.model_validate(plain["config"]), int(plain["seed"]), int(plain["group"])
    began, context = time.monotonic(), ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.trainer.threads_per_worker)
    device = ray.train.torch.get_device()
    images = read_images(plain["images"], plain["latents"], plain["classes"], config.flip)
    steps = config.total_steps(len(images.labels))
    model = load_generator(plain["weights"].path())
    flops = finetune_flops(model.config, config)
    tuner = Finetuner(model, config, device, rank, world, ZeroEngine)
    history: list[Row] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            tuner.load(Path(folder))
            found = json.loads(Path(folder, "losses.json").read_text())
            history, began = found["history"], began - found["seconds"]
        if rank == 0:
            plain["board"].post.remote(group, history)  # a driver that was killed may not have logged them all
    batches = batch_indices(
        len(images.labels), config.batch_size, 0, 1, seed_for(seed, "finetune-order", group) % 2**31, len(history)
    )
    peak = matmul_rate(device, torch.bfloat16 if config.precision == "bf16" else torch.float32) * world
    posted, since = len(history), time.monotonic()
    for step in range(len(history), steps):
        index = next(batches)
        row = {"step": step + 1, **tuner.step(tuner.draw(images, index, generator_for(seed, "finetune", group, step)))}
        if not all(map(math.isfinite, row.values())):
            kept = step // config.checkpoint_every * config.checkpoint_every
            return {"diverged": row, "images": index.tolist(), "kept": kept}
        history.append(row)
        if rank == 0 and (len(history) % POST_EVERY == 0 or len(history) == steps):
            rate = (len(history) - posted) / (time.monotonic() - since)
            flop_rate = rate * config.batch_size * flops
            speed = {
                "images_per_s": rate * config.batch_size, "tflop_per_s": flop_rate / 1e12, "share_of_peak": flop_rate / peak,
            }  # fmt: skip
            post = plain["board"].post.remote(group, [*history[posted:-1], {**history[-1], **speed}])
            if len(history) == steps:
                ray.get(post)  # the driver asks no more once this group has ended
            posted, since = len(history), time.monotonic()
        if len(history) % config.checkpoint_every == 0 and len(history) < steps:
            _checkpoint(tuner, history, time.monotonic() - began)
    if rank != 0:
        return {}
    return {
        "adapter": tuner.adapter(classes=[label for label, _ in plain["classes"]], generator=plain["weights"].digest),
        "history": history,
        "seconds": time.monotonic() - began,
    }


def _checkpoint(tuner: Finetuner, history: list[Row], seconds: float) -> None:
    """All ranks store their part; Ray Train joins the parts into one folder, uploading while training goes on."""
    folder = Path(tempfile.mkdtemp(prefix="ims3-checkpoint-"))
    tuner.save(folder)
    if tuner.rank == 0:
        (folder / "losses.json").write_text(json.dumps({"history": history, "seconds": seconds}))
    ray.train.report(
        {"step": len(history), "loss": history[-1]["loss"]},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


@dataclass(frozen=True)
class Group:
    """Classes that are fine-tuned together."""

    stage: Stage
    number: int
    names: list[str]
    arguments: dict[str, Any]
    """What :func:`finetune_loop` is given."""
    images: int


def groups_of(context: Context, stage: Stage) -> list[Group]:
    """The class groups that ``stage.params`` names by their labels of the generator."""
    encode, latents = stage.inputs["encode"], stage.inputs.get("latents")
    units: dict[int, list[str]] = {label: [] for label in context.classes.source_labels}
    counts: dict[int, int] = dict.fromkeys(units, 0)
    entries = (encode.manifest(context.storage) or {})["units"]
    for unit in encode.units:
        label, _ = parse_unit(unit)
        if label in units:
            units[label].append(unit)
            counts[label] += entries[unit]["images"]
    table = {
        label: (name, source)
        for name, source, label in zip(
            context.classes.names, context.classes.source_labels, context.classes.generator_labels, strict=True
        )
    }
    groups, board = [], ray.remote(num_cpus=0, scheduling_strategy=here())(LossBoard).remote()
    for number, labels in enumerate(stage.params["groups"]):
        arguments = {
            "config": canonical(stage.run.finetune), "seed": stage.run.seed, "group": number,
            "images": encode.artifact(context.storage),
            "weights": stage.weights["generator"],
            "latents": latents.artifact(context.storage) if latents else None,
            "classes": [(label, units[table[label][1]]) for label in labels],
            "board": board,
        }  # fmt: skip
        names = [table[label][0] for label in labels]
        groups.append(Group(stage, number, names, arguments, sum(counts[table[label][1]] for label in labels)))
    return groups


def run(context: Context, stages: Sequence[Stage]) -> None:
    """Fine-tune the groups of all stages that are not committed yet, as many at a time as the cluster has room for."""
    storage, missing = context.storage, {stage: stage.missing(context.storage) for stage in stages}
    open_stages = [stage for stage in stages if missing[stage]]
    if not open_stages:
        return
    waiting = [g for stage in open_stages for g in groups_of(context, stage) if group_unit(g.number) in missing[stage]]
    steps = {id(group): group.stage.run.finetune.total_steps(group.images) for group in waiting}
    title = ", ".join(stage.title for stage in open_stages)
    with Progress(title, sum(steps.values()), "steps") as progress:
        done, committed = dict.fromkeys(steps, 0), time.monotonic()
        for group, rows, outcome in _side_by_side(waiting, storage, context.config.cluster, title):
            stage, own = group.stage, steps[id(group)]
            context.tracker.losses(rows, series(stage, group.number, len(stages) > 1))
            if outcome is not None and "diverged" in outcome:
                raise UserError(_diverged(outcome, image_names(context, stage.inputs["encode"], group)))
            if outcome is not None:
                images = own * stage.run.finetune.batch_size
                context.spend(stage, outcome["seconds"], _trainer(group).num_workers)
                Adapters.of(stage, storage).commit(group.number, outcome, images, time.monotonic() - committed)
                committed = time.monotonic()
            if rows:
                done[id(group)] = int(rows[-1]["step"])
                progress.at(sum(done.values()), _note(rows))
        progress.done = sum(steps.values())


def _note(rows: Sequence[Row]) -> str:
    shares = [row["share_of_peak"] for row in rows if "share_of_peak" in row]
    return f"loss {rows[-1]['loss']:.4f}" + (f", {shares[-1]:.1%} of the device's rate" if shares else "")


def _side_by_side(
    groups: list[Group], storage: Storage, cluster: ClusterConfig, title: str
) -> Iterator[tuple[Group, list[Row], dict[str, Any] | None]]:
    """Yields (group, its new rows, its outcome once there) about every second for each that runs."""
    waiting, running, seen = list(groups), dict[Any, Group](), dict.fromkeys(map(id, groups), 0)
    fit_task = _fit_task.options(scheduling_strategy=here())
    labels, largest = cluster.place.get("finetune", {}), max((_trainer(g) for g in groups), key=lambda t: t.num_workers)
    presence = wait_for_room(cluster, "finetune", title, _bundles(largest), largest.num_workers)
    request = Request(labels) if cluster.wait_s and len(groups) > 1 else None
    fit_at_once, grown = 0, time.monotonic()
    try:
        while waiting or running:
            there = max(1, holds(largest.worker_resources, labels) // largest.num_workers)
            grown = time.monotonic() if there > fit_at_once else grown
            fit_at_once = there
            if cluster.wait_s:
                presence.look()
            while waiting and len(running) < fit_at_once:
                group = waiting.pop(0)
                folder = storage.address(group.stage.artifact(storage).folder)
                running[fit_task.remote(group.arguments, folder, labels)] = group
            if request:  # Ray Train asks for the groups that run; for the one that waits here next nobody does
                more = waiting and time.monotonic() - grown < GROW_S
                request.ask(_bundles(_trainer(waiting[0])) if more else [])
            finished, _ = ray.wait(list(running), timeout=1.0)
            for task, group in list(running.items()):
                outcome = None
                if task in finished:
                    del running[task]
                    outcome = ray.get(task)
                rows: list[Row] = ray.get(group.arguments["board"].read.remote(group.number, seen[id(group)]))
                seen[id(group)] = max([seen[id(group)], *(int(row["step"]) for row in rows)])
                yield group, rows, outcome
    finally:
        if request:
            request.let_go()


def _trainer(group: Group) -> TrainerConfig:
    return group.stage.run.finetune.trainer


def _bundles(trainer: TrainerConfig) -> list[Bundle]:
    return [trainer.worker_resources] * trainer.num_workers


def image_names(context: Context, encode: Stage, group: Group) -> list[str]:
    """What the source calls the group's images, in the order in which fine-tuning has them: without those that are broken."""
    source = open_source(encode.places["path"], encode.places["split"])
    entries = (encode.manifest(context.storage) or {})["units"].values()
    broken = [line for entry in entries for line in entry["broken"]]
    indices = [np.flatnonzero(source.labels == source.class_names.index(name)) for name in group.names]
    names = [source.identify(int(index)) for index in np.concatenate(indices)]
    return [name for name in names if not any(line.startswith(f"{name}: ") for line in broken)]


def _diverged(outcome: dict[str, Any], names: list[str]) -> str:
    row, images = outcome["diverged"], [names[position] for position in outcome["images"]]
    wrong = ", ".join(f"{key} {value:g}" for key, value in row.items() if not math.isfinite(value))
    kept = f"the checkpoint of step {outcome['kept']} is kept" if outcome["kept"] else "there is no checkpoint before it"
    return (
        f"fine-tuning diverged at step {row['step']:g} ({wrong}) on images {', '.join(images)}; "
        f"{kept}; lower finetune.lr or the weights of finetune.objectives"
    )


@ray.remote(num_cpus=0)
def _fit_task(arguments: dict[str, Any], folder: str, labels: dict[str, str]) -> dict[str, Any]:
    """Ray Train blocks its caller; in a task of its own the driver is free to show progress."""
    config = FinetuneConfig.model_validate(arguments["config"])
    place = f"{folder}/{group_checkpoints(arguments['group'])}"
    return fit(finetune_loop, arguments, config.trainer, checkpoints_name(config), place, labels)


def checkpoints_name(config: FinetuneConfig) -> str:
    """Names apart what cannot go on from each other's checkpoints: ZeRO stages, and under ZeRO 1 to 3 numbers of workers."""
    return f"zero-{config.zero_stage}" + (f"-{config.trainer.num_workers}-workers" if config.zero_stage else "")
