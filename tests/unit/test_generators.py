"""Generators as sampling and training see them: parametrisation, conditions, and a family from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ims3_ray.config import FinetuneConfig, GeneratorTraining
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.prediction import epsilon_of, guided, predict_z0, target_of
from ims3_ray.diffusion.samplers.base import Sampler, sample
from ims3_ray.diffusion.schedule import NoiseSchedule, per_sample
from ims3_ray.errors import UserError
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.dit_files import write_dit
from ims3_ray.models.generator import generator_path, open_generator
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.objectives.base import TrainingStep
from ims3_ray.objectives.diffusion import Diffusion, diffusion_loss, drop_conditions
from ims3_ray.objectives.inversion_matching import InversionMatching
from ims3_ray.seeds import generator_for
from ims3_ray.training.finetuning import Finetuner
from ims3_ray.training.generator import GeneratorTrainer
from ims3_ray.training.pace import BySteps

SCHEDULE = NoiseSchedule()
SHAPE = DiTConfig(input_size=8, in_channels=1, patch_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_velocity_noise_and_clean_latent_say_the_same():
    """v = √ᾱ·ε − √(1−ᾱ)·z_0, so ε = √ᾱ·v + √(1−ᾱ)·z_t and z_0 = √ᾱ·z_t − √(1−ᾱ)·v."""
    z0, noise, t = randn(5, 2, 3, 3), randn(5, 2, 3, 3, seed=1), torch.tensor([0, 10, 400, 800, 999])
    z_t, alpha_bar = SCHEDULE.add_noise(z0, noise, t), per_sample(SCHEDULE.alpha_bar[t], z0)
    v = target_of(z0, noise, t, SCHEDULE, "v")
    torch.testing.assert_close(v, alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z0)
    torch.testing.assert_close(epsilon_of(v, z_t, t, SCHEDULE, "v"), noise)
    torch.testing.assert_close(alpha_bar.sqrt() * z_t - (1 - alpha_bar).sqrt() * v, z0)
    assert target_of(z0, noise, t, SCHEDULE, "epsilon") is noise
    assert epsilon_of(v, z_t, t, SCHEDULE, "epsilon") is v


def as_velocity(epsilon: torch.nn.Module) -> torch.nn.Module:
    """A network that predicts v where ``epsilon`` predicts ε, and a variance beside it."""

    class Velocity(torch.nn.Module):
        def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            alpha_bar = per_sample(SCHEDULE.alpha_bar[t].repeat_interleave(len(z) // len(t)), z)
            eps = epsilon(z, t, y)
            v = (eps - (1 - alpha_bar).sqrt() * z) / alpha_bar.sqrt()
            return torch.cat([v, torch.full_like(v, 0.3)], dim=1)

    return Velocity()


class Linear(torch.nn.Module):
    """ε that depends on everything it is told."""

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        told = t / 1000 + y  # one for each equal part of the batch
        return 0.3 * z + per_sample(told.repeat_interleave(len(z) // len(told)), z)


@pytest.mark.parametrize("name", Sampler.registry)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_network_that_predicts_v_samples_as_its_twin_that_predicts_noise(name: str, scale: float):
    y = torch.tensor([1])
    mine = guided(as_velocity(Linear()), y, 0, scale, schedule=SCHEDULE, parametrisation="v")
    twin = guided(Linear(), y, 0, scale)
    drawn = [
        sample(predict, (1, 2, 2), [generator_for(0, "x", i) for i in range(3)], SCHEDULE, 7, sampler=name)
        for predict in (mine, twin)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    kept = guided(as_velocity(Linear()), y, 0, scale, variance=True, schedule=SCHEDULE, parametrisation="v")
    assert torch.equal(kept(torch.ones(3, 1, 2, 2), torch.tensor([5]))[:, 1:], torch.full((3, 1, 2, 2), 0.3))


def test_objectives_see_the_noise_of_a_network_that_predicts_v_and_l_diff_its_velocity():
    z0, noise, t, y = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1), torch.tensor([3, 200, 500, 900]), torch.tensor([0, 1, 1, 0])
    steps = [
        TrainingStep(network, SCHEDULE, z0, y, y, t, noise, parametrisation=kind)
        for network, kind in ((as_velocity(Linear()), "v"), (Linear(), "epsilon"))
    ]
    torch.testing.assert_close(steps[0].eps, steps[1].eps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(steps[0].z0_hat, steps[1].z0_hat, rtol=1e-3, atol=1e-3)
    matching = InversionMatching(InversionMatching.Config(weight=1.0, n_steps=3))
    mine, twin = (matching(step)["inversion_matching"] for step in steps)
    torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-6)
    found = Diffusion(Diffusion.Config())(steps[0])["diffusion"]
    expected = diffusion_loss(as_velocity(Linear())(steps[0].z_t, t, y)[:, :1], target_of(z0, noise, t, SCHEDULE, "v"))
    torch.testing.assert_close(found, expected)


def test_conditions_of_any_shape_are_dropped_whole():
    conditions, null = torch.arange(24.0).reshape(4, 3, 2), torch.full((1, 3, 2), -1.0)
    dropped = drop_conditions(conditions, null, 0.5, torch.Generator().manual_seed(0))
    whole = [torch.equal(one, other) or bool((one == -1).all()) for one, other in zip(dropped, conditions, strict=True)]
    assert all(whole)
    assert 0 < (dropped == -1).all(dim=(1, 2)).sum() < 4


def test_a_dit_that_is_trained_to_predict_v_says_so_in_its_file_and_is_fine_tuned_as_one(tmp_path: Path):
    values = {
        "patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "batch_size": 8, "precision": "fp32", "prediction": "v",
        "label_dropout": 0.0,
    }  # fmt: skip
    labels = torch.arange(24) % 2
    pixels = torch.zeros(24, 1, 8, 8, dtype=torch.uint8)
    pixels[labels == 1, :, :4] = 255
    trainer = GeneratorTrainer(GeneratorTraining.model_validate(values), CleanImages.of_pixels(pixels, labels), 2, seed=0)
    list(trainer.run(BySteps(2, 1, 1)))
    # A new network predicts 0: its loss is the mean square of v, which lies between those of ε and of the clean image, both 1.
    assert trainer.losses[0] == pytest.approx(1.0, abs=0.15)
    path = tmp_path / "v.safetensors"
    path.write_bytes(trainer.weights(["a", "b"]))
    generator = open_generator(path)
    assert generator.parametrisation == "v"
    tuning = FinetuneConfig.model_validate({"batch_size": 4, "trainer": {"num_workers": 1}})
    tuner = Finetuner(generator.load(), generator, tuning, "cpu")
    images = CleanImages({"pixels": pixels}, labels, False)
    row = tuner.step(tuner.draw(images, torch.arange(4), generator_for(0, "x")))
    assert row["loss_diffusion"] == pytest.approx(1.0, abs=0.3)


def test_a_predictor_of_one_label_serves_any_number_and_of_several_exactly_so_many():
    torch.manual_seed(0)
    network, generator = DiT(SHAPE), DiTGenerator.of_shape(SHAPE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    z = torch.randn(3, 1, 8, 8)
    one = generator.predictor(network, 1, 1, 2.0)(z, torch.tensor([7]))
    several = generator.predictor(network, 1, 3, 2.0)(z, torch.tensor([7]))
    torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-5)
    inverted = invert(generator.predictor(network, 1, 3), z, torch.tensor([5, 50, 500]), generator.schedule, 2, 0)
    assert torch.isfinite(predict_z0(inverted, torch.zeros_like(inverted), 0.5)).all()


def test_a_class_that_the_generator_does_not_know_is_named_with_the_nearest(tiny_world: Path):
    generator = open_generator(tiny_world / "dit.safetensors")
    with pytest.raises(UserError, match="knows no class 'lift'; nearest: left"):
        generator.labels(["lift"])


def test_a_dit_that_predicts_v_is_not_written_where_that_could_not_be_said(tmp_path: Path):
    network = DiT(SHAPE.model_copy(update={"prediction": "v"}))
    for name in ("dit.pt", "pipeline"):
        with pytest.raises(UserError, match="a DiT that predicts v has no form in which"):
            write_dit(network, ("a", "b"), tmp_path / name)
    write_dit(network, ("a", "b"), tmp_path / "dit.safetensors")
    assert open_generator(tmp_path / "dit.safetensors").parametrisation == "v"
    write_dit(DiT(SHAPE), ("a", "b"), tmp_path / "pipeline")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    scheduler = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    for prediction, parametrisation in (("epsilon", "epsilon"), ("v_prediction", "v")):
        scheduler.write_text(json.dumps({"prediction_type": prediction}))
        assert open_generator(generator_path(str(tmp_path / "pipeline"))).parametrisation == parametrisation


def test_velocity_in_half_precision_is_turned_to_noise_in_full(monkeypatch: pytest.MonkeyPatch):
    """At t = 999, √ᾱ is 0.006: in bfloat16 the clean latent would be lost."""
    z0, noise, t = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([999])
    z_t = SCHEDULE.add_noise(z0, noise, t.expand(2))
    v = target_of(z0, noise, t.expand(2), SCHEDULE, "v").bfloat16()
    predict = guided(lambda z, t, y: v, torch.tensor([0]), 1, 1.0, schedule=SCHEDULE, parametrisation="v")
    eps = predict(z_t, t)
    assert eps.dtype == torch.float32
    torch.testing.assert_close(predict_z0(z_t, eps, float(SCHEDULE.alpha_bar[999])), z0, atol=0.05, rtol=0.05)
