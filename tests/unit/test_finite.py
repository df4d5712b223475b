"""Values that are not finite numbers are refused where they arise, by name: in weights, samples, shards, moments and JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ims3_ray import UserError
from ims3_ray.config import RunConfig, canonical
from ims3_ray.data.transforms import to_uint8
from ims3_ray.engine.shards import pack_tensors
from ims3_ray.errors import Diverged
from ims3_ray.io.storage import Storage
from ims3_ray.models.checkpoints import check_finite, pack
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.plan import make_plan
from ims3_ray.training.divergence import check_losses
from tests.conftest import tiny_values

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "tensor"), [("generator", "blocks.0.attn.qkv.weight"), ("encoder", "network.fc.bias")]
)  # fmt: skip
def test_weights_with_a_value_that_is_not_finite_are_refused_before_anything_is_computed(
    name: str, tensor: str, tiny_world: Path, tmp_path: Path
):  # fmt: skip
    original = tiny_world / {"generator": "dit.safetensors", "encoder": "phi.safetensors"}[name]
    with safe_open(original, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(original)
    tensors[tensor].flatten()[-1] = INF
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path, metadata)
    wrong = rf"broken\.safetensors' hold values that are not finite \('{tensor}'\)"
    with pytest.raises(UserError, match=wrong):
        make_plan(RunConfig.model_validate(tiny_values(tiny_world, tmp_path, **{name: str(path)})))
    torch.save(tensors, path.with_suffix(".pt"))
    with pytest.raises(UserError, match=rf"broken\.pt' hold values that are not finite \('{tensor}'\)"):
        check_finite(path.with_suffix(".pt"))


def test_trained_weights_that_are_not_finite_in_half_precision_are_not_written():
    shape = EncoderConfig(model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8] * 4}, channels=1,
                          num_classes=2, mean=0.0, std=1.0)  # fmt: skip
    encoder = Encoder(shape)
    with torch.no_grad():
        encoder.network.fc.bias[0] = 70_000  # finite in float32, infinite in float16
    pack(encoder, canonical(shape), "encoder")
    with pytest.raises(Diverged, match=r"the trained encoder has values that are not finite \('network.fc.bias'\)"):
        pack(encoder, canonical(shape), "encoder", torch.float16)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_samples_and_shards_that_are_not_finite_are_refused(value: float):
    with pytest.raises(ValueError, match="images have values that are not finite"):
        to_uint8(torch.tensor([0.0, value]))
    with pytest.raises(ValueError, match="the log probability to be stored have values"):
        pack_tensors(features=torch.zeros(2), log_probability=torch.tensor([value]))


@pytest.mark.parametrize("value", [NAN, INF])
def test_results_are_json(value: float, tmp_path: Path):
    storage = Storage.at(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot write .*results\.json: it would hold a value that is not a finite number"):
        storage.write_json("run/results.json", {"sets": {"a": value}})
    assert not storage.exists("run/results.json")


def test_the_first_loss_that_is_not_finite_is_named():
    check_losses([1.0, 0.5], 11, "generator.lr")
    check_losses([], 11, "generator.lr")
    with pytest.raises(Diverged, match=r"the loss of step 12 is not finite; lower generator\.lr"):
        check_losses([1.0, NAN, INF], 11, "generator.lr")
