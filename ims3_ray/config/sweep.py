"""A search over λ_IM, α, β, G and other settings of a distillation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from ims3_ray.config.base import Section, Seeds, canonical, merge
from ims3_ray.config.files import alternatives_to
from ims3_ray.config.messages import reason
from ims3_ray.config.run import INSTABILITY, Overridable, RunConfig
from ims3_ray.selection.s3 import S3

Settings = dict[str, Any]
"""Dotted key → value."""

INNER = (
    "selection.alpha", "selection.beta", "selection.groups", "selection.coupling", "selection.references",
    "selection.references_per_class", "encoder",
)  # fmt: skip
"""Keys of the inner settings: all of their values are computed from one pool of candidates."""

OUTER = ("finetune.", "sampling.")
"""Prefixes of the keys of the outer settings: each of their values needs its own pool, and those of fine-tuning also need their
own fine-tuning."""

SYMBOLS = {
    "finetune.objectives.inversion_matching.weight": "λ_IM",
    "finetune.objectives.inversion_matching.n_steps": "N",
    "selection.alpha": "α",
    "selection.beta": "β",
    "selection.groups": "G",
    "selection.references_per_class": "K_i",
    "encoder": "φ",
}


def symbol(key: str) -> str:
    """The paper's symbol of a key, or the key."""
    return SYMBOLS.get(key, key.removeprefix("selection."))


def title_of(settings: Settings) -> str:
    """The settings as text, as in ``λ_IM=0.002, α=0.4``."""
    return ", ".join(f"{symbol(key)}={_shown(value)}" for key, value in settings.items())


def trial_title(settings: Settings) -> str:
    """The title of a trial, given its outer settings, which are empty if only inner settings vary."""
    return title_of(settings) or "the trial"


def _shown(value: Any) -> str:
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"


class Range(Section):
    """An interval from which the methods ``random`` and ``optuna`` draw values."""

    low: float
    high: float
    log: bool = False
    """Whether the logarithm of the value is drawn uniformly, instead of the value."""
    integer: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low:g}, high={self.high:g} is no range{' of logarithms' if self.log else ''}")
        return self


class SearchConfig(Section):
    """How the outer settings are searched, and which result decides."""

    method: Literal["grid", "random", "optuna"] = "grid"
    """Method that chooses the outer settings (finetune, sampling). All combinations of the inner settings (selection, encoder)
    are always tried."""
    trials: int = Field(default=16, ge=1)
    """Number of combinations of outer settings that `random` and `optuna` try."""
    seed: int = Field(default=0, ge=0)
    """Seed of the methods `random` and `optuna`."""
    concurrent: int | None = Field(default=None, ge=1)
    """Number of trials that run at the same time; as many as the cluster has room for when unset. It must be set for a cluster
    that grows (`cluster.wait_s`)."""
    by: Literal["accuracy", "s3", "both"] = "accuracy"
    """Criterion of the search. `accuracy`: final accuracy on held-out training images. `s3`: the terms of Eq. 10 at the run's
    own α, β and encoder, which need no student. `both`: accuracy among the `screened` best selections by these terms."""
    screened: int = Field(default=8, ge=1)
    """Number of distinct selections of each pool on which `both` trains students."""
    row: str | None = None
    """Row of the results table that decides (`PROTOCOL/STUDENT`); the first row when unset."""
    early_stopping: bool = False
    """Whether ASHA stops trials early: after 1, r, r² … draws only the best of every r trials continue with the next draws."""
    reduction: float = Field(default=3.0, gt=1)
    """r of ASHA: one of every r trials continues."""

    @property
    def trains_students(self) -> bool:
        """Whether students decide, or the terms of Eq. 10 alone."""
        return self.by != "s3"


class SweepConfig(RunConfig):
    """A search for the best settings of one arm (`ims3 sweep`)."""

    job: ClassVar[str] = "sweep"
    replaced: ClassVar[Mapping[str, str]] = {"seed": "draws", **dict.fromkeys(INSTABILITY, "")}
    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`; `-sweep` is added to a name without this word."""
    space: dict[str, Any] = Field(
        default={
            "finetune": {"objectives": {"inversion_matching": {"weight": [0.002, 0.04, 0.8]}}},
            "selection": {
                "alpha": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
                "beta": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
                "groups": [3, 5],
            },
        }
    )
    """Settings that vary: a tree of keys of `finetune`, `sampling`, `selection` and `encoder`. Each has a list of values or,
    for the methods random and optuna, a range `{low: , high: , log: , integer: }`. A given space replaces the default as a
    whole."""
    arm: str = "ims3"
    """Arm whose settings are searched."""
    draws: Seeds = (0,)
    """Seeds of whole runs, in place of `seed`: fine-tuning, sampling and selection are repeated for each seed, and the mean
    over the seeds decides."""
    search: SearchConfig = SearchConfig()

    @field_validator("space")
    @classmethod
    def _plain(cls, space: dict[str, Any]) -> dict[str, Any]:
        space = _with_numbers(space)
        for key, values in _leaves(space):
            if key not in INNER and not key.startswith(OUTER):
                raise ValueError(f"{key} cannot be swept; it must be one of {', '.join(INNER)} or of finetune, sampling")
            if isinstance(values, Mapping):
                if key in INNER:
                    raise ValueError(f"{key}: give a list; all of its values are looked at, whatever the method")
                try:
                    Range.model_validate(values)
                except ValidationError as error:
                    raise ValueError(f"{key}: {reason(Range, error)}") from error
            elif not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"{key}: {values!r} is no list of values and no range")
        if not any(_leaves(space)):
            raise ValueError("space has no setting that varies; give one a list, as in space.selection.groups=[3, 5]")
        return space

    @model_validator(mode="after")
    def _possible_space(self) -> SweepConfig:
        if self.arm not in self.arms:
            raise ValueError(f"arm='{self.arm}' is no arm; there is: {', '.join(self.arms)}")
        arm, search = self.arms[self.arm], self.search
        if arm.selector is not S3:  # the grid of α : β is computed by its formula
            raise ValueError(f"arm='{self.arm}' selects by {arm.select}; a sweep is of an arm with select: {S3.name}")
        if self.of_arm(self.arm).selection.of(S3).choose != "best":
            raise ValueError("selection.choose: a sweep looks for the best subgroups; leave it out")
        if self.stages:
            raise ValueError("stages run beside the arms of a distillation or a comparison; leave them out of a sweep")
        if search.row is not None and search.row not in self.evaluation.rows:
            raise ValueError(f"search.row='{search.row}' is no row; there is: {', '.join(self.evaluation.rows)}")
        if search.trains_students and self.evaluation.val_per_class == 0:
            raise ValueError(f"search.by={search.by} decides on held-out training images; set evaluation.val_per_class")
        if self.cluster.wait_s and search.concurrent is None:
            raise ValueError("with cluster.wait_s the cluster does not say yet how many trials it holds; set search.concurrent")
        if search.early_stopping and len(self.draws) < 2:
            raise ValueError("search.early_stopping stops between draws; give several, as in draws=[0, 1, 2]")
        if search.method == "optuna" and not set(self.values) - set(INNER):
            raise ValueError(
                "search.method=optuna chooses settings of finetune and sampling, of which space has none; use grid"
            )
        if not self.inner():
            raise ValueError("alpha and beta are both 0 everywhere in space, which scores every subgroup alike; raise one")
        for key, values in self.values.items():
            if other := next((other for other in alternatives_to(key) if other in self.values), None):
                raise ValueError(f"{key} and {other} exclude each other, so that only one of them can be swept")
            section, _, rest = key.partition(".")
            here = arm.overrides.get(section) if section in get_args(Overridable) else None  # type: ignore[call-overload]
            own = dict(_leaves(here)) if isinstance(here, Mapping) else {}
            if (here is not None and not rest) or any(rest == name or rest.startswith(f"{name}.") for name in own):
                raise ValueError(f"arms.{self.arm}.overrides sets {key}, which is swept; leave it out of one of the two")
            if other := next((each for each in alternatives_to(rest) if own.get(each) is not None), None):
                raise ValueError(
                    f"arms.{self.arm}.overrides sets {section}.{other}, which takes the place of {key}, which is swept; leave "
                    "it out of one of the two"
                )
            if key.startswith("finetune.") and not arm.finetune:
                raise ValueError(f"{key} is swept, but arm '{self.arm}' fine-tunes nothing")
            if isinstance(values, Range) and search.method == "grid":
                raise ValueError(f"{key} is a range; give a list, or set search.method to random or optuna")
            for value in values if isinstance(values, list) else [values.low, values.high]:
                self._check(key, int(value) if isinstance(values, Range) and values.integer else value)
        return self

    def _check(self, key: str, value: Any) -> None:
        """Raise ``ValueError`` unless the value is valid together with the run's own settings or with the first values of all
        other swept settings."""
        others = {
            name: found[0] if isinstance(found, list) else found.low for name, found in self.values.items() if name != key
        }
        try:
            self.at({key: value})
        except ValidationError as error:
            try:
                self.at({**others, key: value})
            except ValidationError:
                raise ValueError(f"space.{key}={value!r}: {reason(RunConfig, error)}") from error

    @property
    def values(self) -> dict[str, list[Any] | Range]:
        """The list of values or the range of each swept setting, by dotted key."""
        return {
            key: Range.model_validate(found) if isinstance(found, Mapping) else list(found)
            for key, found in _leaves(self.space)
        }

    @property
    def row(self) -> str:
        """The row of the results table that decides."""
        return self.search.row or next(iter(self.evaluation.rows))

    def at(self, settings: Mapping[str, Any], draw: int | None = None) -> RunConfig:
        """The config of one distillation with these settings, without the keys that only a sweep has. Raises
        ``ValidationError``."""
        plain: dict[str, Any] = {key: value for key, value in canonical(self).items() if key in RunConfig.model_fields}
        for key, value in settings.items():
            tree: Any = value
            for part in reversed(key.split(".")):
                tree = {part: tree}
            plain = merge(plain, tree)
        plain["export"] = self.arm
        return RunConfig.model_validate(plain if draw is None else plain | {"seed": draw})

    def inner(self) -> list[Settings]:
        """All combinations of the inner settings, without α = β = 0, which scores every subgroup alike."""
        found = _product({key: values for key, values in self.values.items() if key in INNER})
        return [
            one
            for one in found
            if one.get("selection.alpha", self.selection.alpha) or one.get("selection.beta", self.selection.beta)
        ]

    def outer(self) -> list[Settings]:
        """The outer settings that ``grid`` or ``random`` try. ``optuna`` chooses its settings during the search; for it these
        are examples."""
        swept = {key: values for key, values in self.values.items() if key not in INNER}
        if self.search.method == "grid":
            return _product(swept)
        rng, found = random.Random(self.search.seed), []
        for _ in range(50 * self.search.trials):  # a small space has fewer distinct settings
            drawn = {key: _draw(values, rng) for key, values in swept.items()}
            if drawn not in found:
                found.append(drawn)
            if len(found) == self.search.trials:
                break
        return found


def _draw(values: list[Any] | Range, rng: random.Random) -> Any:
    if isinstance(values, list):
        return rng.choice(values)
    if values.integer and not values.log:
        return rng.randint(round(values.low), round(values.high))
    drawn = values.low * (values.high / values.low) ** rng.random() if values.log else rng.uniform(values.low, values.high)
    return round(drawn) if values.integer else float(f"{drawn:.4g}")


def _product(values: Mapping[str, Any]) -> list[Settings]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _with_numbers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with numbers in place of the strings that YAML 1.1 makes of some numbers (1e-3), and with every value of a list
    only once."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found[key] = _with_numbers(value)
        elif isinstance(value, list | tuple):
            found[key] = list({repr(_number(each)): _number(each) for each in value}.values())
        else:
            found[key] = value
    return found


def _number(value: Any) -> Any:
    """The value as a number if it is text such as ``1e-3``, and as an integer if it is a whole number such as 1.0; otherwise
    unchanged."""
    try:
        number = float(value) if isinstance(value, str | float) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, values) for each leaf of a tree; ranges are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and "low" not in value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
