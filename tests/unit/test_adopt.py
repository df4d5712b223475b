"""Teaching a generator new classes: where they start, and how fast their rows of the table are learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from ims3_ray.config import AdoptConfig, FinetuneConfig, RunConfig
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.models.dit import DiT
from ims3_ray.models.dit_files import write_dit
from ims3_ray.models.generator import load_generator, open_generator
from ims3_ray.plan import make_plan
from ims3_ray.stages.adopt import assigned
from ims3_ray.training.finetuning import Finetuner
from tests.conftest import CLASSES, tiny_values


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


def test_a_teacher_of_several_workers_is_another_one(tiny_world: Path, tmp_path: Path):
    """Each worker augments its own part of a batch and normalises it by itself."""
    arms = {"herding": {"title": "Herding", "images": "real", "select": "herding"}}
    keys, storage = [], Storage.at(str(tmp_path))
    one = {"num_workers": 1}
    for trainer in (one, {**one, "cpus_per_worker": 2}, {"num_workers": 2}, {**one, "max_workers": 2}):
        values = {**tiny_values(tiny_world, tmp_path), "arms": arms, "encoder": "teacher", "export": None}
        values["evaluation"] = {**values["evaluation"], "teacher": {"trainer": trainer}}
        plan = make_plan(RunConfig.model_validate(values))
        keys.append(next(stage.key(storage) for stage in plan.stages if stage.name == "teacher"))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_what_phi_compares_is_there_before_the_samples(tiny_world: Path, tmp_path: Path):
    arms = {"random_real": None, "dit": None, "ims3": None}
    values = {**tiny_values(tiny_world, tmp_path, arms=arms), "encoder": "teacher", "export": "best"}
    values["arms"] = {"s3": {"title": "S3", "images": "generated", "select": "s3"}}
    plan = make_plan(RunConfig.model_validate(values))
    order = [stage.title for stage in plan.stages]
    assert max(order.index("train the teacher"), order.index("embed train images")) < order.index("generate (pretrained)")


def test_the_choice_of_the_best_set_depends_on_the_students(tiny_world: Path, tmp_path: Path):
    plans = [
        make_plan(RunConfig.model_validate(tiny_values(tiny_world, tmp_path, evaluation={"seeds": seeds})))
        for seeds in ([0], [0, 1])
    ]
    params = [next(stage.params for stage in plan.stages if stage.name == "export") for plan in plans]
    assert params[0] != params[1]


def test_a_generator_without_a_condition_for_no_class_adopts_from_known_classes_alone(tmp_path: Path, tiny_world: Path):
    without = DiT(
        load_generator(tiny_world / "dit.safetensors").config.model_copy(update={"num_classes": 2, "null_row": False})
    )
    write_dit(without, CLASSES[:2], tmp_path / "two.safetensors")
    values = tiny_values(tiny_world, tmp_path, generator=str(tmp_path / "two.safetensors"), sampling={"cfg_scale": 1.0})
    values["finetune"]["label_dropout"] = 0
    for adopt, message in (
        ({}, r"set adopt.label_dropout=0"),
        ({"label_dropout": 0, "like": "null"}, r"class 'middle' cannot start from that of no class"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(RunConfig.model_validate({**values, "adopt": adopt}))
    make_plan(RunConfig.model_validate({**values, "adopt": {"label_dropout": 0, "like": {"middle": "left"}}}))


def test_what_the_generator_cannot_learn_is_refused(tmp_path: Path, tiny_world: Path):
    without = DiT(load_generator(tiny_world / "dit.safetensors").config.model_copy(update={"num_classes": 2}))
    write_dit(without, CLASSES[:2], tmp_path / "two.safetensors")
    values = tiny_values(tiny_world, tmp_path, generator=str(tmp_path / "two.safetensors"))
    for adopt, message in (
        ({"parameters": "lora"}, r"set adopt\.parameters="),
        ({"words": "captions"}, r"set adopt\.words=class"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(RunConfig.model_validate({**values, "adopt": adopt}))


def test_only_the_denoising_loss_adopts_classes():
    with pytest.raises(ValidationError, match="classes are adopted by diffusion alone"):
        AdoptConfig.model_validate({"objectives": {"inversion_matching": {"weight": 0.1}}})


def test_other_settings_of_the_denoising_loss_may_be_given():
    adopt = AdoptConfig.model_validate({"objectives": {"diffusion": {"weight": 2.0}}})
    assert [objective.name for objective in adopt.objectives.active] == ["diffusion"]
