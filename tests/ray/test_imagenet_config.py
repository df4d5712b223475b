"""configs/imagewoof.yaml from images to distilled set on real Ray, with stand-in weights in the formats it names.

Latents are cached once, fine-tuned on in both readings of the method, sampled and decoded.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from ims3_ray import RunConfig, distill
from ims3_ray.config.loading import load_config
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.engine.images import Decoder
from ims3_ray.engine.stage import Stage
from ims3_ray.io.storage import Storage
from ims3_ray.models.autoencoder import autoencoder_path, load_autoencoder
from ims3_ray.models.difffit import merge_adapter
from ims3_ray.models.generator import generator_path, load_generator
from ims3_ray.plan import make_plan
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters
from ims3_ray.stages.latents import read_latents
from tests.imagenet import places, write_images, write_weights

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"


def small(world: Path) -> list[str]:
    """Overrides that leave a config as shipped but for sizes, places and GPUs: IMS3 in both readings, one of two images a
    class."""
    return [
        *places(world), "name=woof", "finetune.trainer.gpus_per_worker=0", "actors.gpus=0", "evaluation.gpus_per_task=0",
        "selection.images_per_class=1", "selection.groups=2", "sampling.unit_size=2", "sampling.steps=2",
        "instability={images: 1, steps: 1, lanczos_steps: 1}", "evaluation.seeds=[0]",
        "evaluation.protocols.paper={students: [convnet-6], width: 2, epochs: 1, validations: 1}", "evaluation.val_per_class=1",
        "quality.stop_below=0", "arms.random_real=null", "arms.dit=null", "arms.dit_s3=null",
        "arms.ims3_released.overrides.finetune.objectives.diffusion.variance=true",
        "arms.ims3_released.overrides.finetune.steps=6", "arms.ims3_released.overrides.finetune.epochs=null",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def woof(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> RunConfig:
    """A finished run of the config in two steps of sampling."""
    world = tmp_path_factory.mktemp("imagewoof")
    write_images(world / "images", load_config(RunConfig, CONFIGS / "imagewoof.yaml").data.classes or (), 2)
    write_weights(world)
    files = [str(CONFIGS / "imagewoof.yaml"), str(CONFIGS / "methods" / "ims3-released.yaml")]
    config = load_config(RunConfig, files, small(world))
    distill(config)
    return config


def stages_of(config: RunConfig, released: bool = False) -> dict[str, Stage]:
    """By kind: those that both readings share, and the ones of either."""
    stages = [stage for stage in make_plan(config).stages if stage.label != "test"]
    own = [s for s in stages if s.name not in ("finetune", "generate") or released == ("released" in s.title)]
    return {stage.name: stage for stage in own}


def test_every_class_has_its_image_and_the_tuning_its_epochs(woof: RunConfig):
    storage = Storage.at(woof.storage)
    rows = Adapters.of(stages_of(woof)["finetune"], storage).losses(0)
    assert len(rows) == 20  # 8 epochs of 20 images in batches of 8
    folder = Path(storage.address(woof.name))
    assert sorted(path.name for path in (folder / "distilled" / "images").iterdir()) == sorted(woof.data.classes or ())
    assert json.loads((folder / "results.json").read_text())["sets"]["ims3"]["rows"]["paper/convnet-6"]["last"]["seeds"]


def test_latents_are_those_of_both_flips_of_every_image(woof: RunConfig):
    storage, latents = Storage.at(woof.storage), stages_of(woof)["latents"]
    images = latents.inputs["images"].artifact(storage)
    autoencoder = load_autoencoder(autoencoder_path(str(woof.autoencoder)))
    for unit in (latents.units[0], latents.units[-1]):
        found = read_latents(latents.artifact(storage), [unit])
        signed = to_signed(load(images.read(f"{unit}.safetensors"))["pixels"])
        for flip, x in enumerate((signed, signed.flip(-1))):
            with torch.no_grad():
                mean, log_variance = autoencoder.moments(x)
            assert found["mean"].dtype == torch.float16
            torch.testing.assert_close(found["mean"][:, flip].float(), mean, rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(found["log_variance"][:, flip].float(), log_variance, rtol=2e-3, atol=1e-3)


def test_candidates_are_decoded_samples_of_the_fine_tuned_model(woof: RunConfig):
    storage, generate = Storage.at(woof.storage), stages_of(woof)["generate"]
    model = load_generator(generator_path(woof.generator))
    merge_adapter(model, load(generate.inputs["finetune"].artifact(storage).read("adapter-0.safetensors")))
    decode = Decoder(autoencoder_path(str(woof.autoencoder)), "cpu", "bf16")
    predict = guided(model.to(torch.bfloat16), torch.tensor([193]), 1000, woof.sampling.cfg_scale, 3, variance=True)
    rng = generator_for(woof.seed, "image", 193, 1)
    with torch.no_grad():
        drawn = sample(predict, (4, 32, 32), [rng], NoiseSchedule(), 2, sampler="ddpm")
    expected = decode(drawn.half())[0]
    pixels = generate.store(storage).read("c0193-u00000")[1]
    off = np.abs(pixels.numpy().astype(int) - expected.numpy().astype(int))
    assert off.max() <= 1


def test_the_released_reading_tunes_on_the_same_latents(woof: RunConfig):
    storage, stages = Storage.at(woof.storage), stages_of(woof, released=True)
    assert stages["finetune"].inputs["latents"] is stages["latents"]
    rows = Adapters.of(stages["finetune"], storage).losses(0)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    weights = {
        "diffusion": 1, "variance": 1,
        "inversion_matching_released": 0.002, "representativeness": 0.002, "diversity": 0.008,
    }  # fmt: skip
    for row in rows:
        terms = {name.removeprefix("loss_"): value for name, value in row.items() if name.startswith("loss_")}
        assert terms.keys() == weights.keys()
        assert row["loss"] == pytest.approx(sum(weight * terms[name] for name, weight in weights.items()), rel=1e-3)
    assert rows[-1]["loss_representativeness"] > 0
