"""Noise schedule and guided sampling (Eq. 1, 2 and 4) against diffusers' schedulers and plain numpy."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ims3_ray.diffusion.sampling import ddim_step, guided, predict_z0, sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.seeds import generator_for, seed_for

SCHEDULE = NoiseSchedule()
SHAPE = (4, 3, 3)


def predictor(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """A smooth, nonlinear ε(z, t) in float64 that mixes neighbouring pixels."""
    t = t_B.double().reshape(-1, 1, 1, 1) / 1000
    z = z.double()
    return torch.tanh(1.3 * z + 0.4 * z.roll(1, dims=-1)) * (0.5 + t) + 0.2 * torch.sin(3 * z) - 0.1 * t


def ddim(num_steps: int, **options: object) -> DDIMScheduler:
    theirs = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="leading", steps_offset=0,
        set_alpha_to_one=True, **options,
    )  # fmt: skip
    theirs.alphas_cumprod = SCHEDULE.alpha_bar  # theirs to float32; compared with ours in a test of its own
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(num_steps)
    return theirs


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_alpha_bar_is_that_of_diffusers(scheduler: type):
    theirs = scheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    assert SCHEDULE.alpha_bar.dtype == torch.float64
    torch.testing.assert_close(SCHEDULE.alpha_bar.float(), theirs, rtol=2e-5, atol=0)


def test_alpha_bar_and_sigma_are_running_products():
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert SCHEDULE.alpha_bar[t].item() == pytest.approx(product, rel=1e-11)
        assert SCHEDULE.sigma[t].item() == pytest.approx(((1 - product) / product) ** 0.5, rel=1e-9)


def test_add_noise_is_eq4_per_sample():
    generator = torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0, 417, 999])
    actual = SCHEDULE.add_noise(z0, noise, t)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for b, step in enumerate([0, 417, 999]):
        expected = np.sqrt(alpha_bar[step]) * z0[b].numpy() + np.sqrt(1 - alpha_bar[step]) * noise[b].numpy()
        np.testing.assert_allclose(actual[b].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_add_noise_keeps_the_dtype_of_its_input():
    z0 = torch.ones(2, *SHAPE)
    assert SCHEDULE.add_noise(z0, z0, torch.tensor([1, 2])).dtype == torch.float32


def test_predict_z0_is_eq2_and_undoes_eq4():
    generator = torch.Generator().manual_seed(1)
    z0, noise = (torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    for t in (0, 250, 999):
        z_t = SCHEDULE.add_noise(z0, noise, torch.tensor([t]))
        a = SCHEDULE.alpha_bar[t].item()
        actual = predict_z0(z_t, noise, SCHEDULE.alpha_bar[t])
        np.testing.assert_allclose(actual.numpy(), (z_t.numpy() - np.sqrt(1 - a) * noise.numpy()) / np.sqrt(a), rtol=1e-11)
        torch.testing.assert_close(actual, z0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
def test_respaced_timesteps_are_those_of_diffusers(num_steps: int):
    assert SCHEDULE.respaced(num_steps).flip(0).tolist() == ddim(num_steps).timesteps.tolist()


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps: int):
    with pytest.raises(ValueError, match="sampling steps"):
        SCHEDULE.respaced(num_steps)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_ddim_step_of_a_trajectory_equals_diffusers(eta: float, clip: bool):
    theirs = ddim(10, clip_sample=clip, clip_sample_range=1.0)
    generator = torch.Generator().manual_seed(2)
    ours = expected = 2 * torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    levels = [*SCHEDULE.alpha_bar[theirs.timesteps], torch.ones((), dtype=torch.float64)]
    for i, t in enumerate(theirs.timesteps):
        noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        t_B = t.expand(2)
        expected = theirs.step(
            predictor(expected, t_B), int(t), expected, eta=eta, use_clipped_model_output=clip, variance_noise=noise
        ).prev_sample
        ours = ddim_step(ours, predictor(ours, t_B), levels[i], levels[i + 1], eta=eta, clip=clip, noise=noise)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 7, 20])
def test_sample_equals_the_loop_of_diffusers(num_steps: int, eta: float, clip: bool):
    actual = sample(predictor, SHAPE, generators(5, 6), SCHEDULE, num_steps, eta=eta, clip=clip)
    theirs, noises = ddim(num_steps, clip_sample=clip, clip_sample_range=1.0), generators(5, 6)
    z = torch.stack([torch.randn(SHAPE, generator=g) for g in noises])
    for t in theirs.timesteps:
        noise = torch.stack([torch.randn(SHAPE, generator=g) for g in noises])
        z = theirs.step(
            predictor(z, t.expand(2)), int(t), z, eta=eta, use_clipped_model_output=clip, variance_noise=noise
        ).prev_sample
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, z.float(), rtol=1e-5, atol=1e-5)


def test_a_clipped_sample_lies_in_the_pixel_range():
    wild = sample(lambda z, t: -3 * z, SHAPE, generators(1, 2), SCHEDULE, 5, clip=True)
    assert wild.abs().max() == 1


def test_eta_without_noise_is_refused():
    z, a = torch.zeros(1, *SHAPE), SCHEDULE.alpha_bar
    with pytest.raises(ValueError, match="needs noise"):
        ddim_step(z, z, a[500], a[400], eta=1.0)


def recorder(batches: list[int]) -> Callable[..., torch.Tensor]:
    """A model whose ε depends on z, t and y in a way a hand can compute; it also predicts a variance and notes its batches."""

    def model(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        batches.append(len(z))
        shift = (y * 10 + t).to(z).reshape(-1, 1, 1, 1)
        return torch.cat([z * 2 + shift, torch.full_like(z, 1e6)], dim=1)

    return model


@pytest.mark.parametrize("channels", [None, 4])
def test_guidance_is_the_extrapolation_from_the_null_label(channels: int | None):
    z, y, t = torch.randn(2, 4, 2, 2), torch.tensor([0, 3]), torch.tensor([7, 9])
    batches: list[int] = []
    actual = guided(recorder(batches), y, null_label=5, cfg_scale=4.0, cfg_channels=channels)(z, t)
    for b, (label, time) in enumerate([(0, 7), (3, 9)]):
        conditional, unconditional = 2 * z[b] + 10 * label + time, 2 * z[b] + 50 + time
        torch.testing.assert_close(actual[b], unconditional + 4 * (conditional - unconditional))
    assert batches == [4]


def test_guidance_on_three_channels_leaves_the_fourth_conditional():
    z, y, t = torch.randn(2, 4, 2, 2), torch.tensor([0, 3]), torch.tensor([7, 9])
    actual = guided(recorder([]), y, null_label=5, cfg_scale=4.0, cfg_channels=3)(z, t)
    everywhere = guided(recorder([]), y, null_label=5, cfg_scale=4.0)(z, t)
    assert torch.equal(actual[:, :3], everywhere[:, :3])
    torch.testing.assert_close(actual[:, 3], 2 * z[:, 3] + (10 * y + t)[:, None, None])
    assert not torch.allclose(actual[:, 3], everywhere[:, 3])


def test_scale_one_runs_the_conditional_half_alone():
    z, y, t = torch.randn(2, 4, 2, 2), torch.tensor([0, 3]), torch.tensor([7, 9])
    batches: list[int] = []
    actual = guided(recorder(batches), y, null_label=5, cfg_scale=1.0, cfg_channels=3)(z, t)
    torch.testing.assert_close(actual, 2 * z + (10 * y + t)[:, None, None, None])
    assert batches == [2]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_does_not_depend_on_the_others_in_its_batch(eta: float):
    alone = sample(predictor, SHAPE, generators(7), SCHEDULE, 10, eta=eta)
    first = sample(predictor, SHAPE, generators(7, 8, 9), SCHEDULE, 10, eta=eta)
    last = sample(predictor, SHAPE, generators(1, 2, 7), SCHEDULE, 10, eta=eta)
    torch.testing.assert_close(first[:1], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last[2:], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(first[1], first[0], atol=1e-2)


def test_the_same_batch_gives_the_same_bits():
    first, second = (sample(predictor, SHAPE, generators(7, 8), SCHEDULE, 10, eta=1.0) for _ in range(2))
    assert torch.equal(first, second)


def test_seeds_differ_by_run_purpose_and_address():
    addresses = itertools.product(range(4), range(5))
    seeds = [seed_for(run, what, *at) for run, what, at in itertools.product((0, 1), ("image", "noise"), addresses)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(("one", "other"), [((), (0,)), ((3,), (3, 0))])
def test_seeds_differ_by_the_length_of_the_address(one: tuple[int, ...], other: tuple[int, ...]):
    assert seed_for(0, "image", *one) != seed_for(0, "image", *other)


def test_seeds_are_the_same_in_every_process():
    code = "from ims3_ray.seeds import seed_for; print(seed_for(1, 'image', 2, 3))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    elsewhere = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(elsewhere.stdout) == seed_for(1, "image", 2, 3)


def test_a_generator_draws_from_its_seed():
    expected = torch.randn(4, generator=torch.Generator().manual_seed(seed_for(1, "image", 2, 3)))
    assert torch.equal(torch.randn(4, generator=generator_for(1, "image", 2, 3)), expected)
