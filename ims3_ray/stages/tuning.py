"""Training of a generator on Ray Train: groups of classes are trained in parallel, each by its own worker group with its own
adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import ray

from ims3_ray.cluster.capacity import LOST_S, Bundle, Request, holds, wait_for_capacity
from ims3_ray.cluster.joining import here, most_at_once
from ims3_ray.config import ClusterConfig, FinetuneConfig, TrainerConfig, WorkConfig, canonical
from ims3_ray.engine.board import new_board
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import parse_unit
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.tasks import ended_if_damaged, result_of
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.models.generators.base import Generator
from ims3_ray.progress import Progress, title_of
from ims3_ray.stages.adapters import Adapters, Pretrained, adapter_stem, group_checkpoints, group_unit
from ims3_ray.stages.captions import captions_by_class
from ims3_ray.stages.encode import Encode, decoded_indices
from ims3_ray.tracking import slug
from ims3_ray.training.finetuning import Row

PLACES_AND_SPEED = ("trainer", "checkpoint_every", "activation_checkpointing", "accumulate", "zero_stage", "compile")
"""Settings that determine where, how safely and how fast a fine-tuning runs. They change its results by rounding at most."""
GROW_S = 900.0
"""Seconds without growth after which the cluster is taken to have its final size, and no more nodes are requested."""


@dataclass(eq=False)
class Tuning(Stage):
    """Trains some of the generator's parameters. Each class group is a unit with its adapter and the losses of all its steps.

    A subclass says in :attr:`~ims3_ray.engine.stage.Stage.run_config`, as ``finetune``, how it trains.
    """

    exclusive = True

    described_as: ClassVar[str] = "fine-tuning"
    remedy: ClassVar[str] = "finetune.lr or the weights of finetune.objectives"
    """Settings to lower if the training diverges."""
    among_others: bool = False
    """Whether the plan has several such stages, so that their names have to differ in MLflow."""

    @classmethod
    def added(cls, planner: Planner, stage: Self) -> Self:
        """Add the stage to a plan. Where the plan has several trainings of generators, their names differ in MLflow."""
        found = planner.add(stage)
        alike = [each for each in planner.stages if isinstance(each, Tuning)]
        for each in alike:
            each.among_others = len(alike) > 1
        return found

    def worker(self, config: WorkConfig) -> Worker:
        trainer = self.run_config.finetune.trainer
        return Worker("finetune", trainer.cpus_per_worker, trainer.gpus_per_worker, trainer.num_workers)

    @classmethod
    def stem(cls, unit: str) -> str:
        return adapter_stem(unit)

    def pretrained(self, storage: Storage) -> Pretrained:
        """The generator before this training."""
        return Pretrained.of(self, storage)

    def run(self, context: Context) -> None:
        self.run_all(context, [self])

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[Tuning]) -> None:
        """Fine-tune the groups of all stages that are not committed yet, as many at a time as the cluster has room for."""
        finetune_groups(context, stages)

    def curves(self, storage: Storage) -> dict[str, list[dict[str, float]]]:
        adapters = Adapters.of(self, storage)
        return {self.prefix(group): adapters.losses(group) for group in range(len(adapters.groups))}

    def prefix(self, group: int) -> str:
        """Prefix of the names of a group's losses in MLflow; empty unless there are several groups or fine-tunings."""
        name = slug(self.title) if self.among_others else ""
        return "".join(f"{part}/" for part in (name, group_unit(group) if len(self.units) > 1 else "") if part)


@dataclass(frozen=True)
class Group:
    """Classes that are fine-tuned together."""

    stage: Tuning
    number: int
    names: list[str]
    arguments: dict[str, Any]
    """Arguments of :func:`~ims3_ray.stages.finetune_worker.finetune_loop`."""
    images: int


def check_variance(config: FinetuneConfig, generator: Generator, section: str) -> None:
    """Raises :class:`UserError` if an objective trains a variance that the generator does not predict."""
    for objective in config.objectives.active:
        if objective.needs_variance(config.objectives.of(objective)) and not generator.learns_variance:
            key = f"{section}.objectives.{objective.name}.variance"
            raise UserError(f"generator '{generator.title}' predicts no variance; set {key}=false")


def check_parameters(config: FinetuneConfig, generator: Generator, section: str) -> None:
    """Raises :class:`UserError` for parameters, or words, that the generator does not have; ``section`` is that of the keys."""
    if config.parameters not in generator.trainable:
        able = " or ".join(generator.trainable)
        raise UserError(
            f"generator '{generator.title}' has no parameters called {config.parameters}; set {section}.parameters={able}"
        )
    if config.words == "captions" and not generator.takes_words:
        raise UserError(f"generator '{generator.title}' is told labels, not words; set {section}.words=class")


def groups_of(context: Context, stage: Tuning) -> list[Group]:
    """The class groups of a fine-tuning; ``stage.params`` lists their classes by the generator's labels."""
    encode, latents = cast(Encode, stage.inputs["encode"]), stage.inputs.get("latents")
    units: dict[int, list[str]] = {label: [] for label in encode.labels}
    counts: dict[int, int] = dict.fromkeys(units, 0)
    entries = (encode.manifest(context.storage) or {})["units"]
    for unit in encode.units:
        label, _ = parse_unit(unit)
        if label in units:
            units[label].append(unit)
            counts[label] += entries[unit]["images"]
    tuned = [label for group in stage.params["groups"] for label in group]
    table = {label: (name, source) for name, source, label in zip(context.classes.names, encode.labels, tuned, strict=True)}
    captions = None
    if stage.run_config.finetune.words == "captions":
        captions = captions_by_class(encode, stage.run_config, context.storage)
    groups, board = [], new_board()
    for number, labels in enumerate(stage.params["groups"]):
        arguments = {
            "config": canonical(stage.run_config.finetune), "seed": stage.run_config.seed, "group": number,
            "images": encode.store(context.storage),
            "pretrained": stage.pretrained(context.storage),
            "latents": latents.artifact(context.storage) if latents else None,
            "classes": [(label, units[table[label][1]]) for label in labels],
            "captions": [text for label in labels for text in captions[table[label][1]]] if captions else None,
            "board": board,
        }  # fmt: skip
        names = [table[label][0] for label in labels]
        groups.append(Group(stage, number, names, arguments, sum(counts[table[label][1]] for label in labels)))
    return groups


def finetune_groups(context: Context, open_stages: Sequence[Tuning]) -> None:
    """Fine-tune the missing groups of all stages, as many at a time as the cluster has room for."""
    storage, missing = context.storage, {stage: stage.missing(context.storage) for stage in open_stages}
    waiting = [g for stage in open_stages for g in groups_of(context, stage) if group_unit(g.number) in missing[stage]]
    steps = {id(group): group.stage.run_config.finetune.total_steps(group.images) for group in waiting}
    title = title_of(stage.title for stage in open_stages)
    with Progress(title, sum(steps.values()), "steps") as progress:
        done, committed = dict.fromkeys(steps, 0), time.monotonic()
        for group, rows, outcome in _side_by_side(waiting, storage, context.config.cluster, title):
            stage, own = group.stage, steps[id(group)]
            context.tracker.losses(rows, stage.prefix(group.number))
            if outcome is not None and "diverged" in outcome:
                raise UserError(_diverged(stage, outcome, image_names(context, cast(Encode, stage.inputs["encode"]), group)))
            if outcome is not None:
                images = own * stage.run_config.finetune.batch_size
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
    """Fine-tune groups in parallel. Yields (group, its new rows, its outcome) for each running group about every second; the
    outcome is None until the group has ended."""
    from ims3_ray.engine.train import fit_task  # Ray Train takes a second to import, which pool actors do without
    from ims3_ray.stages.finetune_worker import finetune_loop

    waiting, running, seen = list(groups), dict[Any, Group](), dict.fromkeys(map(id, groups), 0)
    labels, largest = cluster.place.get("finetune", {}), max((_trainer(g) for g in groups), key=lambda t: t.num_workers)
    watch = wait_for_capacity(cluster, "finetune", title, _bundles(largest), largest.num_workers)
    request = Request(labels) if cluster.wait_s and len(groups) > 1 else None
    fit_at_once, grown = 0, time.monotonic()
    with ended_if_damaged(running), ExitStack() as at_end:
        if request:
            at_end.callback(request.let_go)
        while waiting or running:
            there = groups_at_once(largest, cluster)
            grown = time.monotonic() if there > fit_at_once else grown
            fit_at_once = there
            watch.look(ask=False, patience_s=LOST_S)  # Ray Train asks for the nodes of the groups that run
            while waiting and len(running) < fit_at_once:
                group = waiting.pop(0)
                if Adapters.of(group.stage, storage).made_meanwhile(group.number):
                    continue
                place = storage.address(f"{group.stage.artifact(storage).folder}/{group_checkpoints(group.number)}")
                name = checkpoints_name(group.stage.run_config.finetune)
                task = fit_task.options(scheduling_strategy=here()).remote(
                    finetune_loop, group.arguments, _trainer(group), name, place, labels
                )
                running[task] = group
            if request:  # Ray Train requests nodes for the running groups only, not for the group that is next
                more = waiting and time.monotonic() - grown < GROW_S
                request.ask(_bundles(_trainer(waiting[0])) if more else [])
            finished, _ = ray.wait(list(running), timeout=1.0)
            for task, group in list(running.items()):
                outcome = None
                if task in finished:
                    del running[task]
                    outcome = result_of(task, group.stage.title)
                rows: list[Row] = ray.get(group.arguments["board"].read.remote(group.number, seen[id(group)]))
                seen[id(group)] = max([seen[id(group)], *(int(row["step"]) for row in rows)])
                yield group, rows, outcome


def groups_at_once(trainer: TrainerConfig, cluster: ClusterConfig) -> int:
    """Number of groups that the cluster has room for now, at least one. A machine whose cores are fewer than the CPUs that its
    own Ray counts trains no more than it has cores for the threads of."""
    room = holds(trainer.worker_resources, cluster.place.get("finetune", {})) // trainer.num_workers
    worth = most_at_once(cluster, trainer.num_workers * max(trainer.cpus_per_worker, trainer.threads_per_worker))
    return max(1, min(room, worth or room))


def _trainer(group: Group) -> TrainerConfig:
    return group.stage.run_config.finetune.trainer


def _bundles(trainer: TrainerConfig) -> list[Bundle]:
    return [trainer.worker_resources] * trainer.num_workers


def image_names(context: Context, encode: Encode, group: Group) -> list[str]:
    """Names of the group's images in the source, in the order in which fine-tuning reads them, without broken images."""
    source, decoded = encode.opened, decoded_indices(encode, context.storage)
    return [source.identify(index) for name in group.names for index in decoded[source.class_names.index(name)]]


def _diverged(stage: Tuning, outcome: dict[str, Any], names: list[str]) -> str:
    row, images = outcome["diverged"], [names[position] for position in outcome["images"]]
    wrong = ", ".join(f"{key} {value:g}" for key, value in row.items() if not math.isfinite(value))
    kept = f"the checkpoint of step {outcome['kept']} is kept" if outcome["kept"] else "there is no checkpoint before it"
    return (
        f"{stage.described_as} diverged at step {row['step']:g} ({wrong}) on images {', '.join(images)}; "
        f"{kept}; lower {stage.remedy}"
    )


def checkpoints_name(config: FinetuneConfig) -> str:
    """Name of the checkpoints. It differs for runs that cannot continue from each other's checkpoints: those with different
    ZeRO stages and, under ZeRO 1 to 3, with different numbers of workers."""
    return f"zero-{config.zero_stage}" + (f"-{config.trainer.num_workers}-workers" if config.zero_stage else "")
