"""An autoencoder in training, and a generator that is trained on its latents, without Ray."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch.distributions import Normal, kl_divergence

from ims3_ray import UserError
from ims3_ray.commands.convert import ConvertConfig, convert
from ims3_ray.commands.pretrain import open_pretraining
from ims3_ray.commands.push import PushConfig, upload_of
from ims3_ray.config import PretrainConfig, RunConfig, canonical, merge
from ims3_ray.config.pretrain import AutoencoderTraining, GeneratorTraining
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.transforms import to_signed, to_uint8
from ims3_ray.models.autoencoder import (
    OWN_AUTOENCODER,
    Autoencoder,
    autoencoder_path,
    empty_autoencoder,
    load_autoencoder,
)  # fmt: skip
from ims3_ray.models.checkpoints import read_metadata
from ims3_ray.models.dit import DiT
from ims3_ray.models.dit_files import write_dit
from ims3_ray.models.generator import load_generator
from ims3_ray.plan import make_plan
from ims3_ray.pretraining.expected import with_expected_weights
from ims3_ray.pretraining.plan import described
from ims3_ray.pretraining.quality import Splits, judge_generator, splits_of
from ims3_ray.pretraining.targets import TARGETS
from ims3_ray.training.autoencoder import AutoencoderTrainer, divergence, latents_of, pixels_of
from ims3_ray.training.generator import PREVIEW_IMAGES, GeneratorTrainer
from ims3_ray.training.pace import BySteps
from tests.conftest import CLASSES, tiny_values

SMALL: dict[str, Any] = {"widths": [8, 16], "latent_channels": 2, "epochs": 2, "batch_size": 8}


def images(count: int = 24, flip: bool = False) -> CleanImages:
    """Bright squares on dark ground."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    for image, place in zip(pixels, torch.randint(5, (count, 2), generator=rng).tolist(), strict=True):
        image[:, place[0] : place[0] + 3, place[1] : place[1] + 3] = 255
    return CleanImages.of_pixels(pixels, torch.arange(count) % 2, flip)


def trainer(**settings: Any) -> AutoencoderTrainer:
    return AutoencoderTrainer(AutoencoderTraining.model_validate({**SMALL, **settings}), images(), seed=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("autoencoder") / "mine.safetensors"
    training = trainer(epochs=60, lr=5e-3)
    list(training.epochs())
    assert sum(training.losses[-3:]) < 0.5 * sum(training.losses[:3])
    file.write_bytes(training.weights())
    return file


def test_the_divergence_is_that_of_the_distributions():
    mean, log_variance = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    wanted = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(divergence(mean, log_variance), wanted)


def test_the_loss_is_the_error_of_the_pixels_and_the_weighted_divergence():
    """With no divergence and latents without noise, it is the mean absolute error of the reconstructions."""
    plain, weighted = trainer(kl=0.0), trainer(kl=2.0)
    index = torch.arange(8)
    mean, log_variance = plain.autoencoder.moments(to_signed(images().tensors["pixels"][:8]))
    assert (weighted.loss(index) - plain.loss(index)).item() == pytest.approx(
        2 * divergence(mean, log_variance).item(), rel=1e-4
    )
    with torch.no_grad():
        quant = plain.autoencoder.vae.quant_conv
        quant.weight[2:] = 0
        quant.bias[2:] = -30  # the log-variances of both channels
        x = to_signed(images().tensors["pixels"][:8])
        found = plain.autoencoder.decode(plain.autoencoder.moments(x)[0])
    assert plain.loss(index).item() == pytest.approx((found - x).abs().mean().item(), rel=1e-4)


def test_the_file_is_an_autoencoder_whose_latents_have_a_variance_of_one(trained: Path):
    from diffusers import AutoencoderKL

    assert autoencoder_path(str(trained)) == trained
    ours, x = load_autoencoder(trained), to_signed(images().tensors["pixels"])
    mean, log_variance = ours.moments(x)
    assert (mean.square() + log_variance.exp()).mean().item() == pytest.approx(1.0, rel=0.02)
    assert ours.version == {"scale": ours.scale}
    assert (ours.factor, ours.latent_channels, empty_autoencoder(trained).scale) == (2, 2, ours.scale)
    assert (to_uint8(ours.decode(mean)).float() - images().tensors["pixels"].float()).abs().mean() < 40
    theirs = AutoencoderKL.from_config(dict(ours.vae.config))
    theirs.load_state_dict(ours.vae.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(mean), theirs.eval().decode(mean / ours.scale).sample)


def test_a_folder_or_repository_holds_it_under_its_own_name(tmp_path: Path, trained: Path):
    shutil.copy(trained, tmp_path / OWN_AUTOENCODER)
    assert autoencoder_path(str(tmp_path)) == tmp_path / OWN_AUTOENCODER
    found = upload_of(PushConfig(source=str(trained), to="me/vae"))
    assert list(found.files) == [OWN_AUTOENCODER]
    assert "ims3 distill autoencoder=me/vae" in found.readme


def test_a_training_that_has_ended_keeps_the_scale_that_it_measured():
    """On another machine the last digits would differ, and the file would have another hash."""
    ended, other, longer = trainer(), trainer(), trainer(epochs=3)
    list(ended.epochs())
    state = ended.state()
    assert state["scale"] == ended.scale()
    other.restore({**state, "scale": 3.0})
    assert other.scale() == 3.0
    longer.restore({**state, "scale": 3.0})
    list(longer.epochs())
    assert longer.scale() != 3.0


def test_a_converted_generator_still_names_its_autoencoder(tiny_world: Path, tmp_path: Path):
    source, out = tmp_path / "of-latents.safetensors", tmp_path / "converted.safetensors"
    network = load_generator(tiny_world / "dit.safetensors")
    assert isinstance(network, DiT)
    write_dit(network, CLASSES, source, autoencoder="0123456789abcdef")
    convert(ConvertConfig(generator=str(source), out=str(out)))
    assert read_metadata(out)["autoencoder"] == "0123456789abcdef"


def test_a_plan_is_made_before_the_autoencoder_and_its_generator_exist(tiny_world: Path, tmp_path: Path):
    small = {"patch_size": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}
    vae, dit = tmp_path / "vae" / "vae.safetensors", tmp_path / "dit" / "dit.safetensors"
    first = config(tiny_world, tmp_path, name="vae", target="autoencoder", autoencoding=SMALL)
    second = config(tiny_world, tmp_path, name="dit", autoencoder=str(vae), generator=small)
    for file, begun in ((vae, first), (dit, second)):
        file.parent.mkdir()
        (file.parent / "config.yaml").write_text(yaml.safe_dump(canonical(begun)))
    plain = tiny_values(tiny_world, tmp_path / "runs", generator=str(dit), autoencoder=str(vae))
    run = RunConfig.model_validate(merge(plain, {"sampling": {"clip": False}}))
    with with_expected_weights(run) as expected:
        stages = {stage.name for stage in make_plan(expected.config).stages}
        assert {str(vae), str(dit)} == set(expected.files)
    assert {"latents", "generate"} <= stages


def test_another_kind_of_weights_is_no_autoencoder(tiny_world: Path):
    with pytest.raises(UserError, match="hold a 'dit' where a 'autoencoder' is needed"):
        autoencoder_path(str(tiny_world / "dit.safetensors"))


def test_a_training_that_was_interrupted_goes_on_as_if_it_was_not():
    whole, half, other = trainer(), trainer(), trainer()
    list(whole.epochs())
    for _ in itertools.islice(half.epochs(), 1):
        pass
    other.restore(half.state())
    list(other.epochs())
    assert other.losses == whole.losses
    assert other.weights() == whole.weights()


def test_latents_are_the_moments_of_the_images_and_of_their_mirrored_images(trained: Path):
    model, pixels = load_autoencoder(trained), images(120).tensors["pixels"]
    found = latents_of(model, images(120, flip=True), torch.device("cpu"))
    assert found.tensors["mean"].shape == (120, 2, 2, 4, 4)
    for flip, x in enumerate((pixels, pixels.flip(-1))):
        for name, wanted in zip(("mean", "log_variance"), model.moments(to_signed(x)), strict=True):
            torch.testing.assert_close(found.tensors[name][:, flip].float(), wanted, rtol=2e-3, atol=2e-3)
    assert torch.equal(found.labels, images(120).labels)
    z = found.tensors["mean"][:3, 0].float()
    assert torch.equal(pixels_of(model, z), to_uint8(model.decode(z)))


def test_latents_that_half_precision_cannot_hold_are_refused(trained: Path):
    model = load_autoencoder(trained)
    model.scale = 1e9
    with pytest.raises(UserError, match="not finite in half precision"):
        latents_of(model, images(), torch.device("cpu"))


def test_a_generator_is_trained_on_latents_and_shows_pixels(trained: Path):
    model = load_autoencoder(trained)
    config = GeneratorTraining.model_validate(
        {"hidden_size": 32, "depth": 1, "num_heads": 2, "batch_size": 8, "precision": "fp32", "flip": True, "lr": 5e-3}
    )
    latents = latents_of(model, images(flip=True), torch.device("cpu"))
    training = GeneratorTrainer(config, latents, 2, seed=0, pixels=lambda z: pixels_of(model, z))
    assert (training.model.config.input_size, training.model.config.in_channels, training.model.config.patch_size) == (4, 2, 1)
    list(training.run(BySteps(60, 0.1, 0.3)))
    assert sum(training.losses[-10:]) < 0.9 * sum(training.losses[:10])
    sampling = PretrainConfig().quality.sampling.model_copy(update={"steps": 2, "clip": False})
    shown = training.preview(sampling)
    assert (shown.dtype, shown.shape) == (torch.uint8, (2 * PREVIEW_IMAGES, 1, 8, 8))


def config(world: Path, storage: Path, **values: Any) -> PretrainConfig:
    plain = {"name": "mine", "storage": str(storage), "data": {"path": str(world / "data"), "size": 8}, **values}
    return PretrainConfig.model_validate(plain)


def test_what_does_not_fit_is_one_line_before_anything_is_computed(tiny_world: Path, tmp_path: Path, trained: Path):
    def refused(match: str, **values: Any) -> None:
        with pytest.raises(UserError, match=match) as error:
            open_pretraining(config(tiny_world, tmp_path, **values))
        assert "\n" not in str(error.value)

    of_latents = {"autoencoder": str(trained), "quality": {"sampling": {"clip": False}}}
    refused(r"clamps pixels.*quality\.sampling\.clip=false", autoencoder=str(trained))
    refused(r"takes 1 channels but data\.channels=3; set data\.channels=1", **of_latents, data={
        "path": str(tiny_world / "data"), "size": 8, "channels": 3,
    })  # fmt: skip
    refused(r"does not divide data\.size=9; set data\.size=10", **of_latents, data={
        "path": str(tiny_world / "data"), "size": 9,
    })  # fmt: skip
    refused(r"weights 'nowhere' do not exist", autoencoder="nowhere")
    with pytest.raises(ValueError, match="is for target=generator, and target=encoder takes none"):
        config(tiny_world, tmp_path, target="encoder", autoencoder=str(trained))
    four = {"widths": [8, 8, 8, 8, 8]}
    refused(r"data\.size=8 cannot be halved 4 times.*set data\.size=16", target="autoencoder", autoencoding=four)
    target, hashes, _ = open_pretraining(config(tiny_world, tmp_path, **of_latents))
    assert set(hashes) == {"train", "test", "autoencoder"}
    assert "patches of 1 × 1 latents" in described(target)


@pytest.mark.parametrize("name", TARGETS)
def test_each_kind_of_weights_tells_its_training_and_makes_a_file_for_plans(name: str, tiny_world: Path, tmp_path: Path):
    target, _, _ = open_pretraining(config(tiny_world, tmp_path, target=name))
    text = described(target)
    assert f"train the {name}: 90 images of 3 classes" in text
    assert target.total[0] > 0
    file = tmp_path / "untrained.safetensors"
    file.write_bytes(target.untrained(["one", "two", "three"]))
    assert read_metadata(file)["kind"] in ("dit", "encoder", "autoencoder")


def test_an_autoencoder_is_judged_by_its_reconstructions(tiny_world: Path, tmp_path: Path, trained: Path):
    target, _, _ = open_pretraining(config(tiny_world, tmp_path, target="autoencoder", autoencoding=SMALL))
    pixels, labels = images().tensors["pixels"], images().labels
    quality = target.judge(trained, Splits((pixels, labels), (pixels, labels), ("a", "b")), "cpu")
    model = load_autoencoder(trained)
    with torch.no_grad():
        found = to_uint8(model.decode(model.moments(to_signed(pixels))[0])).double()
    wanted = 10 * torch.log10(255**2 / (found - pixels).square().mean())
    assert quality.figures["psnr"] == pytest.approx(wanted.item(), abs=1e-3)
    assert quality.samples is not None
    assert torch.equal(quality.samples[0], pixels[0])
    assert quality.samples.shape == (20, 1, 8, 8)


def test_widths_are_multiples_of_the_groups():
    with pytest.raises(ValueError, match="multiples of 8"):
        AutoencoderTraining.model_validate({"widths": [8, 12]})


def test_an_untrained_autoencoder_has_the_shape_of_the_config():
    plain = AutoencoderTraining.model_validate(SMALL)
    assert isinstance(trainer().autoencoder, Autoencoder)
    assert trainer().autoencoder.vae.config.block_out_channels == list(plain.widths)


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        ({"labels": "soft"}, "quality.judge has labels=soft"),
        ({"normalise": "real"}, "normalise=real"),
        ({"students": ["convnet-6"], "size": 8}, "convnet-6"),
        ({"augment": {"lighting": 0.1}}, r"quality\.judge\.augment\.lighting=0\.1 is for colour images"),
        ({"normalise": "imagenet"}, r"quality\.judge\.normalise=imagenet is for colour images"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_the_training(
    judge: dict[str, Any], says: str, tiny_world: Path, tmp_path: Path
):
    wanted = config(tiny_world, tmp_path, target="generator", quality={"judge": judge})
    with pytest.raises(UserError, match=says):
        open_pretraining(wanted)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target": "generator", "generator": {"label_dropout": 0}}, r"set quality\.sampling\.cfg_scale=1"),
        ({"target": "encoder", "encoder": {"augment": {"lighting": 0.1}}}, r"encoder\.augment\.lighting=0\.1 is for colour"),
        ({"target": "encoder", "encoder": {"batch_size": 1}}, r"encoder\.batch_size=1 is too small"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused_before_the_training(
    values: dict[str, Any], says: str, tiny_world: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=says):
        open_pretraining(config(tiny_world, tmp_path, **values))


def test_a_judge_is_not_steered_by_real_images(tiny_world: Path, tmp_path: Path):
    steered = {"sampling": {"sampler": "ddim", "inverted_gaussian": {"groups": 5}}}
    with pytest.raises(ValidationError, match="steers by real images, which no judge does"):
        config(tiny_world, tmp_path, target="generator", quality=steered)


@pytest.mark.parametrize("size", [8, 16])
def test_a_judge_sees_samples_at_its_own_size(size: int, tiny_world: Path, tmp_path: Path):
    sampling = {"steps": 2, "unit_size": 4}
    judge = {"students": ["convnet-2"], "width": 4, "epochs": 1, "size": size, "augment": {}}
    quality = {"judge": judge, "images_per_class": 4, "sampling": sampling}
    wanted = config(tiny_world, tmp_path, target="generator", quality=quality)
    open_pretraining(wanted)  # accepts the sizes of the judge
    found = judge_generator(wanted, tiny_world / "dit.safetensors", splits_of(wanted.data), "cpu")
    assert found.judged
    assert 0 <= found.figures["agreement"] <= 100
