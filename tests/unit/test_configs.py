"""The shipped configs of ImageNet and its subsets: they load, plan on stand-in weights, and mean the published classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ims3_ray.config import RunConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.classes import imagenet_wnids
from ims3_ray.objectives.diffusion import Diffusion
from ims3_ray.objectives.inversion_matching_released import InversionMatchingReleased
from ims3_ray.objectives.minimax import Minimax
from ims3_ray.plan import Plan, make_plan
from ims3_ray.plan.estimate import describe
from ims3_ray.selection import SELECTORS
from ims3_ray.stages.generate import Generate
from tests.imagenet import places, write_images, write_weights

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
    write_weights(folder)
    return [*places(folder), "selection.images_per_class=1"]


def labels_of(plan: Plan[RunConfig]) -> tuple[int, ...]:
    """The generator's label of each class."""
    return next(stage.labels for stage in plan.stages if isinstance(stage, Generate))


@pytest.mark.parametrize("name", LABELS)
def test_a_dry_run_shows_the_plan(name: str, overrides: list[str]):
    config = load_config(RunConfig, CONFIGS / f"{name}.yaml", overrides)
    plan = make_plan(config)
    assert list(labels_of(plan)[:10]) == LABELS[name]
    assert len(plan.classes.names) == COUNTS.get(name, 10)
    finetune = next(stage for stage in plan.stages if stage.name == "finetune")
    assert [len(group) for group in finetune.params["groups"]] == [min(20, len(plan.classes.names))] * max(
        1, len(plan.classes.names) // 20
    )
    text = describe(plan)
    assert "fine-tune" in text
    assert "encode latents" in text
    tuning = config.finetune
    assert (tuning.epochs, tuning.batch_size, tuning.lr, tuning.objectives.inversion_matching.weight) == (8, 8, 1e-3, 0.002)
    (protocol,) = config.evaluation.protocols.values()
    assert protocol.students[-1] == "resnet-18"
    assert (protocol.size, protocol.epochs, protocol.decay, protocol.cutmix) == (224, 300, "cosine", True)
    s = config.sampling
    assert (s.sampler, s.steps, s.cfg_scale, s.cfg_channels, s.precision) == ("ddpm", 50, 4.0, 3, "bf16")


def test_all_other_selectors_stand_beside_the_default_arms():
    plan = make_plan(load_config(RunConfig, CONFIGS / "methods" / "selectors.yaml", []))
    selects = [stage for stage in plan.stages if stage.name == "select"]
    assert {stage.params["select"] for stage in selects} == set(SELECTORS) - {"all"}
    pools = [stage for stage in plan.stages if stage.name == "generate"]
    assert len(pools) == 2  # one of each generator, whatever is chosen from it
    assert all(stage.inputs["images"] in pools or stage.inputs["images"].name == "encode" for stage in selects)


def test_the_released_reading_of_imagewoof_is_planned_too(overrides: list[str]):
    config = load_config(RunConfig, CONFIGS / "imagewoof-released.yaml", overrides)
    plan = make_plan(config)
    assert list(labels_of(plan)) == LABELS["imagewoof"]
    (finetune,) = [stage for stage in plan.stages if stage.name == "finetune"]
    assert finetune.images == 8000 * 8
    assert list(config.arms) == ["ims3_released"]
    config = config.of_arm("ims3_released")
    objectives = config.finetune.objectives.made()
    assert [type(objective) for objective in objectives] == [Diffusion, InversionMatchingReleased, Minimax]
    weights = {name: weight for objective in objectives for name, weight in objective.weights.items()}
    assert weights == {
        "diffusion": 1.0, "variance": 1.0,
        "inversion_matching_released": 0.002, "representativeness": 0.002, "diversity": 0.008,
    }  # fmt: skip
    assert (config.selection.coupling, config.selection.beta) == ("released", 0.9)
