"""The stages of a search: of each trial up to its pool, and of the selections that are worth students."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from ims3_ray.artifacts import Storage
from ims3_ray.config import RunConfig, SweepConfig
from ims3_ray.config.sweep import Settings, title_of
from ims3_ray.plan.layout import Plan, ordered
from ims3_ray.plan.run import RunBuilder
from ims3_ray.selection.grid import Weighing, most_selections
from ims3_ray.stages.base import Stage


def id_of(settings: Settings) -> str:
    """8 hex digits of a trial's settings."""
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

    def keys(self, storage: Storage) -> list[str | None]:
        """Of the data, weights, code and config that it depends on."""
        return [stage.key(storage) for stage in self.stages]

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
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the data, which is looked at once."""

    @property
    def points(self) -> int:
        return self.count * len(self.config.inner())


def make_sweep(config: SweepConfig) -> SweepPlan:
    """All that can be known before. Raises :class:`UserError` for bad input, of any trial."""
    builder = RunBuilder(config, config.selection.images_per_class)
    optuna = config.search.method == "optuna"
    known = config.outer()[:1] if optuna else config.outer()
    trials = [make_trial(config, builder, settings, draw) for settings in known for draw in config.draws]
    images = builder.set_of(config.arm, "probe", config.arms[config.arm], trials[-1].configs[0])
    rows = builder.evaluate("probe", images, config.selection.images_per_class)
    shared = [stage for stage in ordered(builder.stages.values()) if not is_own(stage)]
    stages = [*shared, *(s for stage in rows.values() for s in stage.inputs.values() if not is_own(s) and s not in shared)]
    return SweepPlan(
        config, builder.classes, stages, trials=trials, count=config.search.trials if optuna else len(known),
        evaluation_flops=sum(stage.flops for stage in rows.values()), fingerprints=builder.fingerprints,
    )  # fmt: skip


def make_trial(config: SweepConfig, builder: RunBuilder, settings: Settings, draw: int) -> Trial:
    """One draw of one outer setting, with one ``builder`` for all."""
    inner, arm = config.inner(), config.arms[config.arm]
    configs = [config.at({**settings, **each}, draw).of_arm(config.arm) for each in inner]
    base = config.at(settings, draw).of_arm(config.arm)
    most = max(each.selection.groups for each in configs)
    title = title_of(settings) or arm.title

    def among(groups: int, each: RunConfig) -> Stage:
        """The selection among so many subgroups."""
        widened = each.model_copy(update={"selection": each.selection.model_copy(update={"groups": groups})})
        chosen = builder.set_of(f"{config.arm} {id_of(settings)}", title, arm, widened)
        return chosen.inputs["set"] if chosen.kind == "refine" else chosen

    alike: dict[str, list[int]] = {}
    for position, each in enumerate(configs):
        alike.setdefault(_references(each), []).append(position)
    questions = []
    for positions in alike.values():
        first = configs[positions[0]]
        groups = most if first.selection.references == "real" else first.selection.groups
        questions.append(Question(among(groups, first), tuple(positions)))
    judge = among(most, base)
    return Trial(settings, draw, inner, configs, questions, judge, ordered(_before([judge, *(q.stage for q in questions)])))


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
