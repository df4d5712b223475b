"""``precision: auto`` is decided once, before anything is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ims3_ray.commands.jobs import plan_distill
from ims3_ray.config import CompareConfig, RunConfig, SweepConfig, canonical
from ims3_ray.engine.folder import check_folder
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_comparison, make_plan, make_sweep
from ims3_ray.plan.precision import decided
from ims3_ray.training import precision
from tests.conftest import tiny_values

AUTO = {"sampling": {"precision": "auto"}, "finetune": {"precision": "auto"}}


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Which types of device compute bfloat16 natively."""
    able = {"cpu": False, "cuda": True}
    monkeypatch.setattr(precision, "computes_bf16", able.__getitem__)
    return able


def formats(config: RunConfig) -> tuple[str, str]:
    return config.sampling.precision, config.finetune.precision


def test_the_devices_that_do_the_work_decide(tiny_world: Path, tmp_path: Path, native: dict[str, bool]):
    config = RunConfig.model_validate(tiny_values(tiny_world, tmp_path, **AUTO))
    assert formats(make_plan(config).config) == ("fp32", "fp32")
    native["cpu"] = True
    assert formats(make_plan(config).config) == ("bf16", "bf16")
    native["cpu"] = False
    on_gpus = {**AUTO, "actors": {"gpus": 0.5}}
    assert formats(make_plan(RunConfig.model_validate(tiny_values(tiny_world, tmp_path, **on_gpus))).config) == ("bf16", "fp32")


def test_the_format_of_an_adoption_is_decided_too(tiny_world: Path, tmp_path: Path, native: dict[str, bool]):
    native["cpu"] = True
    config = RunConfig.model_validate({**tiny_values(tiny_world, tmp_path), "adopt": {"precision": "auto"}})
    found = decided(config)
    assert found.adopt is not None
    assert found.adopt.precision == "bf16"
    assert formats(found) == ("fp32", "fp32")


def test_the_keys_are_those_of_the_format_and_the_default_is_fp32(tiny_world: Path, tmp_path: Path, native: dict[str, bool]):
    def keys(**changes: Any) -> dict[str, str | None]:
        plan = make_plan(RunConfig.model_validate(tiny_values(tiny_world, tmp_path, **changes)))
        return {stage.title: stage.key(Storage.at(str(tmp_path))) for stage in plan.stages if stage.name == "generate"}

    assert keys() == keys(**AUTO)
    native["cpu"] = True
    assert keys(sampling={"precision": "bf16"}, finetune={"precision": "bf16"}) == keys(**AUTO)
    assert keys() != keys(**AUTO)


def test_a_run_that_is_continued_keeps_its_format(tiny_world: Path, tmp_path: Path, native: dict[str, bool]):
    config = RunConfig.model_validate(tiny_values(tiny_world, tmp_path, **AUTO))
    storage = Storage.at(str(tmp_path))
    storage.write("tiny/config.yaml", yaml.safe_dump(canonical(make_plan(config).config)).encode())
    native["cpu"] = True
    found = make_plan(config).config
    assert formats(found) == ("fp32", "fp32")
    check_folder(found, storage)  # it is the same run
    assert "results:" in "\n".join(plan_distill(config))  # and its plan is shown
    assert formats(make_plan(config.model_copy(update={"name": "other"})).config) == ("bf16", "bf16")


def test_overrides_of_arms_are_decided_too(tiny_world: Path, tmp_path: Path, native: dict[str, bool]):
    native["cpu"] = True
    arms = {
        "dit": {"title": "DiT", "images": "generated"},
        "quick": {"title": "Quick", "images": "generated", "overrides": {"sampling": {"precision": "auto", "steps": 2}}},
    }
    values = {**tiny_values(tiny_world, tmp_path), "arms": arms, "budgets": [1]}
    found = make_comparison(CompareConfig.model_validate(values)).config
    assert formats(found.of_arm("quick")) == ("bf16", "fp32")
    assert formats(found.of_arm("dit")) == ("fp32", "fp32")


def test_a_search_over_formats_names_them(tiny_world: Path, tmp_path: Path, native: dict[str, bool]):
    values = {**tiny_values(tiny_world, tmp_path), "space": {"sampling.precision": ["fp32", "auto"]}}
    with pytest.raises(UserError, match="must name them: bf16 or fp32"):
        make_sweep(SweepConfig.model_validate(values))
    values = {**tiny_values(tiny_world, tmp_path, **AUTO), "space": {"sampling.steps": [2, 3]}}
    assert formats(make_sweep(SweepConfig.model_validate(values)).config) == ("fp32", "fp32")
