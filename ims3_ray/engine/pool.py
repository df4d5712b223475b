"""Stages whose units are made on a Ray Data actor pool: real and generated images, and data derived from them.

One actor does all the work of a unit (generator → autoencoder → φ → encoded image → shards), so pixels never cross Ray's object
store and no two pools compete for the same devices. Actors return only a row of a few hundred bytes per unit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from ims3_ray.config import ActorsConfig, ClusterConfig, WorkConfig
from ims3_ray.engine.images import Derive, ImageStore, Producer, Stored
from ims3_ray.engine.noted import check_alike, commit_noted, kind_of, without_derived
from ims3_ray.engine.shards import by_class, commit_units, parse_unit
from ims3_ray.engine.stage import Context, Stage, Worker
from ims3_ray.engine.worker import Derivation, Work
from ims3_ray.errors import IncompletePool
from ims3_ray.io.storage import Storage
from ims3_ray.progress import Progress, title_of


@dataclass(frozen=True)
class ClassUnits:
    """The units of class ``label`` in order. ``first`` maps each unit to the index within the class of its first image;
    ``count`` is the number of images."""

    label: int
    first: dict[str, int]
    count: int


@dataclass(eq=False)
class OnActors(Stage):
    """Base of the stages that run on the actor pool. A unit belongs to one class, whose label its name holds."""

    _grouped: tuple[tuple[str, ...], dict[int, list[str]]] = field(default=((), {}), init=False, repr=False)
    """The units, and those of each label."""

    @property
    def by_label(self) -> dict[int, list[str]]:
        """Label → its units, in their order. They are grouped once: there may be a million."""
        if self._grouped[0] is not self.units:
            self._grouped = self.units, by_class(self.units)
        return self._grouped[1]

    def worker(self, config: WorkConfig) -> Worker:
        actors = config.actors
        return Worker("pool", actors.cpus, actors.gpus, actors.count)

    def run(self, context: Context) -> None:
        self.run_all(context, [self])

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[OnActors]) -> None:
        """Make images and the data derived from them in one pass of the actors."""
        pools: dict[ImagePool, list[DerivedStage]] = {stage: [] for stage in stages if isinstance(stage, ImagePool)}
        for stage in stages:
            if isinstance(stage, DerivedStage):
                pools.setdefault(stage.source, []).append(stage)
        produce(context, pools)


@dataclass(eq=False)
class ImagePool(OnActors):
    """Base of the stages that make images. A unit is a group of images of one class; its name holds the class's label."""

    labels: tuple[int, ...] = ()
    """Label of each class as the names of units hold it, in the order of the classes."""
    unit_size: int = 1
    """Number of images per unit; the last unit of a class may hold fewer."""

    @property
    def keeps(self) -> bool:
        """Whether the images are stored, or made again by each stage that reads them."""
        return True

    @abstractmethod
    def store(self, storage: Storage) -> ImageStore:
        """The shards in which the images are stored."""

    @abstractmethod
    def producer(self, context: Context) -> Callable[[str], Producer]:
        """device → producer of the images: the function with which each actor builds its own producer."""

    def units_of_class(self, position: int) -> list[str]:
        return self.by_label[self.labels[position]]

    @property
    def described(self) -> str:
        """Name of the images in the titles of stages that are derived from them."""
        return f"{self.label} images"

    @property
    def sampled(self) -> bool:
        """Whether the images are samples of a generator, whose quality has to be looked at."""
        return False

    def looked_at_first(self) -> list[str]:
        """Units that are made before the others, so that stages derived from them can check them; none by default."""
        return []

    @property
    def same_hardware(self) -> bool:
        """Whether all units must be made on the same kind of hardware, since images differ in their last bits otherwise."""
        return False

    def counts(self, storage: Storage) -> Mapping[str, int]:
        """Number of images in each unit, once the unit is made."""
        return dict.fromkeys(self.units, self.unit_size)

    def class_units(self, storage: Storage, at_most: int | None = None) -> list[ClassUnits]:
        """The units of every class, in order. At most the first ``at_most`` images of each class are counted."""
        counts, units, found = self.counts(storage), self.by_label, []
        for label in self.labels:
            first, total = {}, 0
            for unit in units[label]:
                first[unit] = total
                total += counts[unit]
            found.append(ClassUnits(label, first, total if at_most is None else min(total, at_most)))
        return found

    def check_enough(self, context: Context, needed: int) -> None:
        """Raises :class:`UserError` naming a class of which there are fewer than ``needed`` images."""


@dataclass(eq=False)
class DerivedStage(OnActors):
    """Base of the stages that compute something from each unit of images. They run together with the stage that makes the
    images, which is their input ``images``."""

    @property
    def source(self) -> ImagePool:
        return cast(ImagePool, self.inputs["images"])

    def units_of_class(self, position: int) -> list[str]:
        return self.by_label[self.source.labels[position]]

    @property
    def batch(self) -> Hashable:
        return self.source.batch

    @abstractmethod
    def derive(self, storage: Storage) -> Callable[[str], Derive]:
        """device → function that computes a unit's shard from its images: with it each actor builds its own function."""


@dataclass
class Task:
    """Units from which the same ``derived`` stages compute their shards. ``source`` is the stage that makes the images, or None
    if the images are stored already."""

    producer: Callable[[str], Producer]
    source: ImagePool | None
    derived: tuple[DerivedStage, ...]
    units: Sequence[str]

    @property
    def stage(self) -> Stage:
        return self.source or self.derived[0]

    @property
    def images(self) -> ImagePool:
        return self.source or self.derived[0].source

    @property
    def count(self) -> float:
        """Approximate number of images in the units."""
        return self.stage.images / len(self.stage.units) * len(self.units)


def produce(context: Context, pools: Mapping[ImagePool, Sequence[DerivedStage]]) -> None:
    """Make the missing units of stages that make images, and of the stages derived from each, in one pass of the actors; in
    two if some units are to be looked at first."""
    for source, derived in pools.items():
        for noted in (source, *derived):
            commit_noted(context, noted, source, derived)
    first = {source: set(source.looked_at_first()) for source in pools if pools[source] and source.missing(context.storage)}
    if any(first.values()):
        early, whole = _tasks(context, pools, first), _tasks(context, pools)
        share = sum(task.count for task in early) / (sum(task.count for task in whole) or 1.0)
        context.course.section(0.0, share)
        run_tasks(context, early)
        context.course.section(share, 1.0)
        for source in (source for source, units in first.items() if units):
            for stage in pools[source]:
                stage.check(context)
    run_tasks(context, _tasks(context, pools))


def _tasks(
    context: Context, pools: Mapping[ImagePool, Sequence[DerivedStage]], only: Mapping[ImagePool, set[str]] | None = None
) -> list[Task]:
    """The tasks that make all missing units, or those that ``only`` names."""
    tasks = []
    for source, derived in pools.items():
        new = set(source.missing(context.storage))
        wanted = [(stage, set(stage.missing(context.storage))) for stage in derived]
        groups: dict[tuple[bool, tuple[DerivedStage, ...]], list[str]] = {}
        for unit in source.units if only is None else [unit for unit in source.units if unit in only.get(source, ())]:
            todo = tuple(stage for stage, missing in wanted if unit in missing)
            if unit in new or todo:
                groups.setdefault((unit in new, todo), []).append(unit)
        stored = partial(Stored, source.store(context.storage))
        for (fresh, todo), units in groups.items():
            tasks.append(Task(source.producer(context) if fresh else stored, source if fresh else None, todo, units))
    return tasks


def run_tasks(context: Context, tasks: Sequence[Task]) -> None:
    """Run all units, retry those that fail, commit those that succeed. Raises :class:`IncompletePool` if failures remain."""
    from ims3_ray.cluster.capacity import wait_for_capacity  # all else of this file can be used without Ray
    from ims3_ray.engine.actors import run_units

    if not tasks:
        return
    config = context.config
    works = [_work(context, task) for task in tasks]
    done: list[dict[str, dict[str, Any]]] = [{} for _ in tasks]
    failed: list[dict[str, str]] = [{} for _ in tasks]
    alike = [kind_of(context.storage, task.source) for task in tasks]
    pending = [(number, unit) for number, task in enumerate(tasks) for unit in task.units]
    title = title_of(task.stage.title for task in tasks)
    workers = [config.actors.resources] * min(config.actors.count, len(pending))
    price, unit_s = pool_price(config.actors, config.cluster), max(_unit_seconds(context, task) for task in tasks)
    wait_for_capacity(config.cluster, "pool", title, workers)
    with Progress(title, round(sum(task.count for task in tasks)), "images", price=price) as progress:
        for _ in range(config.actors.max_attempts):
            failed = [{} for _ in tasks]
            made = run_units(pending, works, config.actors, config.cluster, unit_s=unit_s) if pending else []
            for number, unit, entry in made:
                if "error" in entry:
                    failed[number][unit] = entry["error"]
                    continue
                alike[number] = check_alike(alike[number], works[number].noted, unit, entry)
                done[number][unit] = entry
                progress.advance(entry["images"])
            pending = [(number, unit) for number, errors in enumerate(failed) for unit in errors]
    _commit(context, tasks, works, done, failed, progress.seconds)
    if missing := [_what_is_missing(context, t, errors) for t, errors in zip(tasks, failed, strict=True) if errors]:
        raise IncompletePool(f"{'; '.join(missing)}; the same command tries again")


def _unit_seconds(context: Context, task: Task) -> float:
    """Seconds that a unit of ``task`` is expected to take on an actor."""
    stages: list[Stage] = [*([task.source] if task.source else []), *task.derived]
    rate = task.stage.worker(context.config).flop_rate(context.config.cluster)
    return sum(stage.flops / rate / len(stage.units) for stage in stages)


def _work(context: Context, task: Task) -> Work:
    storage = context.storage
    listeners = {stage: tuple(context.listeners.get(stage, ())) for stage in task.derived}
    derivations = tuple(Derivation(stage.derive(storage), stage.artifact(storage), heard) for stage, heard in listeners.items())
    store = task.source.store(storage) if task.source and task.source.keeps else None
    return Work(task.producer, store, derivations, task.stage.artifact(storage))


def _commit(
    context: Context,
    tasks: Sequence[Task],
    works: Sequence[Work],
    done: Sequence[dict[str, Any]],
    failed: Sequence[dict[str, str]],
    seconds: float,
) -> None:
    """Commit the units of every stage. The ``seconds`` of the pass are divided in proportion to the actors' time per stage."""
    made: list[tuple[Stage, dict[str, Any], dict[str, str]]] = []
    for task, work, notes, errors in zip(tasks, works, done, failed, strict=True):
        if task.source:
            made.append((task.source, {unit: without_derived(note) for unit, note in notes.items()}, errors))
        for stage, derivation in zip(task.derived, work.derivations, strict=True):
            folder = derivation.artifact.folder
            made.append((stage, {unit: note["derived"][folder] for unit, note in notes.items()}, errors))
    busy = [sum(entry["seconds"] for entry in entries.values()) for _, entries, _ in made]
    workers = min(context.config.actors.count, sum(len(task.units) for task in tasks))
    for mine, (one, entries, errors) in zip(busy, made, strict=True):
        share = seconds * mine / (sum(busy) or 1.0)
        context.spend(one, share, workers)
        commit_units(one.artifact(context.storage), entries, share, errors)


def pool_price(actors: ActorsConfig, cluster: ClusterConfig) -> float:
    """Price of an hour of the actor pool; 0 if no prices are configured."""
    return actors.count * cluster.hourly("pool", actors.cpus, actors.gpus)


def _what_is_missing(context: Context, task: Task, failed: Mapping[str, str]) -> str:
    """A message with the images of the failed units by class and index, and the error of the first of these units."""
    stage, size = task.stage, task.images.unit_size
    names = dict(zip(task.images.labels, context.classes.names, strict=True))
    places = []
    for unit in sorted(failed, key=parse_unit):
        label, number = parse_unit(unit)
        places.append(f"{names.get(label, label)} {number * size}–{(number + 1) * size - 1}")
    shown = ", ".join(places[:20]) + (f" and {len(places) - 20} more" if len(places) > 20 else "")
    unit = min(failed)
    return (
        f"{stage.title}: {len(failed)} of {len(stage.units)} units failed every attempt, images missing: {shown}; {unit}: "
        f"{failed[unit]} (all errors: {stage.artifact(context.storage).address}/manifest.json)"
    )
