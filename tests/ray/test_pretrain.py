"""`jobs/pretrain.py` and `jobs/pack.py`: from images to weights that a distillation takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ims3_ray import RunConfig
from ims3_ray.commands.pretrain import pretrain
from ims3_ray.config import PretrainConfig
from ims3_ray.data.sources import open_source
from ims3_ray.models.checkpoints import read_metadata
from ims3_ray.plan import make_plan
from tests.conftest import CLASSES, tiny_values

QUICK: dict[str, Any] = {
    "generator": {
        "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "steps": 4, "batch_size": 8, "checkpoint_every": 2,
    },
    "encoder": {"epochs": 2, "batch_size": 8, "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
    "quality": {
        "images_per_class": 3, "sampling": {"steps": 2, "unit_size": 3},
        "judge": {"width": 4, "epochs": 2, "batch_size": 16, "validations": 1}, "threads": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("target", ["generator", "encoder"])
def test_trained_weights_come_with_a_card_and_a_distillation_takes_them(
    target: str, tiny_world: Path, tmp_path: Path, cluster: None
):
    values = {**QUICK, "name": "mine", "target": target, "storage": str(tmp_path)}
    path = pretrain(PretrainConfig.model_validate({**values, "data": {"path": str(tiny_world / "data"), "size": 8}}))
    assert path == tmp_path / "mine" / "mine.safetensors"
    metadata = read_metadata(path, {"generator": "dit", "encoder": "encoder"}[target])
    card = path.with_suffix(".md").read_text()
    for text in ("90 images", "seconds:", "hardware:", "on the test split", "training split alone"):
        assert text in card
    if target == "generator":
        assert metadata["classes"].split("\n") == list(CLASSES)
        assert "as they were asked for" in card
        assert path.with_suffix(".png").is_file()
    config = RunConfig.model_validate(tiny_values(tiny_world, tmp_path / "runs", **{target: str(path)}))
    assert make_plan(config).classes.names == CLASSES


def test_pack_writes_parquet_that_opens_as_the_same_images(tiny_world: Path, tmp_path: Path):
    import runpy

    from tests.e2e.conftest import ROOT

    pack = runpy.run_path(str(ROOT / "jobs" / "pack.py"))
    out = tmp_path / "packed.parquet"
    data = {"path": str(tiny_world / "data")}
    pack["run"](pack["PackConfig"].model_validate({"data": data, "per_class": 4, "out": str(out)}))
    packed, original = open_source(str(out), "train"), open_source(data["path"], "train")
    assert packed.class_names == CLASSES
    assert np.bincount(packed.labels).tolist() == [4, 4, 4]
    there = {(int(label), np.asarray(original.image(i)).tobytes()) for i, label in enumerate(original.labels)}
    assert {(int(label), np.asarray(packed.image(i)).tobytes()) for i, label in enumerate(packed.labels)} <= there
