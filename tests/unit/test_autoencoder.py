"""The autoencoder against diffusers' own, and how it is found."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ims3_ray import UserError
from ims3_ray.config import RunConfig
from ims3_ray.data.clean_images import sample_latents
from ims3_ray.models.autoencoder import autoencoder_path, decoding_flops, empty_autoencoder, encoding_flops, load_autoencoder
from ims3_ray.plan import make_plan
from tests.conftest import tiny_values, write_latent_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    write_latent_world(folder)
    return folder


def test_moments_and_images_are_those_of_diffusers_times_the_scale(world: Path):
    from diffusers import AutoencoderKL

    ours, theirs = load_autoencoder(autoencoder_path(str(world / "vae"))), AutoencoderKL.from_pretrained(world / "vae")
    x, noise = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        mean, log_variance = ours.moments(x)
        posterior = theirs.encode(x).latent_dist
        z = sample_latents(mean, log_variance, noise)
        torch.testing.assert_close(z, (posterior.mean + posterior.std * noise) * 0.18215, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z / 0.18215).sample)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert (ours.factor, ours.image_channels, ours.latent_channels) == (2, 1, 2)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("{", "'config' in the metadata of .* is not readable JSON"),
        ("[1]", "must be a JSON object"),
        ('{"in_channels": "three"}', "has a config that cannot be used"),
    ],
)
def test_a_file_with_a_broken_config_is_refused_in_one_line(tmp_path: Path, metadata: str, says: str):
    path = tmp_path / "own.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata={"kind": "autoencoder", "config": metadata})
    with pytest.raises(UserError, match=says):
        empty_autoencoder(autoencoder_path(str(path)))


def test_latents_are_shifted_as_the_autoencoder_says(world: Path, tmp_path: Path):
    """Stable Diffusion 3's autoencoder has a ``shift_factor``: latents are (z − shift) · scale."""
    shutil.copytree(world / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, "shift_factor": 0.5, "scaling_factor": 2.0}))
    shifted, unshifted = (load_autoencoder(autoencoder_path(str(folder / "vae"))) for folder in (tmp_path, world))
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        mean, log_variance = shifted.moments(x)
        raw, raw_log_variance = unshifted.moments(x)
        torch.testing.assert_close(mean, (raw / 0.18215 - 0.5) * 2)
        torch.testing.assert_close(log_variance, raw_log_variance + 2 * math.log(2 / 0.18215))
        torch.testing.assert_close(shifted.decode(mean), unshifted.decode(raw))
    file.write_text(json.dumps({**plain, "latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}))
    with pytest.raises(UserError, match="normalises each channel"):
        load_autoencoder(autoencoder_path(str(tmp_path / "vae")))


def test_a_pipelines_folder_and_the_autoencoders_own_are_the_same(world: Path):
    assert autoencoder_path(str(world)) == autoencoder_path(str(world / "vae"))


def test_an_autoencoder_that_lacks_tensors_is_refused(world: Path, tmp_path: Path):
    shutil.copytree(world / "vae", tmp_path / "vae")
    path = autoencoder_path(str(tmp_path / "vae"))
    left = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("decoder.up_blocks")}
    save_file(left, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ tensors, among them decoder\.up_blocks"):
        load_autoencoder(path)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no diffusers AutoencoderKL"):
        autoencoder_path(str(tmp_path))


def test_flops_are_counted_without_weights(world: Path):
    shape = empty_autoencoder(autoencoder_path(str(world)))
    first_layer = 2 * 8 * 8 * 9 * 1 * 8
    assert encoding_flops(shape, 8) > first_layer
    assert decoding_flops(shape, 4) > encoding_flops(shape, 8)  # a decoder has one more block on each level


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"autoencoder": None}, "name their autoencoder"),
        ({"sampling": {"clip": True}}, "set sampling.clip=false"),
        ({"data": {"size": 16}}, r"makes 1×8×8 images; set data\.channels=1 and data\.size=8"),
        ({"generator": "pixels"}, "choose two that belong together"),
        ({"generator": "pixels", "pool": {"store": "latents"}, "autoencoder": None}, r"set pool\.store=png"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(world: Path, tiny_world: Path, tmp_path: Path, changes, says: str):
    if changes.get("generator") == "pixels":
        changes = {**changes, "generator": str(tiny_world / "dit.safetensors")}
    latent = {"generator": str(world / "dit.safetensors"), "autoencoder": str(world), "sampling": {"clip": False}}
    values = tiny_values(tiny_world, tmp_path, **latent)
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    with pytest.raises(UserError, match=says):
        make_plan(RunConfig.model_validate(values))


def test_other_weights_of_the_autoencoder_change_what_depends_on_them(world: Path, tiny_world: Path, tmp_path: Path):
    latent = {"generator": str(world / "dit.safetensors"), "autoencoder": str(world), "sampling": {"clip": False}}
    config = RunConfig.model_validate(tiny_values(tiny_world, tmp_path, **latent))

    def keys() -> dict[str, str]:
        return {stage.title: json.dumps(dict(stage.params), sort_keys=True) for stage in make_plan(config).stages}

    before = keys()
    write_latent_world(world, seed=1)
    after = keys()
    changed = {title for title in before if before[title] != after[title]}
    assert {"encode latents", "generate (pretrained)", "generate (fine-tuned)"} <= changed
    assert "encode train images" not in changed
