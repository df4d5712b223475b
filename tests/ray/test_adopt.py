"""Teaching the generator classes that it does not know, with real Ray: before any other stage uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from ims3_ray import distill
from ims3_ray.config import RunConfig
from ims3_ray.config.loading import load_config
from ims3_ray.config.run import DEFAULT_ARMS
from ims3_ray.data.classes import imagenet_wnids
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.models.generator import load_generator
from ims3_ray.plan import make_plan
from ims3_ray.stages.adapters import Adapters, GroupModels, Pretrained
from tests.conftest import CLASSES, tiny_values, write_tiny_weights
from tests.imagenet import places, write_images, write_weights

pytestmark = pytest.mark.slow

TABLE = "y_embedder.embedding_table.weight"
CONFIGS = Path(__file__).parents[2] / "configs"
UNUSED = ("random_real", "herding", "dit_s3", "ims3")
ADOPT = {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "trainer": {"num_workers": 2}}


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data and φ of the tiny world, and a generator that knows its first two classes only."""
    folder = tmp_path_factory.mktemp("two-classes")
    write_tiny_weights(folder, classes=CLASSES[:2])
    for name in ("data", "phi.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tiny_world / name)
    return folder


def config_of(world: Path, storage: Path, adopt: dict[str, Any] | None, **changes: Any) -> RunConfig:
    return RunConfig.model_validate({**tiny_values(world, storage, **changes), "adopt": adopt})


def test_a_generator_is_taught_a_class_and_the_run_goes_on_with_it(world: Path, tmp_path: Path, cluster: None):
    less = {"arms": {name: DEFAULT_ARMS[name] for name in ("dit", "ims3")}, "instability": {"images": 0}}
    config = config_of(world, tmp_path, ADOPT, **less)
    result = distill(config)
    plan, storage = make_plan(config), Storage.at(config.storage)
    (adopt,) = [stage for stage in plan.stages if stage.name == "adopt"]
    assert adopt.params["added"] == ["middle"]
    pools = [stage for stage in plan.stages if stage.name == "generate"]
    assert {stage.title for stage in pools} == {"generate (adopted)", "generate (fine-tuned)"}
    assert all(stage.inputs["adopt"] is adopt for stage in pools)
    known = load_generator(world / "dit.safetensors").state_dict()[TABLE]
    adapter = load(adopt.artifact(storage).read("adapter-0.safetensors"))
    assert adapter[TABLE].shape == (4, known.shape[1]), "two known classes, no class, and the new one"
    like = json.loads(Path(storage.address(adopt.artifact(storage).folder), "shards", "like.json").read_text())
    assert set(like) == {"middle"}
    start = known[CLASSES.index(like["middle"])]
    moved = (adapter[TABLE][3] - start).abs().max()
    assert 0 < moved < 4 * 1.1 * 1e-3 * 10, (
        "Adam moves a value by about the learning rate a step at most, ten times that of others"
    )

    pretrained = Pretrained.of(pools[0], storage)
    generator = pretrained.open()
    assert generator.labels(CLASSES) == [0, 1, 3]
    merged = pretrained.load(generator).state_dict()
    assert torch.equal(merged[TABLE], adapter[TABLE])
    (finetune,) = [stage for stage in plan.stages if stage.name == "finetune"]
    tuned = GroupModels(pretrained, Adapters.of(finetune, storage), "cpu").of_class(3).state_dict()
    assert not torch.equal(tuned[TABLE][3], merged[TABLE][3])
    assert (tuned[TABLE] - merged[TABLE]).abs().max() < 4 * 2e-3, "inversion matching starts from what was adopted"
    shard = Path(storage.address(adopt.artifact(storage).folder), "shards", "adapter-0.safetensors")
    with safe_open(shard, framework="pt") as file:
        about = json.loads(file.metadata()["adapter"])
    assert about["added"] == ["middle"]
    assert set(result.results["sets"]) == set(config.arms)


def test_a_new_class_starts_like_the_one_that_is_named_or_like_no_class(world: Path, tmp_path: Path):
    for like, row in (({"middle": "right"}, 1), ("null", 2)):
        config = config_of(world, tmp_path, {**ADOPT, "like": like})
        (adopt,) = [stage for stage in make_plan(config).stages if stage.name == "adopt"]
        pretrained = Pretrained(adopt.weights["generator"], ("middle",), like=like if isinstance(like, dict) else None)
        generator = pretrained.open()
        table = pretrained.load(generator).state_dict()[TABLE]
        assert torch.equal(table[3], table[row])


@pytest.mark.parametrize(
    ("adopt", "message"),
    [
        (None, "knows no class 'middle'; .* set adopt={}"),
        ({"like": {"middle": "rihgt"}}, "adopt.like.middle: the generator knows no class 'rihgt'; nearest: right"),
        ({"like": {"left": "right"}}, "adopt.like names 'left', which is no class that the generator has to learn: middle"),
    ],
)
def test_what_cannot_be_adopted_is_one_line(world: Path, tmp_path: Path, adopt: dict[str, Any] | None, message: str):
    with pytest.raises(UserError, match=message):
        make_plan(config_of(world, tmp_path, adopt))


def test_photographs_are_adopted_by_a_generator_of_latents(tmp_path: Path, cluster: None):
    write_images(tmp_path / "images", ["x1", "x2"], 4)
    write_weights(tmp_path)
    config = load_config(
        RunConfig,
        CONFIGS / "own-photos.yaml",
        [
            *places(tmp_path), "data.test_split=val", "adopt.steps=2", "adopt.epochs=null",
            "adopt.batch_size=2", "adopt.trainer.gpus_per_worker=0",
            "finetune.trainer.gpus_per_worker=0", "actors.gpus=0", "evaluation.gpus_per_task=0", "instability.images=0",
            "selection.images_per_class=1", "selection.groups=1", "sampling.unit_size=2", "sampling.steps=2", "export=dit",
            "evaluation.protocols.paper={students: [convnet-6], width: 2, epochs: 1, validations: 1}", "evaluation.seeds=[0]",
            "evaluation.val_per_class=1", "quality.stop_below=0", *(f"arms.{arm}=null" for arm in UNUSED),
        ],
    )  # fmt: skip
    result = distill(config)
    storage = Storage.at(config.storage)
    (adopt,) = [stage for stage in make_plan(config).stages if stage.name == "adopt"]
    assert "latents" in adopt.inputs
    like = adopt.artifact(storage).read_json("like.json")
    assert set(like) == {"x1", "x2"}
    assert len(set(like.values())) == 2
    assert set(like.values()) <= set(imagenet_wnids())
    adapter = load(adopt.artifact(storage).read("adapter-0.safetensors"))
    assert len(adapter[TABLE]) == 1003, "ImageNet's classes, no class, and two more"
    assert not any(name.endswith("attn.qkv.weight") for name in adapter), "DiffFit leaves the large tensors alone"
    assert len(list((Path(result.folder) / "distilled" / "images").rglob("*.png"))) == 2
