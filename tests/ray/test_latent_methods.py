"""MGD3, D3HR and CaO2 with a generator of latents: modes, starts and refinement are in its space, images are decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.diffusion.steering.inverted_gaussian import Gaussian, draw_group, invert_to_start, start_index
from ims3_ray.diffusion.steering.modes import find_modes
from ims3_ray.engine.images import Decoder
from ims3_ray.engine.pool import produce
from ims3_ray.engine.sets import read_set
from ims3_ray.models.autoencoder import autoencoder_path, load_autoencoder
from ims3_ray.models.generator import load_generator
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.synthesis.cao2 import refine as refine_latents
from tests.conftest import write_latent_world
from tests.ray.conftest import prepare

pytestmark = pytest.mark.slow

K = 2
ARMS = {
    "mgd3": {"overrides": {"sampling": {"sampler": "ddpm", "mode_guidance": {"strength": 0.5}}}},
    "d3hr": {"overrides": {"sampling": {"inverted_gaussian": {"groups": 20}}}},
    "cao2": {"select": "confidence", "synthesise": "cao2", "overrides": {"synthesis": {"cao2": {"steps": 5, "lr": 0.05}}}},
}


def test_methods_work_on_latents(tiny_world: Path, tmp_path: Path, encoded: Path):
    write_latent_world(tmp_path)
    arms = {name: {"title": name, "images": "generated", **arm} for name, arm in ARMS.items()}
    context, stages = prepare(
        tiny_world, tmp_path, encoded, generator=str(tmp_path / "dit.safetensors"), autoencoder=str(tmp_path / "vae"),
        sampling={"clip": False, "steps": 5}, arms=arms, export="mgd3", selection={"images_per_class": K, "groups": 2},
        pool={"store": "latents"},
    )  # fmt: skip
    storage, schedule = context.storage, NoiseSchedule()
    train = stages["encode", "train"]
    produce(context, {train: [stages["inverted", ""], stages["latents", ""]]})
    stages["modes", ""].run(context)
    pools = {stage: [] for (kind, _), stage in stages.items() if kind == "generate"}
    for (kind, _), stage in stages.items():
        if kind == "embed" and stage.inputs["images"] in pools:
            pools[stage.inputs["images"]].append(stage)
    produce(context, pools)
    for name in arms:
        stages["select", name].run(context)
    stages["synthesise", "cao2"].run(context)

    model, vae = load_generator(tmp_path / "dit.safetensors"), load_autoencoder(autoencoder_path(str(tmp_path / "vae")))
    units = [unit for unit in train.units if unit.startswith("c0001")]
    pixels = torch.cat([load(train.artifact(storage).read(f"{unit}.safetensors"))["pixels"] for unit in units])
    with torch.no_grad():
        z0 = torch.cat([vae.moments(part)[0] for part in to_signed(pixels).split(8)])
        found = load(stages["modes", ""].artifact(storage).read("class-0001.safetensors"))["modes"]
        torch.testing.assert_close(found, find_modes(z0.half().float(), K, seed_for(0, "modes", 1)).centres, atol=2e-3, rtol=0)

        predict = guided(model, torch.ones(len(z0), dtype=torch.long), 3, 2.0)
        ends = invert_to_start(predict, z0, schedule, 5, 0.6).double()
        gaussian = Gaussian.of(ends.sum(dim=0), ends.square().sum(dim=0), len(ends))
        starts = draw_group(gaussian, K, 20, 0.1, generator_for(0, "starts", 1, 0))
        one = guided(model, torch.tensor([1]), 3, 2.0)
        rngs = [generator_for(0, "image", 1, index) for index in range(K)]
        drawn = sample(one, (2, 4, 4), rngs, schedule, 5, start=starts, first=start_index(5, 0.6))
        decode = Decoder(autoencoder_path(str(tmp_path / "vae")), "cpu", "fp32")
        d3hr = read_set(stages["select", "d3hr"].artifact(storage))[0].unflatten(0, (3, K))[1]
        assert (d3hr.int() - decode(drawn.half()).int()).abs().max() <= 1

    refined, chosen = (stages[kind, "cao2"].artifact(storage) for kind in ("synthesise", "select"))
    indices = load(chosen.read("class-0001.safetensors"))["indices"]
    store = stages["select", "cao2"].inputs["images"].store(storage)
    kept = load(store.artifact.read("c0001-u00000.safetensors"))["latents"].float()
    assert indices.max() < len(kept)
    predict = guided(model.requires_grad_(False), torch.ones(K, dtype=torch.long), 3, 1.0)
    rngs = [generator_for(0, "refine", 1, index) for index in indices.tolist()]
    how = {"steps": 5, "lr": 0.05, "timesteps": (1, 12), "of": 50, "peak_weight": 10.0}
    expected = decode(refine_latents(predict, kept[indices], schedule, rngs, **how))
    mine = load(refined.read("class-0001.safetensors"))["pixels"]
    assert (mine.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(mine, load(chosen.read("class-0001.safetensors"))["pixels"])
