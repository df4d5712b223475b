"""How many samples φ recognises, and what is said of too few."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from ims3_ray.config import RecognitionConfig
from ims3_ray.engine.pool import DerivedStage
from ims3_ray.errors import UserError
from ims3_ray.selection.recognition import recognised
from ims3_ray.stages import recognition
from ims3_ray.stages.recognition import Recognition, looked_at


def test_an_image_belongs_to_the_class_with_the_nearest_mean():
    references = [torch.tensor([[2.0, 0.0], [2.0, 0.2]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[-1.0, -1.0]])]
    features = [torch.tensor([[5.0, 1.0], [0.1, 1.0], [-1.0, -2.0], [1.0, 0.0]]), torch.tensor([[0.1, 9.0]]), -references[2]]
    assert recognised(features, references) == [0.5, 1.0, 0.0]


def test_of_many_classes_some_are_looked_at():
    assert looked_at(3) == [0, 1, 2]
    assert looked_at(1000) == list(range(0, 1000, 50))


def test_too_few_recognised_samples_end_the_run_or_print_a_line(capsys: pytest.CaptureFixture[str]):
    found = Recognition({"cat": 0.2, "dog": 0.4}, {"cat": 0.9, "dog": 1.0})
    assert found.relative == pytest.approx(0.3 / 0.95)
    with pytest.raises(UserError, match=r"generate \(pretrained\): φ recognises 30% of the samples and 95% of real images"):
        found.check("generate (pretrained)", RecognitionConfig())
    found.check("generate (pretrained)", RecognitionConfig(stop_below=0.0))
    assert "note: generate (pretrained): φ recognises 30%" in capsys.readouterr().out
    found.check("generate (pretrained)", RecognitionConfig(stop_below=0.0, warn_below=0.0))
    Recognition({"cat": 0.9}, {"cat": 1.0}).check("generate (pretrained)", RecognitionConfig())
    assert capsys.readouterr().out == ""


def test_classes_of_few_real_images_and_samples_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch):
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    samples = {0: one, 1: other, 2: one, 3: torch.zeros(0, 2)}
    images = {0: one.repeat(4, 1), 1: other.repeat(5, 1), 2: one.repeat(3, 1), 3: one.repeat(9, 1)}
    monkeypatch.setattr(recognition, "_features", lambda stage, position, storage: stage[position])
    storage: Any = None
    pool, real = cast(DerivedStage, samples), cast(DerivedStage, images)
    found = Recognition.of(pool, real, ("a", "b", "c", "d"), storage)
    assert found == Recognition({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    images[1] = images[1][:3]
    assert Recognition.of(pool, real, ("a", "b", "c", "d"), storage) is None
