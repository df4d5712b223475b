"""From a config to the stages it needs, before Ray starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig, WorkConfig
from ims3_ray.data.classes import ClassTable
from ims3_ray.errors import UserError
from ims3_ray.plan.run import RunBuilder
from ims3_ray.plan.scoring import Builder
from ims3_ray.stages.base import Stage

Config = TypeVar("Config", bound=WorkConfig)

DERIVED = ("embed", "latents", "inverted")
"""Stages that run together with the images they look at."""

ORDER = (
    "encode", *DERIVED, "held_out", "given", "modes", "teacher", "finetune", "instability", "generate", "select", "refine",
    "export", "evaluate",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A set of images and what scores it."""

    title: str
    ipc: int
    """Images per class; 0 for a set made by somebody else."""
    images: Stage
    rows: dict[str, Stage]
    """Row of the table → the training of its students."""
    arm: str = ""
    draw: int = 0


@dataclass
class Plan(Generic[Config]):
    """The stages in the order in which they run; stages that sets share appear once."""

    config: Config
    classes: ClassTable
    stages: list[Stage]
    sets: dict[str, Scored] = field(default_factory=dict)
    export: Stage | None = None

    def needed(self) -> dict[str, float]:
        """The largest share of the cluster that a stage takes at a time."""
        a, e = self.config.actors, self.config.evaluation
        cpus, gpus = [a.count * a.cpus, e.cpus_per_task], [a.count * a.gpus, e.gpus_per_task]
        trainers = [stage.run.finetune.trainer for stage in self.stages if stage.kind == "finetune"]
        trainers += [e.teacher.trainer for stage in self.stages if stage.kind == "teacher"]
        for t in trainers:
            cpus.append(t.num_workers * t.cpus_per_worker)
            gpus.append(t.num_workers * t.gpus_per_worker)
        return {k: v for k, v in {"CPU": max(cpus), "GPU": max(gpus)}.items() if v}


def make_plan(config: RunConfig) -> Plan[RunConfig]:
    """Open the sources, check the weights, lay out the stages. Raises :class:`UserError` for bad input."""
    _check_arms(config)
    builder = RunBuilder(config, config.selection.images_per_class)
    sets = {name: _scored(builder, config, name) for name, arm in config.arms.items()}
    if config.instability.images and any(arm.finetune and not arm.overrides.get("finetune") for arm in config.arms.values()):
        builder.instability(config)
    export = builder.export(sets[config.export].images, config, config.export) if config.export else None
    return Plan(config, builder.classes, _ordered(builder.stages.values()), sets, export)


def make_comparison(config: CompareConfig) -> Plan[CompareConfig]:
    """All arms at all numbers of images per class and draws; sets are named ``ARM K=…`` with the draw if there are several."""
    _check_arms(config)
    builder = RunBuilder(config, max(config.budgets))
    sets = {}
    for k in config.budgets:
        for draw in config.draws:
            for name in config.arms:
                which = f" K={k}" + (f" draw={draw}" if len(config.draws) > 1 else "")
                sets[name + which] = _scored(builder, config.at(k, draw), name, which)
    return Plan(config, builder.classes, _ordered(builder.stages.values()), sets)


def make_evaluation(config: EvaluateConfig) -> Plan[EvaluateConfig]:
    """The scoring of sets that lie somewhere."""
    if not config.sets:
        raise UserError("no set to score; name at least one, as in sets.mine=FOLDER")
    builder = Builder(config)
    sets = {}
    for title, path in config.sets.items():
        images = builder.given(title, path)
        ipc = -(-images.images // len(builder.classes.names))
        sets[title] = Scored(title, 0, images, builder.evaluate(title, images, ipc))
    return Plan(config, builder.classes, _ordered(builder.stages.values()), sets)


def _check_arms(config: RunConfig) -> None:
    if not config.arms:
        raise UserError("there is no arm; name some under arms, or extend from configs/methods/")


def _scored(builder: RunBuilder, config: RunConfig, name: str, which: str = "") -> Scored:
    arm, k = config.arms[name], config.selection.images_per_class
    images = builder.set_of(name + which, arm.title + which, arm, config.of_arm(name))
    return Scored(arm.title, k, images, builder.evaluate(arm.title + which, images, k), name, config.seed)


def _ordered(stages: Iterable[Stage]) -> list[Stage]:
    """Every stage after its inputs; what is derived from images right after them, since they run together."""
    done: list[Stage] = []
    stages = list(stages)

    def visit(stage: Stage) -> None:
        if stage in done:
            return
        for earlier in stage.inputs.values():
            visit(earlier)
        if stage in done:  # an embedding, come to through the pool it embeds
            return
        done.append(stage)
        for derived in stages:
            if derived.kind in DERIVED and derived.inputs["images"] is stage:
                if derived.kind == "embed":
                    derived.units = stage.units  # the pool may have been asked for more since
                visit(derived)

    for stage in sorted(stages, key=lambda s: ORDER.index(s.kind)):
        visit(stage)
    return done
