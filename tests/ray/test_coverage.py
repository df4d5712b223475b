"""What the sets of a run cover, against a computation on the driver; results, report and MLflow have it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load

from ims3_ray import distill
from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.sets import read_set
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import load_encoder
from ims3_ray.plan import make_plan
from ims3_ray.selection.coverage import coverage, frechet
from tests.ray.conftest import Run, copy_of

K = 2


def test_every_set_is_compared_with_the_real_images_of_its_classes(tiny_run: Run, tmp_path: Path):
    changes = {"name": "covered", "stages": {"coverage": {"neighbours": K, "map": True}}}
    config = copy_of(tiny_run, tmp_path).model_copy(update=changes)
    result = distill(config)
    plan, storage = make_plan(config), Storage.at(config.storage)
    measured = {stage.label: stage for stage in plan.stages if stage.name == "coverage"}
    assert set(measured) <= set(result.results["coverage"]) == set(config.arms)
    phi = load_encoder(Path(config.encoder))
    (real,) = {stage.inputs["real"].inputs["images"] for stage in measured.values()}
    for arm, scored in plan.sets.items():
        pixels, labels = read_set(scored.images.artifact(storage))[:2]
        found = result.results["coverage"][arm]
        for position, _ in enumerate(plan.classes.names):
            shards = [load(real.artifact(storage).read(f"{unit}.safetensors")) for unit in real.units_of_class(position)]
            with torch.inference_mode():
                of_real = phi(to_signed(torch.cat([shard["pixels"] for shard in shards])))
                of_set = phi(to_signed(pixels[labels == position]))
            wanted = coverage(of_set, of_real, K)
            mine = {name: values[position] for name, values in found["by_class"].items()}
            assert (mine["precision"], mine["recall"]) == (wanted.precision, wanted.recall)
            assert (mine["density"], mine["coverage"]) == (pytest.approx(wanted.density), wanted.coverage)
            assert mine["frechet"] == pytest.approx(frechet(of_set, of_real), abs=1e-5)
        assert found["coverage"] == pytest.approx(sum(found["by_class"]["coverage"]) / len(plan.classes.names))
        assert list(found["reached"]) == ["1", "2"], "the tiny run has two images a class"
        assert found["reached"]["2"] == pytest.approx(found["coverage"]), "all of the set has reached what it covers"
    real_set = result.results["coverage"]["random_real"]
    assert real_set["precision"] == 1, "real images lie in balls of real images"
    assert real_set["novelty"] == pytest.approx(0, abs=1e-3), "each is its own nearest real image"
    stage = measured["random_real"]
    nearest = load(stage.artifact(storage).read(f"{stage.units[0]}.safetensors"))
    assert nearest["ratio"].max() < 1e-3
    assert all(math.isfinite(value) for value in nearest["distance"].tolist())

    report = (Path(result.folder) / "report.html").read_text()
    for text in ("<h2>What the sets cover</h2>", "Map of the features", "closest to real ones", "Coverage as a set grows"):
        assert text in report
    assert report.count("images above their nearest real images") == len(config.arms)
    client = MlflowClient(f"sqlite:///{result.folder}/mlflow.db")
    children = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{result.results['mlflow']['run']}'")
    assert {run.data.metrics["coverage/precision"] for run in children} == {
        found["precision"] for found in result.results["coverage"].values()
    }
