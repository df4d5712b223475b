"""Teaching a generator new classes: where they start, and how fast their rows of the table are learnt."""

from __future__ import annotations

from pathlib import Path

import torch

from ims3_ray.config import AdoptConfig, FinetuneConfig, RunConfig
from ims3_ray.models.generator import open_generator
from ims3_ray.plan import make_plan
from ims3_ray.stages.adopt import assigned
from ims3_ray.training.finetuning import Finetuner
from tests.conftest import tiny_values


def test_each_new_class_begins_as_another_known_one():
    scores = torch.tensor([[0.0, -1.0, -9.0], [-0.1, -5.0, -9.0]])
    assert assigned(scores, ["shoe", "bag", "coat"]) == ["bag", "shoe"], "-1.1 in all, and -5 the other way round"


def test_of_more_new_classes_than_known_ones_some_begin_alike():
    found = assigned(torch.tensor([[0.0, -1.0], [0.0, -2.0], [0.0, -3.0]]), ["shoe", "bag"])
    assert found == ["bag", "shoe", "shoe"]


def test_the_table_of_labels_has_a_learning_rate_of_its_own(tiny_world: Path):
    generator = open_generator(tiny_world / "dit.safetensors")
    for config, rates in ((FinetuneConfig(lr=0.1), [0.1]), (AdoptConfig(lr=0.1).tuning, [1.0, 0.1])):
        for parameters in ("difffit", "all"):
            tuning = config.model_copy(update={"parameters": parameters})
            tuner = Finetuner(generator.load(), generator, tuning, "cpu")
            groups = tuner.engine.optimizer.param_groups  # type: ignore[attr-defined]
            assert [group["lr"] for group in groups] == rates
            assert sum(len(group["params"]) for group in groups) == len(tuner.trained)
            if len(rates) == 2:
                (table,) = groups[0]["params"]
                assert table is dict(tuner.trained)[generator.table]


def test_the_trained_teacher_serves_as_the_encoder(tiny_world: Path, tmp_path: Path):
    arms = {
        "random": {"title": "Random", "images": "real", "select": "random"},
        "herding": {"title": "Herding", "images": "real", "select": "herding"},
    }
    values = {**tiny_values(tiny_world, tmp_path), "arms": arms, "encoder": "teacher", "export": "best"}
    plan = make_plan(RunConfig.model_validate(values))
    assert [stage.name for stage in plan.stages].count("teacher") == 1
    (embed,) = [stage for stage in plan.stages if stage.name == "embed"]
    assert embed.inputs["phi"].name == "teacher"
    assert not plan.weights
    assert [stage.name for stage in plan.stages if stage.name in ("teacher", "embed")] == ["teacher", "embed"]
