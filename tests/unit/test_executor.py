"""The order in which stages run, and what they are told: with kinds that do nothing but say so."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ims3_ray.config import RunConfig
from ims3_ray.data.classes import ClassTable
from ims3_ray.engine.executor import arranged, next_batch, run_stages
from ims3_ray.engine.shards import commit_units
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.io.storage import Storage
from ims3_ray.tracking import Untracked

RAN: list[str] = []


@dataclass(eq=False)
class Dummy(Stage):
    together: Hashable = None

    @property
    def batch(self) -> Hashable:
        return self if self.together is None else self.together

    def run(self, context: Context) -> None:
        RAN.append(self.title)
        commit_units(self.artifact(context.storage), {unit: {"images": 3} for unit in self.units}, 1.5)

    def check(self, context: Context) -> None:
        RAN.append(f"check {self.title}")


@dataclass(eq=False)
class Last(Dummy):
    runs_last: ClassVar[bool] = True
    heard: ClassVar[list[tuple[list[str], list[str]]]] = []

    @classmethod
    def listen(cls, context: Context, waiting: Sequence[Any], running: Sequence[Stage]) -> dict[Stage, list[Any]]:
        cls.heard.append(([stage.title for stage in waiting], [stage.title for stage in running]))
        return {running[0]: [object()]}


Dummy.name, Last.name = "dummy", "last"


def stage(title: str, *inputs: Stage, kind: type[Dummy] = Dummy, together: Hashable = None) -> Dummy:
    return kind(title, {"title": title}, {one.title: one for one in inputs}, together=together)


def titles(stages: Sequence[Stage]) -> list[str]:
    return [each.title for each in stages]


def world() -> dict[str, Dummy]:
    """As a distillation: images, a fine-tuning, two pools of which one waits for it, two sets and their students."""
    a = stage("images", together="real")
    tune = stage("tune", a)
    pool, tuned = stage("pool", together="made"), stage("tuned pool", tune, together="made")
    looked = stage("look at tuned pool", tuned, together="made")
    first, second = stage("choose images", a), stage("choose tuned", looked)
    students = [stage(f"students of {one.title}", one, kind=Last, together="students") for one in (first, second)]
    return {each.title: each for each in (*students, second, first, looked, tuned, pool, tune, a)}


def test_stages_come_after_their_inputs_and_in_as_few_batches_as_possible():
    found = titles(arranged(list(world().values())))
    assert found[-2:] == ["students of choose images", "students of choose tuned"]
    assert found.index("images") < found.index("tune") < found.index("pool")
    assert found.index("tuned pool") == found.index("pool") - 1 or found.index("tuned pool") == found.index("pool") + 1
    assert found.index("look at tuned pool") > found.index("tuned pool")


def test_a_batch_whose_stages_cannot_all_run_waits_unless_nothing_else_can():
    a = stage("a")
    pair = [stage("one", together="pair"), stage("other", a, together="pair")]
    assert titles(next_batch([*pair, a])) == ["a"]
    assert titles(next_batch(pair)) == ["one", "other"]
    with pytest.raises(AssertionError, match="no stage can run"):
        next_batch([_stuck()])


def test_what_is_made_for_all_arms_goes_before_what_one_arm_needs():
    of_arm = type("OfArm", (Dummy,), {"of_arm": True})
    mine, shared = stage("mine", kind=of_arm), stage("shared")
    assert titles(next_batch([mine, shared])) == ["shared"]
    assert titles(next_batch([stage("students", kind=Last), mine])) == ["mine"]


def _stuck() -> Dummy:
    found = stage("stuck")
    found.inputs = {"itself": found}
    return found


def context(tmp_path: Path) -> Context:
    return Context(RunConfig(), Storage.at(str(tmp_path)), ClassTable(("a",), (0,), (3,)), Untracked())


def test_what_is_missing_runs_and_every_stage_is_checked_once_complete(tmp_path: Path):
    stages = arranged(list(world().values()))
    RAN.clear()
    Last.heard.clear()
    run_stages(context(tmp_path), stages)
    assert [title for title in RAN if not title.startswith("check")] == titles(stages)
    assert sorted(title for title in RAN if title.startswith("check")) == sorted(f"check {title}" for title in titles(stages))
    waiting, running = Last.heard[0]
    assert waiting == ["students of choose images", "students of choose tuned"]
    assert running == ["images"]

    RAN.clear()
    run_stages(context(tmp_path), stages)
    assert [f"check {title}" for title in titles(stages)] == RAN

    lost = next(each for each in stages if each.title == "choose tuned")
    storage = Storage.at(str(tmp_path))
    storage.delete(lost.artifact(storage).folder)
    RAN.clear()
    run_stages(context(tmp_path), stages)
    assert [title for title in RAN if not title.startswith("check")] == ["choose tuned"]


def test_what_another_job_has_made_meanwhile_is_not_made_again(tmp_path: Path):
    mine = context(tmp_path)
    only = stage("only")
    assert only.missing(mine.storage)
    other = Storage.at(str(tmp_path))  # another process, which this one does not hear of
    commit_units(only.artifact(other), {"result": {}}, 1.0)
    RAN.clear()
    run_stages(mine, [only])
    assert RAN == ["check only"]


def test_a_record_that_another_job_has_replaced_is_noticed(tmp_path: Path):
    mine, replaced = context(tmp_path), False

    @dataclass(eq=False)
    class Interrupted(Dummy):
        def run(self, context: Context) -> None:
            nonlocal replaced
            super().run(context)
            if not replaced:  # another job, which has made one unit, writes its own record over this one's
                replaced = True
                artifact = self.artifact(Storage.at(str(tmp_path)))
                artifact.commit({"units": {"a": {}}, "seconds": 1.0, "stage": "dummy"})

    Interrupted.name = "dummy"
    both = Interrupted("both", {"title": "both"}, units=("a", "b"))
    RAN.clear()
    run_stages(mine, [both])
    assert RAN == ["both", "both", "check both"]
    assert not both.missing(Storage.at(str(tmp_path)))


def test_a_stage_that_is_widened_costs_more_and_keeps_what_it_had():
    found = Dummy("make", {}, units=("a", "b"), images=10, flops=4.0, stored=6.0)
    found.widen(("b", "c"))
    assert (found.units, found.images, found.flops, found.stored) == (("a", "b", "c"), 15, 6.0, 9.0)
    found.widen(("a",))
    assert found.units == ("a", "b", "c")
