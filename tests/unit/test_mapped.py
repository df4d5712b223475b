"""Images of many shards as one tensor: in memory and mapped from the machine's cache, and what a student's process takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ims3_ray.config import EvaluationConfig
from ims3_ray.engine import mapped
from ims3_ray.engine.images import ImageStore
from ims3_ray.engine.planner import class_units
from ims3_ray.engine.sets import RealSplit, commit_set, held_out, read_set, write_class
from ims3_ray.engine.shards import commit_units, pack_tensors
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.node_cache import cache_folder
from ims3_ray.io.storage import Storage
from ims3_ray.models.student_costs import training_bytes
from ims3_ray.models.students import build_student
from ims3_ray.training.accuracy import resident
from ims3_ray.training.augmented import mean_and_std

COUNTS = (3, 1, 4)


@pytest.fixture(params=["in memory", "mapped"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """The folder of the machine's cache, if images are mapped from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "in memory":
        return None
    monkeypatch.setattr(mapped, "MAPPED_ABOVE", 10)
    return cache_folder()


def images(seed: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, count]).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))


def write_set(tmp_path: Path, key: str, classes: list[Tensor], **more: list[Tensor]) -> Artifact:
    artifact = Artifact(Storage.at(str(tmp_path)), "select", key)
    units = class_units(len(classes))
    entries = {
        unit: write_class(artifact, unit, pixels, **{name: values[i] for name, values in more.items()})
        for i, (unit, pixels) in enumerate(zip(units, classes, strict=True))
    }
    commit_set(artifact, entries, 0.0)
    return artifact


def forget(artifact: Artifact) -> None:
    """Delete the shards, so that only the cache has them."""
    for shard in artifact.shards():
        if not shard.startswith("class-0000"):  # the first is read to learn the images' shape
            artifact.forget(shard)


def test_a_set_is_read_at_any_size_with_its_labels_and_weights(tmp_path: Path, cache: Path | None):
    classes = [images(1, count) for count in COUNTS]
    weights = [torch.arange(count).float() for count in COUNTS]
    logits = [torch.full((count, 3), count).half() for count in COUNTS]
    artifact = write_set(tmp_path, "set", classes, weights=weights, logits=logits)
    for size in (None, 5):
        for attempt in range(2):
            found = read_set(artifact, size=size)
            assert torch.equal(found.pixels, torch.cat([resident(part, size or 8) for part in classes]))
            assert found.labels.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
            assert found.weights is not None
            assert found.logits is not None
            assert torch.equal(found.weights, torch.cat(weights))
            assert torch.equal(found.logits, torch.cat(logits))
            if cache is not None and attempt == 0 and size == 5:
                forget(artifact)
    assert cache is None or len([entry for entry in cache.iterdir() if entry.is_dir()]) == 2
    if cache is None:
        assert torch.equal(read_set(artifact, classes=2).pixels, torch.cat(classes[:2]))


def test_test_images_are_cropped_and_scaled_as_the_protocol_says(tmp_path: Path, cache: Path | None):
    artifact = Artifact(Storage.at(str(tmp_path)), "encode", "key")
    units = {"c0000-u00000": images(0, 2), "c0000-u00001": images(1, 1), "c0007-u00000": images(2, 4)}
    entries = {
        unit: {"images": len(pixels), "sha256": artifact.write(f"{unit}.safetensors", pack_tensors(pixels=pixels))}
        for unit, pixels in units.items()
    }
    commit_units(artifact, entries, 0.0)
    split = RealSplit(ImageStore(artifact, "pixels"), (("c0007-u00000",), ("c0000-u00000", "c0000-u00001")))
    pixels, labels = split.read(4, 0.75)
    assert labels.tolist() == [0] * 4 + [1] * 3
    whole = torch.cat([units["c0007-u00000"], units["c0000-u00000"], units["c0000-u00001"]])
    assert torch.equal(pixels, resident(whole, 4, 0.75))
    assert torch.equal(split.read()[0], whole)


def test_held_out_images_that_are_in_the_set_are_left_out(tmp_path: Path, cache: Path | None):
    train = [images(1, 2), images(2, 2)]
    val = [torch.cat([images(3, 2), train[0][1:]]), train[1][:1]]
    pixels, labels = held_out(write_set(tmp_path, "val", val), write_set(tmp_path, "train", train), 4, 1.0)
    assert torch.equal(pixels, resident(images(3, 2), 4))
    assert labels.tolist() == [0, 0]


def test_statistics_of_many_images_are_those_of_few(monkeypatch: pytest.MonkeyPatch):
    pixels = images(0, 5)
    few = mean_and_std(pixels)
    monkeypatch.setattr("ims3_ray.training.augmented.COUNTED_ABOVE", 10)
    many = mean_and_std(pixels)
    for one, other in zip(few, many, strict=True):
        assert other.item() == pytest.approx(one.item(), rel=1e-6)


def test_at_most_ten_thousand_images_are_held_out_unless_the_config_says_so():
    assert [EvaluationConfig().held_out(classes) for classes in (2, 10, 200, 201, 1000, 21_841)] == [50, 50, 50, 49, 10, 1]
    assert EvaluationConfig(val_per_class=50).held_out(1000) == 50
    assert EvaluationConfig(val_per_class=0).held_out(1000) == 0


@pytest.mark.parametrize(("name", "norm"), [("convnet-3", "instance"), ("resnetap-10", "batch")])
def test_the_memory_of_a_training_step_is_that_of_a_real_one(name: str, norm: str):
    weights, kept = training_bytes(name, 3, 32, 10, norm, 16)  # type: ignore[arg-type]
    network = build_student(name, 3, 32, 10, norm, 16)  # type: ignore[arg-type]
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(torch.zeros(8, 3, 32, 32))
    of_weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    real = sum(size for place, size in storages.items() if place not in of_weights) / 8
    assert output.shape == (8, 10)
    assert weights == sum(weight.numel() * 4 for weight in network.parameters())
    assert 0.9 * real <= kept <= 1.6 * real, "layers may keep two views of one tensor"
