"""From a config to the stages it needs, before Ray starts."""

from __future__ import annotations

from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig
from ims3_ray.errors import UserError
from ims3_ray.plan.layout import DERIVED, Config, Plan, Scored, ordered
from ims3_ray.plan.run import RunBuilder
from ims3_ray.plan.scoring import Builder
from ims3_ray.plan.sweep import SweepPlan, make_sweep

__all__ = ["DERIVED", "Config", "Plan", "Scored", "SweepPlan", "make_comparison", "make_evaluation", "make_plan", "make_sweep"]


def make_plan(config: RunConfig) -> Plan[RunConfig]:
    """Open the sources, check the weights, lay out the stages. Raises :class:`UserError` for bad input."""
    _check_arms(config)
    builder = RunBuilder(config, config.selection.images_per_class)
    sets = {name: _scored(builder, config, name) for name, arm in config.arms.items()}
    if config.instability.images and any(arm.finetune and not arm.overrides.get("finetune") for arm in config.arms.values()):
        builder.instability(config)
    export = builder.export(sets[config.export].images, config, config.export) if config.export else None
    return Plan(config, builder.classes, ordered(builder.stages.values()), sets, export)


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
    return Plan(config, builder.classes, ordered(builder.stages.values()), sets)


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
    return Plan(config, builder.classes, ordered(builder.stages.values()), sets)


def _check_arms(config: RunConfig) -> None:
    if not config.arms:
        raise UserError("there is no arm; name some under arms, or extend from configs/methods/")


def _scored(builder: RunBuilder, config: RunConfig, name: str, which: str = "") -> Scored:
    arm, k = config.arms[name], config.selection.images_per_class
    images = builder.set_of(name + which, arm.title + which, arm, config.of_arm(name))
    return Scored(arm.title, k, images, builder.evaluate(arm.title + which, images, k), name, config.seed)
