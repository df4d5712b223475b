"""Weights travel by reference: every node finds its own file, and it has to be the plan's."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from ims3_ray import UserError
from ims3_ray.engine.weights import Weights
from ims3_ray.models import generator
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.generator import generator_path, load_generator
from tests.imagenet import write_weights


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The hub's caches of two nodes that hold the same pipeline in different places; the first one's is in use."""
    found = [tmp_path / "driver", tmp_path / "worker"]
    for cache in found:
        cache.mkdir()
        write_weights(cache)
    use_cache(monkeypatch, found[0])
    return found


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(generator, "fetch", lambda reference, patterns, what: cache / "dit")


def test_another_node_fetches_hub_weights_for_itself(caches: list[Path], monkeypatch: pytest.MonkeyPatch):
    weights = pickle.loads(pickle.dumps(Weights.of(generator_path, "facebook/DiT-XL-2-256")))
    assert weights.path().is_relative_to(caches[0])
    use_cache(monkeypatch, caches[1])
    assert weights.path().is_relative_to(caches[1])
    assert load_generator(weights.path()).config.num_classes == 1000


def test_other_weights_under_the_same_name_are_refused(caches: list[Path], monkeypatch: pytest.MonkeyPatch):
    weights = Weights.of(generator_path, "facebook/DiT-XL-2-256")
    file = generator_path(str(caches[1] / "dit"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    use_cache(monkeypatch, caches[1])
    with pytest.raises(UserError, match="'facebook/DiT-XL-2-256' are not the same on every node"):
        weights.path()


def test_a_path_is_the_same_from_every_working_directory(caches: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(caches[0])
    weights = Weights.of(generator_path, "dit")
    monkeypatch.chdir(caches[1])
    assert weights.path().is_relative_to(caches[0])


def test_shipped_weights_are_named_not_placed():
    assert Weights.of(generator_path, "embedded:fashion-mnist-dit").reference == "embedded:fashion-mnist-dit"


def test_the_same_weights_are_the_same_bytes():
    """A training that has ended writes its weights again: other bytes would have another hash, by which all that was made with
    the weights is found."""
    network = torch.nn.Linear(3, 5)
    files = {pack(network, {"a": 1}, "dit", torch.float16, classes="x\ny", about="z") for _ in range(12)}
    assert len(files) == 1
    (file,) = files
    assert int.from_bytes(file[:8], "little") % 8 == 0
    torch.testing.assert_close(load(file), {name: value.half() for name, value in network.state_dict().items()})
