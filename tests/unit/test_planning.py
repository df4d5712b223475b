"""Planning is cheap: each key is computed once, each artifact asked for once, each cost counted once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ims3_ray.config import CompareConfig
from ims3_ray.config.loading import load_config
from ims3_ray.engine import stage as stage_module
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import Encoder
from ims3_ray.plan import make_comparison
from ims3_ray.plan.estimate import describe
from tests.conftest import tiny_values

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_large_comparison_is_described_with_a_question_for_each_artifact(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = {**tiny_values(tiny_world, tmp_path), "name": "c", "budgets": [1, 2], "draws": [0, 1]}
    methods = load_config(CompareConfig, CONFIGS / "methods" / "all.yaml").arms
    values["arms"] = {name: arm.model_dump() for name, arm in methods.items()}
    asked: Counter[str] = Counter()

    def counted(what: str, call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            asked[what] += 1
            return call(*args, **kwargs)

        return instead

    monkeypatch.setattr(stage_module, "key_of", counted("keys", stage_module.key_of))
    for name in ("read", "exists", "names", "is_folder"):
        monkeypatch.setattr(Storage, name, counted(name, getattr(Storage, name)))
    monkeypatch.setattr(Encoder, "__init__", counted("encoders", Encoder.__init__))
    plan = make_comparison(CompareConfig.model_validate(values))
    storage = Storage.at(str(tmp_path))
    describe(plan, storage)
    stages = len(plan.stages)
    assert stages > 100
    assert asked["keys"] <= stages
    assert asked["read"] <= stages
    assert asked["is_folder"] <= stages
    assert asked["exists"] == asked["names"] == 0
    assert asked["encoders"] <= 4, "each shape of φ is built once to count its operations, the teacher once more for its norms"
    before = Counter(asked)
    describe(plan, storage)
    assert asked["keys"] == before["keys"], "what is known is not computed again"
    assert asked["read"] == before["read"]
