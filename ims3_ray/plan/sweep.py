"""Plans the stages of a search: those of each trial up to its candidate pool, and those of the selections that are evaluated
with students."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ims3_ray import plugins
from ims3_ray.config import RunConfig, SweepConfig
from ims3_ray.config.messages import reason
from ims3_ray.config.sweep import Settings, title_of
from ims3_ray.engine.executor import arranged
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.stage import Stage
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan.arms import chosen_of, set_of
from ims3_ray.plan.layout import Plan
from ims3_ray.plan.precision import AUTO, decided
from ims3_ray.selection.grid import Weighing, most_selections
from ims3_ray.stages.evaluate import plan_rows


def id_of(settings: Any) -> str:
    """8 hex digits of the hash of a trial's settings, or of other plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Question:
    """Inner settings with the same φ and the same references: all of them choose among the centroids of one selection."""

    stage: Stage
    """The selection among the largest number of subgroups."""
    inner: tuple[int, ...]
    """Positions of the settings in :attr:`Trial.inner`."""


@dataclass
class Trial:
    """One draw of one outer setting: a generator, its candidates, and all inner settings."""

    settings: Settings
    draw: int
    inner: list[Settings]
    configs: list[RunConfig]
    """The config of the run with each of the settings in ``inner``."""
    questions: list[Question]
    judge: Stage
    """The selection by the run's own φ and references. Its terms are the measure that compares selections of all settings."""
    stages: list[Stage]
    """The stages that have to run before the first selection."""
    scoring: list[Stage]
    """The stages that train and test the students of one selection; those of any other selection differ in their set alone."""

    def keys(self, storage: Storage) -> list[str | None]:
        """Keys of the data, weights, code and config that the trial's record depends on."""
        return [
            *(stage.key(storage) for stage in self.stages),
            id_of([self._made_of(stage, storage) for stage in self._chosen]),
        ]

    @property
    def _chosen(self) -> list[Stage]:
        """The selection and all that is made of it, whose keys depend on what is selected."""
        return [self.judge, *(question.stage for question in self.questions), *after_choice(self)]

    @staticmethod
    def _made_of(stage: Stage, storage: Storage) -> list[Any]:
        """What a stage depends on beside the set that it is made of."""
        inputs = {name: one.key(storage) for name, one in stage.inputs.items() if name != "set" and not _of_set(one)}
        return [stage.name, stage.version, stage.params, plugins.hashes(type(stage)), inputs]

    def weighing(self, position: int) -> Weighing:
        """The parameters of Eq. 10 of the inner setting at ``position``."""
        s = self.configs[position].selection
        return Weighing(s.alpha, s.beta, s.groups, s.coupling)

    @property
    def most_selections(self) -> int:
        classes = len(self.judge.units)
        return sum(most_selections([self.weighing(i) for i in q.inner], classes) for q in self.questions)


@dataclass
class SweepPlan(Plan[SweepConfig]):
    """The plan of a search. ``stages`` are those that all trials need; they run before the first trial."""

    trials: list[Trial] = field(default_factory=list)
    """The trials that are known in advance: all of grid and random; for optuna those of one setting, as an example."""
    count: int = 0
    """Number of outer settings."""
    evaluation_flops: float = 0.0
    """Floating-point operations of the synthesis, labels and students of one selection."""
    planner: Planner | None = None
    """The planner of ``trials``, by which further trials can be planned."""

    def trial(self, settings: Settings, draw: int) -> Trial:
        """Plan a trial, which need not be one of ``trials``."""
        assert self.planner is not None
        return make_trial(self.config, self.planner, settings, draw)

    @property
    def points(self) -> int:
        return self.count * len(self.config.inner())

    @property
    def scale(self) -> float:
        """Number of trials of the whole search for each of ``trials``: 1 unless their settings are drawn during the search."""
        return self.count * len(self.config.draws) / len(self.trials)

    @property
    def most_selections(self) -> float:
        """Largest number of different selections of the whole search."""
        return sum(trial.most_selections for trial in self.trials) * self.scale

    @property
    def most_evaluated(self) -> float:
        """Largest number of selections that students are trained on."""
        screened = len(self.trials) * self.scale * self.config.search.screened
        return {"accuracy": self.most_selections, "s3": 0.0, "both": min(self.most_selections, screened)}[self.config.search.by]


def make_sweep(config: SweepConfig) -> SweepPlan:
    """Plan all that can be known before the search. Raises :class:`UserError` for bad input of any known trial."""
    config = decided(config)
    planner = Planner(config, config.selection.images_per_class)
    optuna = config.search.method == "optuna"
    known = config.outer()[:1] if optuna else config.outer()
    trials = [make_trial(config, planner, settings, draw) for settings in known for draw in config.draws]
    shared = [stage for stage in arranged(planner.stages) if not stage.belongs_to_arm]
    return SweepPlan(
        config, planner.classes, shared, trials=trials, count=config.search.trials if optuna else len(known),
        evaluation_flops=sum(stage.flops for stage in after_choice(trials[0])), planner=planner,
        fingerprints=planner.data.fingerprints,
    )  # fmt: skip


def after_choice(trial: Trial) -> list[Stage]:
    """The stages after each selection of a trial that is evaluated: its synthesis and labels, if any, and its students."""
    made = [stage for stage in before(trial.scoring) if "set" in stage.inputs]
    return [*made, *trial.scoring]


def _of_set(stage: Stage) -> bool:
    """Whether what a stage makes depends on the set that is scored, as labels of its batches do."""
    return "set" in stage.inputs or any(map(_of_set, stage.inputs.values()))


def make_trial(config: SweepConfig, planner: Planner, settings: Settings, draw: int) -> Trial:
    """Plan one draw of one outer setting. All trials of a search share one ``planner``."""
    inner, arm = config.inner(), config.arms[config.arm]
    if not config.search.trains_students:  # nothing is made of the selections
        arm = arm.model_copy(update={"synthesise": None, "labels": "hard"})
    configs = [_at(config, {**settings, **each}, draw) for each in inner]
    base = _at(config, settings, draw)
    most = max(each.selection.groups for each in configs)
    title = title_of(settings) or arm.title

    def among(groups: int, each: RunConfig) -> Stage:
        """The set that is chosen among ``groups`` subgroups of each class."""
        widened = each.model_copy(update={"selection": each.selection.model_copy(update={"groups": groups})})
        return set_of(planner, f"{config.arm} {id_of(settings)}", title, arm, widened)

    alike: dict[str, list[int]] = {}
    for position, each in enumerate(configs):
        alike.setdefault(_references(each), []).append(position)
    questions = []
    for positions in alike.values():
        first, own = configs[positions[0]], max(configs[position].selection.groups for position in positions)
        questions.append(
            Question(chosen_of(among(most if first.selection.references == "real" else own, first)), tuple(positions))
        )
    images = among(most, base)
    rows = {} if not config.search.trains_students else plan_rows(planner, title, images, config.selection.images_per_class)
    judge = chosen_of(images)
    stages = arranged(before([judge, *(question.stage for question in questions)]))
    return Trial(settings, draw, inner, configs, questions, judge, stages, list(rows.values()))


def _at(config: SweepConfig, settings: Settings, draw: int) -> RunConfig:
    """The arm's config with these settings. Raises :class:`UserError` for settings that contradict each other."""
    try:
        found = config.at(settings, draw).of_arm(config.arm)
    except ValidationError as error:
        raise UserError(f"space: {title_of(settings)} is impossible: {reason(RunConfig, error)}") from error
    if AUTO in (found.sampling.precision, found.finetune.precision):
        raise UserError(f"space: {title_of(settings)} compares number formats, so it must name them: bf16 or fp32")
    return found


def _references(config: RunConfig) -> str:
    """The settings, as text, that the centroids of a selection depend on apart from the candidates."""
    s = config.selection
    pool = config.pool_size if s.references == "generated" else 0
    return json.dumps([config.encoder, s.references, s.references_per_class, pool])


def before(stages: Iterable[Stage]) -> list[Stage]:
    """All stages that are direct or indirect inputs of ``stages``."""
    found: list[Stage] = []

    def visit(stage: Stage) -> None:
        for earlier in stage.inputs.values():
            if earlier not in found:
                found.append(earlier)
                visit(earlier)

    for stage in stages:
        visit(stage)
    return found
