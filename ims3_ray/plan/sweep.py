"""The stages of a search: of each trial up to its pool, and of the selections that are worth students."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ims3_ray.artifacts import Storage
from ims3_ray.config import RunConfig, SweepConfig
from ims3_ray.config.sweep import Settings, reason_of, title_of
from ims3_ray.errors import UserError
from ims3_ray.plan.layout import Plan, ordered
from ims3_ray.plan.run import RunBuilder
from ims3_ray.selection.grid import Weighing, most_selections
from ims3_ray.stages.base import VERSION, Stage


def id_of(settings: Any) -> str:
    """8 hex digits of a trial's settings, or of other plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Question:
    """Inner settings with the same φ and the same references, which the centroids of one selection answer."""

    stage: Stage
    """A selection among the largest number of subgroups."""
    inner: tuple[int, ...]
    """Positions in :attr:`Trial.inner`."""


@dataclass
class Trial:
    """One draw of one outer setting: a generator, its candidates, and all inner settings."""

    settings: Settings
    draw: int
    inner: list[Settings]
    configs: list[RunConfig]
    """As each of ``inner`` has it."""
    questions: list[Question]
    judge: Stage
    """The selection by the run's own φ and references: the terms by which selections of all settings are compared."""
    stages: list[Stage]
    """All that is needed before the first choice."""
    scoring: list[Stage]
    """As the students of any selection are trained and tested."""

    def keys(self, storage: Storage) -> list[str | None]:
        """Of the data, weights, code and config that its record depends on."""
        kinds = ("select", "refine", "evaluate")
        others = [
            [stage.params, {name: one.key(storage) for name, one in stage.inputs.items() if name != "set"}]
            for stage in self.scoring
        ]
        return [*(stage.key(storage) for stage in self.stages), id_of([[VERSION[kind] for kind in kinds], others])]

    def weighing(self, position: int) -> Weighing:
        """Of an inner setting."""
        s = self.configs[position].selection
        return Weighing(s.alpha, s.beta, s.groups, s.coupling)

    @property
    def most_selections(self) -> int:
        classes = len(self.judge.units)
        return sum(most_selections([self.weighing(i) for i in q.inner], classes) for q in self.questions)


@dataclass
class SweepPlan(Plan[SweepConfig]):
    """``stages`` are those that all trials need, made before the first."""

    trials: list[Trial] = field(default_factory=list)
    """Those that are known: every one of grid and random; for optuna the first of them stands for the others."""
    count: int = 0
    """Outer settings."""
    evaluation_flops: float = 0.0
    """Of the students of one selection."""
    builder: RunBuilder | None = None
    """With which the trials were made, and others can be."""

    def trial(self, settings: Settings, draw: int) -> Trial:
        """Any trial."""
        assert self.builder is not None
        return make_trial(self.config, self.builder, settings, draw)

    @property
    def points(self) -> int:
        return self.count * len(self.config.inner())


def make_sweep(config: SweepConfig) -> SweepPlan:
    """All that can be known before. Raises :class:`UserError` for bad input, of any trial."""
    builder = RunBuilder(config, config.selection.images_per_class)
    optuna = config.search.method == "optuna"
    known = config.outer()[:1] if optuna else config.outer()
    trials = [make_trial(config, builder, settings, draw) for settings in known for draw in config.draws]
    shared = [stage for stage in ordered(builder.stages.values()) if not is_own(stage)]
    chosen = trials[0].scoring[0].inputs["set"] if trials[0].scoring else None
    refining = chosen.flops if chosen is not None and chosen.kind == "refine" else 0.0
    return SweepPlan(
        config, builder.classes, shared, trials=trials, count=config.search.trials if optuna else len(known),
        evaluation_flops=refining + sum(stage.flops for stage in trials[0].scoring), builder=builder,
    )  # fmt: skip


def make_trial(config: SweepConfig, builder: RunBuilder, settings: Settings, draw: int) -> Trial:
    """One draw of one outer setting, with one ``builder`` for all."""
    inner, arm = config.inner(), config.arms[config.arm]
    configs = [_at(config, {**settings, **each}, draw) for each in inner]
    base = _at(config, settings, draw)
    most = max(each.selection.groups for each in configs)
    title = title_of(settings) or arm.title

    def among(groups: int, each: RunConfig) -> Stage:
        """The set that is chosen among so many subgroups."""
        widened = each.model_copy(update={"selection": each.selection.model_copy(update={"groups": groups})})
        return builder.set_of(f"{config.arm} {id_of(settings)}", title, arm, widened)

    alike: dict[str, list[int]] = {}
    for position, each in enumerate(configs):
        alike.setdefault(_references(each), []).append(position)
    questions = []
    for positions in alike.values():
        first, own = configs[positions[0]], max(configs[position].selection.groups for position in positions)
        questions.append(
            Question(_selected(among(most if first.selection.references == "real" else own, first)), tuple(positions))
        )
    images = among(most, base)
    rows = {} if config.search.by == "s3" else builder.evaluate(title, images, config.selection.images_per_class)
    judge = _selected(images)
    stages = ordered(_before([judge, *(question.stage for question in questions)]))
    return Trial(settings, draw, inner, configs, questions, judge, stages, list(rows.values()))


def _at(config: SweepConfig, settings: Settings, draw: int) -> RunConfig:
    """As the arm has it. :class:`UserError` for settings that do not go together."""
    try:
        return config.at(settings, draw).of_arm(config.arm)
    except ValidationError as error:
        raise UserError(f"space: {title_of(settings)} is impossible: {reason_of(error)}") from error


def _selected(images: Stage) -> Stage:
    """The selection that a set comes from."""
    return images.inputs["set"] if images.kind == "refine" else images


def _references(config: RunConfig) -> str:
    """What the centroids of a selection depend on, beside the pool."""
    s = config.selection
    pool = config.pool_size if s.references == "generated" else 0
    return json.dumps([config.encoder, s.references, s.references_per_class, pool])


def _before(stages: Iterable[Stage]) -> list[Stage]:
    """Everything that these stages come from."""
    found: list[Stage] = []

    def visit(stage: Stage) -> None:
        for earlier in stage.inputs.values():
            if earlier not in found:
                found.append(earlier)
                visit(earlier)

    for stage in stages:
        visit(stage)
    return found


def is_own(stage: Stage) -> bool:
    """Whether a stage belongs to a trial: it is or comes from a generator, its candidates, a selection of them."""
    own = ("finetune", "generate", "select", "refine", "evaluate")
    return stage.kind in own or any(map(is_own, stage.inputs.values()))


def generator_of(settings: Settings, draw: int) -> str:
    """What trials have in common that fine-tune alike."""
    return id_of({key: value for key, value in settings.items() if key.startswith("finetune.")} | {"draw": draw})
