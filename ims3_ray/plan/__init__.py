"""Plans the stages that a config needs, before Ray starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig
from ims3_ray.config.messages import inner
from ims3_ray.engine.executor import arranged
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.stage import Stage
from ims3_ray.errors import UserError
from ims3_ray.plan.arms import set_of
from ims3_ray.plan.layout import Config, Plan, Scored
from ims3_ray.plan.precision import decided
from ims3_ray.plan.sweep import SweepPlan, make_sweep
from ims3_ray.plan.titles import distinguish
from ims3_ray.stages.evaluate import plan_rows
from ims3_ray.stages.export import Export
from ims3_ray.stages.given import ReadGiven
from ims3_ray.stages.instability import MeasureInstability

__all__ = ["Config", "Plan", "Scored", "SweepPlan", "make_comparison", "make_evaluation", "make_plan", "make_sweep"]


def make_plan(config: RunConfig) -> Plan[RunConfig]:
    """Open the sources, check the weights and plan the stages. Raises :class:`UserError` for bad input."""
    _check_arms(config)
    config = decided(config)
    planner = Planner(config, config.selection.images_per_class)
    sets = {name: _scored(planner, config, name) for name in config.arms}
    if config.instability.images and (name := _tuned_as_the_run_says(config)):
        MeasureInstability.plan(planner, config.of_arm(name))
    _plan_beside(planner, config, sets)
    export = None
    if config.export in sets:
        export = Export.plan(planner, sets[config.export].images, config.of_arm(config.export), config.export)
    elif config.export is not None:
        export = Export.plan_best(planner, sets, config)
    return Plan(config, planner.classes, _ordered(planner.stages), sets, export, planner.data.fingerprints)


def make_comparison(config: CompareConfig) -> Plan[CompareConfig]:
    """Plan all arms at all numbers of images per class and all draws. Sets are named ``ARM K=…``, and with the draw if there
    are several."""
    _check_arms(config)
    config = decided(config)
    planner = Planner(config, max(config.budgets))
    sets = {}
    for k in config.budgets:
        for draw in config.draws:
            for name in config.arms:
                which = f" K={k}" + (f" draw={draw}" if len(config.draws) > 1 else "")
                sets[name + which] = _scored(planner, config.at(k, draw), name, which)
    _plan_beside(planner, config, sets)
    return Plan(config, planner.classes, _ordered(planner.stages), sets, fingerprints=planner.data.fingerprints)


def make_evaluation(config: EvaluateConfig) -> Plan[EvaluateConfig]:
    """Plan the scoring of existing sets."""
    if not config.sets:
        raise UserError("no set to score; name at least one, as in sets.mine=FOLDER")
    planner = Planner(config)
    sets = {}
    for title, path in config.sets.items():
        images = ReadGiven.plan(planner, title, path, config.data)
        sets[title] = Scored(title, 0, images, dict(plan_rows(planner, title, images, images.most)))
    return Plan(config, planner.classes, _ordered(planner.stages), sets, fingerprints=planner.data.fingerprints)


def _ordered(stages: Sequence[Stage]) -> list[Stage]:
    """The stages in the order in which they run, under different titles."""
    found = arranged(stages)
    distinguish(found)
    return found


def _check_arms(config: RunConfig) -> None:
    if not config.arms:
        raise UserError("there is no arm; name some under arms, or extend from configs/methods/")


def _tuned_as_the_run_says(config: RunConfig) -> str | None:
    """The first arm that fine-tunes with the run's own settings, rather one with the run's own generator."""
    names = [name for name, arm in config.arms.items() if arm.finetune and "finetune" not in arm.overrides]
    others = {"generator", "autoencoder", "data"}
    return next((name for name in names if not others & set(config.arms[name].overrides)), names[0] if names else None)


def _scored(planner: Planner, config: RunConfig, name: str, which: str = "") -> Scored:
    arm, k = config.arms[name], config.selection.images_per_class
    images = set_of(planner, name + which, arm.title + which, arm, config.of_arm(name))
    whole = arm.selector.whole
    rows = plan_rows(planner, arm.title + which, images, max(planner.classes.counts) if whole else k)
    return Scored(arm.title, k, images, dict(rows), name, config.seed, whole)


def _plan_beside(planner: Planner, config: RunConfig, sets: dict[str, Scored]) -> None:
    """Plan the kinds of stage that the config names under ``stages``; each kind plans itself from the sets."""
    for name, plain in config.stages.items():
        kind: Any = Stage.registry[name]
        if not hasattr(kind, "plan_beside"):
            raise UserError(f"stages.{name}: stages of this kind run where arms need them; leave it out")
        try:
            settings = kind.Config.model_validate(plain)
        except ValidationError as error:
            raise UserError(f"config {inner(kind.Config, error, 'stages', name)}") from error
        kind.plan_beside(
            planner, config, settings, {title: scored.images for title, scored in sets.items() if not scored.whole}
        )
