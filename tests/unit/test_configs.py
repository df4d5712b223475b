"""The shipped configs of ImageNet and its subsets: they load, plan on stand-in weights, and mean the published classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ims3_ray.config import RunConfig
from ims3_ray.data.classes import imagenet_wnids
from ims3_ray.loading import load_config
from ims3_ray.pipeline import describe
from ims3_ray.plan import make_plan
from tests.imagenet import write_images, write_weights

CONFIGS = Path(__file__).parents[2] / "configs"

# From the class tables of the published baselines: positions among the 1,000 sorted wnids.
LABELS = {
    "imagewoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
    "imagenette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
    "imageidc": [452, 64, 374, 236, 993, 176, 882, 904, 503, 74],
    "imagenet100": [452, 64, 374, 236, 993, 176, 882, 904, 503, 74],
    "imagenet1k": list(range(10)),
}
COUNTS = {"imagenet100": 100, "imagenet1k": 1000}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("imagenet")
    write_images(folder / "images", imagenet_wnids(), 1)
    weights = write_weights(folder)
    return [f"data.path={folder}/images", *weights, f"storage={folder}/runs", "selection.images_per_class=1"]


@pytest.mark.parametrize("name", LABELS)
def test_a_dry_run_shows_the_plan(name: str, overrides: list[str]):
    config = load_config(RunConfig, CONFIGS / f"{name}.yaml", overrides)
    plan = make_plan(config)
    assert list(plan.classes.generator_labels[:10]) == LABELS[name]
    assert len(plan.classes.names) == COUNTS.get(name, 10)
    finetune = next(stage for stage in plan.stages if stage.kind == "finetune")
    assert [len(group) for group in finetune.params["groups"]] == [min(20, len(plan.classes.names))] * max(
        1, len(plan.classes.names) // 20
    )
    text = describe(config)
    assert "fine-tune" in text
    assert "encode latents" in text
    tuning = config.finetune
    assert (tuning.epochs, tuning.batch_size, tuning.lr, tuning.objectives.inversion_matching.weight) == (8, 8, 1e-3, 0.002)
    assert (config.sampling.steps, config.sampling.cfg_scale, config.sampling.cfg_channels) == (50, 4.0, 3)
