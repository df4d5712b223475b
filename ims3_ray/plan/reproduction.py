"""What a table or figure of the paper takes: the plans of its runs, with what several of them share counted once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ims3_ray.config import CompareConfig, SweepConfig
from ims3_ray.config.paper import Reproduction
from ims3_ray.engine.stage import Stage
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_comparison, make_sweep
from ims3_ray.plan.estimate import Expected, expect, hours_between, hours_of, hours_text, money_text
from ims3_ray.plan.layout import Plan
from ims3_ray.plan.sweep import SweepPlan

COUNTED = {"fine_tunes": "fine-tunes", "pools": "pools", "evaluations": "students"}
"""What stages are counted as → its name in the text."""


@dataclass(frozen=True)
class Share:
    """The stages of a run, or of several runs, each once."""

    expected: Mapping[str, Expected]
    """Identity of a stage, which is equal in two runs that share it → its estimate."""
    most_students: int = 0
    """Largest number of students beyond those of ``expected``: only after its selections a search knows which ones it
    trains."""
    most_flops: float = 0.0
    """Floating-point operations of these students."""

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each kind of :data:`COUNTED` the number of units and of those that are there already. A unit of a pool is the
        pool, that of a fine-tuning is a group of classes, and that of an evaluation is a student."""
        found = {}
        for kind in COUNTED:
            mine = [each for each in self.expected.values() if each.stage.counted == kind]
            whole = [1 if kind == "pools" else len(each.stage.units) for each in mine]
            left = [bool(each.missing) if kind == "pools" else each.missing for each in mine]
            found[kind] = sum(whole), sum(whole) - sum(left)
        return found

    def described(self, config: CompareConfig | SweepConfig) -> str:
        cluster = config.cluster
        texts = [f"{COUNTED[kind]} {whole} ({there} there)" for kind, (whole, there) in self.counts().items() if whole]
        if self.most_students:
            hours = hours_between(config, self.most_flops, self.most_flops)
            texts.append(f"students at most {self.most_students}, which are {hours}")
        left = list(self.expected.values())
        return f"{', '.join(texts)}; left: {hours_text(hours_of(left), cluster)}; " + money_text(
            sum(each.money(cluster) for each in left), cluster
        )


def share_of(plan: Plan[Any], storage: Storage) -> Share:
    """The share of one run."""
    if not isinstance(plan, SweepPlan):
        return Share({identity(each.stage): each for each in expect(plan, storage)})
    stages = {identity(stage): stage for trial in plan.trials for stage in trial.stages}
    stages |= {identity(stage): stage for stage in plan.stages}
    found = expect(Plan(plan.config, plan.classes, list(stages.values())), storage)
    config = plan.config
    students = round(plan.most_evaluated) * len(config.evaluation.rows) * len(config.evaluation.seeds)
    return Share({identity(each.stage): each for each in found}, students, plan.most_evaluated * plan.evaluation_flops)


def together(shares: Iterable[Share]) -> Share:
    """Several runs as one."""
    merged, flops, students = dict[str, Expected](), 0.0, 0
    for share in shares:
        flops, students = flops + share.most_flops, students + share.most_students
        for name, each in share.expected.items():
            there = merged.get(name)
            if there is None or len(there.stage.units) < len(each.stage.units):  # the smaller pool is a part of the larger one
                merged[name] = each
    return Share(merged, students, flops)


def identity(stage: Stage) -> str:
    """A hash of what a stage makes, known before anything is made. Two sets of equal images have different ones, and pools of
    different sizes of the same classes the same."""
    inputs = {name: identity(other) for name, other in stage.inputs.items()}
    classes = sorted({unit.rpartition("-u")[0] or unit for unit in stage.units})
    text = json.dumps([stage.name, stage.version, stage.params, classes, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_of(config: CompareConfig | SweepConfig) -> Plan[Any]:
    """The plan of one run."""
    return make_sweep(config) if isinstance(config, SweepConfig) else make_comparison(config)


def described(reproduction: Reproduction) -> str:
    """What the table or figure takes, as text, for ``--dry-run``."""
    lines, shares = [f"{reproduction.name}: {reproduction.title}", *(f"  {note}" for note in reproduction.notes)], []
    for name, config in reproduction.runs.items():
        shares.append(share_of(plan_of(config), Storage.at(config.storage)))
        lines.append(f"{name}: {shares[-1].described(config)}")
    if len(shares) > 1:
        config = next(iter(reproduction.runs.values()))
        lines.append(f"together, each only once: {together(shares).described(config)}")
    return "\n".join(lines)
