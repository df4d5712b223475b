"""`ims3 pretrain` and `ims3 pack`: from images to weights that a distillation takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ims3_ray import RunConfig, UserError
from ims3_ray.commands.pack import PackConfig, pack
from ims3_ray.commands.pretrain import pretrain
from ims3_ray.config import PretrainConfig, merge
from ims3_ray.data.sources import open_source
from ims3_ray.io.artifacts import file_hash
from ims3_ray.models.checkpoints import read_metadata
from ims3_ray.plan import make_plan
from ims3_ray.pretraining.autoencoder import AutoencoderTarget
from tests.conftest import CLASSES, draw, tiny_values

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


@pytest.mark.parametrize("target", ["generator", pytest.param("encoder", marks=pytest.mark.slow)])
def test_trained_weights_come_with_a_card_and_a_distillation_takes_them(
    target: str, tiny_world: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tiny_world)  # the workers have other working folders
    values = {**QUICK, "name": "mine", "target": target, "storage": str(tmp_path)}
    path = pretrain(PretrainConfig.model_validate({**values, "data": {"path": "data", "size": 8}}))
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


@pytest.mark.slow
def test_a_generator_of_latents_is_trained_with_an_autoencoder_that_was_trained_before(
    tiny_world: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """From images to an autoencoder, from its latents to a generator, from both to a distillation. The same command again
    leaves the same weights; with another autoencoder under the same name it is refused."""
    monkeypatch.chdir(tmp_path)  # paths of the config are relative
    values = {**QUICK, "storage": ".", "data": {"path": str(tiny_world / "data"), "size": 8}}
    small = {"widths": [8, 16], "latent_channels": 2, "epochs": 3, "batch_size": 16}
    vae = pretrain(PretrainConfig.model_validate({**values, "name": "vae", "target": "autoencoder", "autoencoding": small}))
    card = vae.with_suffix(".md").read_text()
    for text in ("The autoencoder trained by", "dB (peak signal-to-noise ratio)", "steps: 18 of 16 images", "epochs: 3"):
        assert text in card
    assert vae.with_suffix(".png").is_file()
    of_latents = merge(values, {
        "name": "dit", "autoencoder": "vae/vae.safetensors", "quality": {"sampling": {"clip": False}},
        "generator": {"patch_size": 1, "flip": True},
    })  # fmt: skip
    path = pretrain(PretrainConfig.model_validate(of_latents))
    for text in ("autoencoder: vae/vae.safetensors", f"- autoencoder: SHA-256 begins with {file_hash(vae)}"):
        assert text in path.with_suffix(".md").read_text()
    before = path.read_bytes()
    pretrain(PretrainConfig.model_validate(of_latents))
    assert path.read_bytes() == before
    run = tiny_values(tiny_world, tmp_path / "runs", generator=str(path), autoencoder=str(vae))
    plan = make_plan(RunConfig.model_validate(merge(run, {"sampling": {"clip": False}})))
    assert {"latents", "generate"} <= {stage.name for stage in plan.stages}
    run["autoencoder"] = None
    with pytest.raises(UserError, match=r"trained on the latents of an autoencoder, and autoencoder is unset"):
        make_plan(RunConfig.model_validate(run))
    run["autoencoder"] = str(vae)
    vae.write_bytes(AutoencoderTarget(PretrainConfig.model_validate({**values, "autoencoding": small}), 3, 90).untrained([]))
    with pytest.raises(UserError, match="was trained on the latents of another autoencoder"):
        make_plan(RunConfig.model_validate(merge(run, {"sampling": {"clip": False}})))
    with pytest.raises(UserError, match=r"another config \(data_fingerprints\.autoencoder"):
        pretrain(PretrainConfig.model_validate(of_latents))


def mine(world: Path, storage: Path, **changes: Any) -> PretrainConfig:
    """An encoder of two epochs on the tiny world."""
    values = {**QUICK, "name": "mine", "target": "encoder", "storage": str(storage), "data": {"path": str(world), "size": 8}}
    return PretrainConfig.model_validate(merge(values, changes))


def losses_of(folder: Path) -> int:
    """Number of steps that the last checkpoint of a training has."""
    (state,) = (folder / "train").glob("**/state.pt")
    return len(torch.load(state, weights_only=True)["losses"])


@pytest.mark.slow
def test_a_training_goes_on_with_its_own_data_alone(tiny_world: Path, tmp_path: Path, cluster: None):
    """A second training under the same name: the same one goes on, also for more epochs; any other is refused."""
    world = tmp_path / "world"
    shutil.copytree(tiny_world / "data", world)
    path = pretrain(mine(world, tmp_path))
    first, steps = load_file(path), losses_of(path.parent)
    longer = pretrain(mine(world, tmp_path, encoder={"epochs": 3}))
    assert losses_of(longer.parent) == steps * 3 // 2
    assert not all(torch.equal(value, first[name]) for name, value in load_file(longer).items())
    second = longer.read_bytes()

    with pytest.raises(UserError, match=r"36 steps, but encoder\.epochs asks for 24 steps; a training cannot be shortened"):
        pretrain(mine(world, tmp_path))
    with pytest.raises(UserError, match=r"another config \(encoder\.lr"):
        pretrain(mine(world, tmp_path, encoder={"epochs": 3, "lr": 0.5}))
    (world / "classes.txt").write_text("one\ntwo\nthree")
    with pytest.raises(UserError, match=r"another config \(data_fingerprints\.train"):
        pretrain(mine(world, tmp_path, encoder={"epochs": 3}))
    assert path.read_bytes() == second
    (path.parent / "config.yaml").write_text("{[")
    with pytest.raises(UserError, match=r"config\.yaml' is damaged"):
        pretrain(mine(world, tmp_path, encoder={"epochs": 3}))


@pytest.mark.slow
def test_a_training_takes_the_chosen_classes_and_leaves_out_broken_images(
    tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    """The classes have the same positions in both splits whatever else their folders hold, and a broken image is counted."""
    for split, labels in (("train", ("left", "middle", "right")), ("test", ("middle", "left", "right"))):
        for label in labels:
            for number in range(30):
                image = Image.fromarray(draw(CLASSES.index(label), np.random.default_rng([number, len(split)])))
                file = tmp_path / "data" / split / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
    (tmp_path / "data" / "train" / "right" / "0.png").write_bytes(b"no image")
    config = mine(tmp_path / "data", tmp_path, data={"classes": ["right", "left"]}, encoder={"epochs": 3, "lr": 0.02})
    path = pretrain(config)
    assert read_metadata(path, "encoder")["classes"].split("\n") == ["right", "left"]
    printed = capsys.readouterr().out
    assert "note: 1 images cannot be decoded and were left out: right/0.png" in printed
    assert "59 images; 1 images of both splits cannot be decoded" in path.with_suffix(".md").read_text()
    assert float(re.search(r"head: ([0-9.]+) %", printed)[1]) > 80  # type: ignore[index]


def test_a_training_that_diverges_is_one_line_and_leaves_no_weights(tiny_world: Path, tmp_path: Path, cluster: None):
    config = mine(tiny_world / "data", tmp_path, target="generator", generator={"lr": 1e30})
    with pytest.raises(UserError, match=r"diverged|values that are not finite") as refused:
        pretrain(config)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "mine").glob("*.safetensors"))


def test_pack_writes_parquet_that_opens_as_the_same_images(tiny_world: Path, tmp_path: Path):
    out = tmp_path / "packed.parquet"
    data = {"path": str(tiny_world / "data")}
    pack(PackConfig.model_validate({"data": data, "per_class": 4, "out": str(out)}))
    packed, original = open_source(str(out), "train"), open_source(data["path"], "train")
    assert packed.class_names == CLASSES
    assert np.bincount(packed.labels).tolist() == [4, 4, 4]
    there = {(int(label), np.asarray(original.image(i)).tobytes()) for i, label in enumerate(original.labels)}
    assert {(int(label), np.asarray(packed.image(i)).tobytes()) for i, label in enumerate(packed.labels)} <= there
