"""Titles of stages that differ where the stages do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ims3_ray.engine.stage import Context, Stage
from ims3_ray.plan.titles import distinguish


@dataclass(eq=False)
class Plain(Stage):
    name = "plain"

    def run(self, context: Context) -> None:
        """Make nothing."""


def stage(title: str, params: dict[str, Any], **inputs: Stage) -> Stage:
    return Plain(title, params, inputs)


def test_equal_titles_name_what_the_stages_differ_in():
    tunings = [
        stage("fine-tune", {"seed": seed, "tuning": tuning, "generator": "0f" * 32})
        for seed, tuning in ((0, {}), (1, {}), (0, {"lr": 0.01, "objectives": {"im": 0.8}}), (1, {"lr": 0.01}))
    ]
    pools = [stage("generate (fine-tuned)", {}, finetune=tuning) for tuning in tunings]
    alone = stage("encode", {"seed": 0})
    distinguish([*tunings, *pools, alone])
    assert [each.title for each in tunings] == [
        "fine-tune, seed 0", "fine-tune, seed 1", "fine-tune, seed 0, lr 0.01", "fine-tune, seed 1, lr 0.01",
    ]  # fmt: skip
    assert [each.title for each in pools] == [tuning.title.replace("fine-tune", "generate (fine-tuned)") for tuning in tunings]
    assert alone.title == "encode"


def test_a_long_value_is_named_only_where_nothing_else_differs():
    pair = [stage("select", {"generator": digest * 40, "steps": steps}) for digest, steps in (("a", 5), ("b", 9))]
    distinguish(pair)
    assert [each.title for each in pair] == ["select, steps 5", "select, steps 9"]
