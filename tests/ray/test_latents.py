"""A generator of latents on real Ray: latents cached once, fine-tuned on, sampled, decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from ims3_ray import RunConfig, distill
from ims3_ray.artifacts import Storage
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.diffusion.sampling import guided, sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.autoencoder import autoencoder_path, load_autoencoder
from ims3_ray.models.difffit import merge_adapter
from ims3_ray.models.generator import load_generator
from ims3_ray.plan import make_plan
from ims3_ray.seeds import generator_for
from ims3_ray.stages.derived import read_latents
from tests.conftest import CLASSES, tiny_values, write_latent_world


@pytest.fixture(scope="module")
def latent_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> RunConfig:
    """A finished run of IMS3 alone."""
    world = tmp_path_factory.mktemp("latent")
    write_latent_world(world)
    config = RunConfig.model_validate(
        tiny_values(
            tiny_world, world / "runs", generator=str(world / "dit.safetensors"), autoencoder=str(world),
            sampling={"clip": False, "cfg_channels": 1}, finetune={"flip": True},
            arms={"ims3": {"title": "IMS3", "images": "generated", "finetune": True, "select": "s3"}},
        )
    )  # fmt: skip
    distill(config)
    return config


def test_latents_are_those_of_both_flips_of_every_image(latent_run: RunConfig):
    storage = Storage.at(latent_run.storage)
    latents = {stage.kind: stage for stage in make_plan(latent_run).stages}["latents"]
    images = latents.inputs["images"].artifact(storage)
    autoencoder = load_autoencoder(autoencoder_path(str(latent_run.autoencoder)))
    for unit in (latents.units[0], latents.units[-1]):
        found = read_latents(latents.artifact(storage), [unit])
        signed = to_signed(load(images.read(f"{unit}.safetensors"))["pixels"])
        for flip, x in enumerate((signed, signed.flip(-1))):
            with torch.no_grad():
                mean, log_variance = autoencoder.moments(x)
            assert found["mean"].dtype == torch.float16
            torch.testing.assert_close(found["mean"][:, flip].float(), mean, rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(found["log_variance"][:, flip].float(), log_variance, rtol=2e-3, atol=1e-3)


def test_candidates_are_decoded_samples_of_the_fine_tuned_model(latent_run: RunConfig):
    storage = Storage.at(latent_run.storage)
    generate = {stage.kind: stage for stage in make_plan(latent_run).stages}["generate"]
    model = load_generator(Path(latent_run.generator))
    merge_adapter(model, load(generate.inputs["finetune"].artifact(storage).read("adapter-0.safetensors")))
    autoencoder = load_autoencoder(autoencoder_path(str(latent_run.autoencoder)))
    predict = guided(model, torch.tensor([1]), len(CLASSES), latent_run.sampling.cfg_scale, 1)
    rng = generator_for(latent_run.seed, "image", 1, 2)
    with torch.no_grad():
        expected = autoencoder.decode(sample(predict, (2, 4, 4), [rng], NoiseSchedule(), 3))[0]
    pixels = load(generate.artifact(storage).read("c0001-u00000.safetensors"))["pixels"][2]
    off = np.abs(pixels.numpy().astype(int) - to_uint8(expected).numpy().astype(int))
    assert off.max() <= 1
