"""Sets that lie somewhere, and soft labels, on the artifacts of the tiny run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ims3_ray import EvaluateConfig, UserError, evaluate
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import load_encoder
from ims3_ray.plan import make_evaluation
from ims3_ray.stages import evaluate as module
from ims3_ray.stages.teacher import load_teacher
from tests.conftest import CLASSES
from tests.ray.conftest import Run

SOFT = {"labels": "soft", "width": 8, "epochs": 4, "validations": 2}
TEACHER = {"training": {"epochs": 2, "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}}}


def scoring(run: Run, sets: dict[str, str], **changes: Any) -> EvaluateConfig:
    """Of ``sets`` with the data and the storage of a run."""
    values = {key: run.config.model_dump()[key] for key in ("storage", "data", "actors", "evaluation")}
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) else change
    return EvaluateConfig.model_validate({"name": "scores", **values, "sets": sets})


def test_a_set_that_was_exported_is_known_again_and_not_trained_on_twice(tiny_run: Run):
    distilled = tiny_run.folder / "distilled"
    config = scoring(tiny_run, {"parquet": str(distilled), "folder": str(distilled / "images")})
    result = evaluate(config)
    exported = tiny_run.result.results["sets"]["ims3"]
    for found in result.results["sets"].values():
        assert found["content"] == exported["content"]
        assert found["rows"] == exported["rows"]
    keys = {row["key"] for row in tiny_run.result.results["stages"]}
    assert all(row["key"] in keys for row in result.results["stages"] if row["stage"] == "evaluate")
    html = Path(result.report).read_text()
    for text in ("parquet", "folder", "hard/convnet-3", "Learning curves", "confusion:", *CLASSES):
        assert text in html


def test_a_student_reserves_no_more_memory_than_the_nodes_that_are_left_have(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The node with the most memory is lost once the students wait for it: they are submitted again, for the others."""
    asked = iter([1e13])
    monkeypatch.setattr(module, "host_bytes", lambda *_: 1e13)
    monkeypatch.setattr(module, "largest_memory", lambda *_: next(asked, 1e6))
    config = scoring(tiny_run, {"mine": str(tiny_run.folder / "distilled")}, storage=str(tmp_path))
    assert len(config.evaluation.seeds) == 2
    found = evaluate(config).results["sets"]["mine"]
    assert found["rows"] == tiny_run.result.results["sets"]["ims3"]["rows"]


@pytest.mark.slow
def test_soft_labels_come_from_a_teacher_that_the_project_trains(tiny_run: Run):
    protocols = {**tiny_run.config.model_dump()["evaluation"]["protocols"], "soft": SOFT}
    evaluation = {"protocols": protocols, "teacher": TEACHER, "seeds": [0]}
    config = scoring(tiny_run, {"mine": str(tiny_run.folder / "distilled")}, name="soft", evaluation=evaluation)
    result = evaluate(config)
    rows = result.results["sets"]["mine"]["rows"]
    assert list(rows) == ["hard/convnet-3", "soft/convnet-3"]
    assert rows["soft/convnet-3"]["curve"][-1]["loss"] < 0.1  # a divergence at T = 20, no cross entropy
    storage = Storage.at(config.storage)
    (teacher,) = [stage for stage in make_evaluation(config).stages if stage.name == "teacher"]
    entry = (teacher.manifest(storage) or {})["units"]["result"]
    assert entry["images"] == 2 * 90
    assert 0 <= entry["test_accuracy"] <= 100
    images = torch.rand(4, 1, 8, 8)
    assert load_teacher(teacher.artifact(storage), CLASSES, "cpu")(images).shape == (4, 3)
    given = scoring(
        tiny_run, {"mine": str(tiny_run.folder / "distilled")}, name="given",
        evaluation={**evaluation, "teacher": {"weights": tiny_run.config.encoder}},
    )  # fmt: skip
    stages = make_evaluation(given).stages
    assert not [stage for stage in stages if stage.name == "teacher"]
    weights = next(stage.weights["teacher"] for stage in stages if "teacher" in stage.weights)
    with torch.no_grad():
        expected = load_encoder(Path(tiny_run.config.encoder)).logits(2 * images - 1).flip(1)
        torch.testing.assert_close(load_teacher(weights, CLASSES[::-1], "cpu")(images), expected)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder / "left"), "has no class 'left'; it has middle, right"),
        (
            lambda folder: shutil.copytree(folder / "left", folder / "up"),
            "has a class 'up' that the data do not have, or not in data.classes",
        ),
        (lambda folder: [file.unlink() for file in (folder / "left").iterdir()], "has no class 'left'; it has middle, right"),
        (lambda folder: next((folder / "right").iterdir()).write_bytes(b"no image"), "cannot be decoded"),
    ],
)
def test_a_set_that_does_not_fit_is_refused_in_one_line(spoil: Any, says: str, tiny_run: Run, tmp_path: Path):
    folder = tmp_path / "set"
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 7), np.uint8)).save(folder / name / "0.png")
    spoil(folder)
    with pytest.raises(UserError, match=says):
        evaluate(scoring(tiny_run, {"bad": str(folder)}, name=f"bad-{tmp_path.name}"))
