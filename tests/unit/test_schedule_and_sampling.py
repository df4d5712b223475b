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
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from ims3_ray.diffusion.prediction import guided, predict_z0
from ims3_ray.diffusion.samplers.base import Sampler, sample
from ims3_ray.diffusion.samplers.ddim import ddim_step
from ims3_ray.diffusion.schedule import NoiseSchedule, Spacing, spacing_version
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


@pytest.mark.parametrize("num_steps", [2, 8, 50, 1000])
def test_respaced_timesteps_are_those_of_diffusers(num_steps: int):
    assert SCHEDULE.respaced(num_steps).flip(0).tolist() == ddim(num_steps).timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "dit", "linspace"])
def test_a_single_step_begins_where_the_noise_is(spacing: Spacing):
    """Diffusers' leading spacing takes timestep 0, at which pure noise is taken for an image."""
    assert SCHEDULE.respaced(1, spacing).tolist() == [999]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps: int):
    with pytest.raises(ValueError, match="sampling steps"):
        SCHEDULE.respaced(num_steps)


@pytest.mark.parametrize("num_steps", [600, 300, 999, 150, 75])
def test_every_number_of_steps_begins_near_pure_noise(num_steps: int):
    """With steps of one whole-numbered size, as in diffusers, 600 of them would begin at timestep 599."""
    timesteps = SCHEDULE.respaced(num_steps)
    assert timesteps[0] == 0
    assert 999 - timesteps[-1] <= 1000 / num_steps
    assert set(timesteps.diff().tolist()) <= {1000 // num_steps, 1000 // num_steps + 1}
    assert spacing_version(num_steps, "leading") == ({} if num_steps == 999 else {"spacing": 2})


def test_timesteps_of_ddim_have_the_smallest_stride_that_gives_so_many():
    for num_steps in range(2, 1001):
        strides = [stride for stride in range(1, 1001) if len(range(0, 1000, stride)) == num_steps]
        if strides:
            assert SCHEDULE.respaced(num_steps).tolist() == list(range(0, 1000, strides[0]))
    assert SCHEDULE.respaced(15)[-1] == 938
    assert spacing_version(15, "leading") == spacing_version(1, "leading") == {"spacing": 3}
    assert all(spacing_version(steps, "leading") == {} for steps in (10, 20, 25, 50, 100, 250, 1000))


def test_timesteps_of_ddpm_are_rounded_as_in_dits_code():
    def added(num_steps: int) -> list[int]:
        at, found = 0.0, []
        for _ in range(num_steps):
            found.append(round(at))
            at += 999 / (num_steps - 1)
        return found

    differing = 0
    for num_steps in range(2, 1001):
        found = SCHEDULE.respaced(num_steps, "dit")
        assert found.tolist() == added(num_steps)
        other = not torch.equal(found, SCHEDULE.respaced(num_steps, "linspace"))
        assert spacing_version(num_steps, "dit") == ({"spacing": 2} if other else {})
        differing += other
    assert differing == 278
    assert SCHEDULE.respaced(21, "dit")[10] == 499
    assert SCHEDULE.respaced(21, "linspace")[10] == 500
    assert SCHEDULE.respaced(1, "dit").tolist() == [999]


def test_linspace_timesteps_are_those_of_diffusers():
    for num_steps in range(2, 1001):
        theirs = DDPMScheduler(beta_schedule="linear", timestep_spacing="linspace")
        theirs.set_timesteps(num_steps)
        assert SCHEDULE.respaced(num_steps, "linspace").flip(0).tolist() == theirs.timesteps.tolist()
    assert SCHEDULE.respaced(50, "linspace")[[0, 1, 2, 3, -2, -1]].tolist() == [0, 20, 41, 61, 979, 999]
    assert SCHEDULE.respaced(1, "linspace").tolist() == [999]


@pytest.mark.parametrize("clip", [False, True])
def test_every_ddim_step_of_a_trajectory_equals_diffusers(clip: bool):
    theirs = ddim(10, clip_sample=clip, clip_sample_range=1.0)
    ours = expected = 2 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    levels = [*SCHEDULE.alpha_bar[theirs.timesteps], torch.ones((), dtype=torch.float64)]
    for i, t in enumerate(theirs.timesteps):
        t_B = t.expand(2)
        eps = predictor(expected, t_B)
        expected = theirs.step(eps, int(t), expected, use_clipped_model_output=clip).prev_sample
        ours = ddim_step(ours, predictor(ours, t_B), levels[i], levels[i + 1], clip=clip)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def in_double(sampler: str, predict: Callable[..., torch.Tensor], num_steps: int, clip: bool) -> torch.Tensor:
    """A sampler on float64 noise of the generators 5 and 6, so that it can be compared to the last digits."""
    noises = generators(5, 6)

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in noises])

    return Sampler.registry[sampler]()(predict, draw(), draw, SCHEDULE, num_steps, clip)


def loop_of_diffusers(theirs: object, predict: Callable[..., torch.Tensor], **options: object) -> torch.Tensor:
    noises = generators(5, 6)
    z = torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in noises])
    for t in theirs.timesteps:
        z = theirs.step(predict(z, t.expand(2)), t, z, **options).prev_sample
    return z


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", [2, 8, 20])
def test_ddim_equals_the_loop_of_diffusers(num_steps: int, clip: bool):
    theirs = ddim(num_steps, clip_sample=clip, clip_sample_range=1.0)
    expected = loop_of_diffusers(theirs, predictor, use_clipped_model_output=clip)
    torch.testing.assert_close(in_double("ddim", predictor, num_steps, clip), expected, rtol=1e-9, atol=1e-9)


def with_variance(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    return torch.cat([predictor(z, t_B), torch.cos(z.double() + t_B.double().reshape(-1, 1, 1, 1))], dim=1)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("num_steps", [2, 7, 50])
@pytest.mark.parametrize(("predict", "variance"), [(predictor, "fixed_small"), (with_variance, "learned_range")])
def test_ddpm_equals_the_loop_of_diffusers(num_steps: int, clip: bool, predict: Callable[..., torch.Tensor], variance: str):
    theirs = DDPMScheduler(
        beta_schedule="linear", timestep_spacing="linspace", variance_type=variance, clip_sample=clip, clip_sample_range=1.0
    )
    theirs.alphas_cumprod = SCHEDULE.alpha_bar
    theirs.one = torch.ones((), dtype=torch.float64)
    theirs.set_timesteps(num_steps)
    noises = generators(5, 6)
    z = torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in noises])

    def their_noise(*_: object, **__: object) -> torch.Tensor:
        return torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in noises])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", their_noise)
        for t in theirs.timesteps:
            z = theirs.step(predict(z, t.expand(2)), int(t), z).prev_sample
    # diffusers clamps variances at 1e-20 and takes t = 0 for the last step alone, as here
    torch.testing.assert_close(in_double("ddpm", predict, num_steps, clip), z, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
def test_dpm_solver_equals_the_loop_of_diffusers(num_steps: int):
    theirs = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", timestep_spacing="linspace", final_sigmas_type="zero",
        solver_order=2, algorithm_type="dpmsolver++",
    )  # fmt: skip
    theirs.set_timesteps(num_steps)
    expected = loop_of_diffusers(theirs, predictor)  # its table of noise levels is in float32
    torch.testing.assert_close(in_double("dpm++2m", predictor, num_steps, False), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [2, 4, 20])
def test_pndm_equals_the_loop_of_diffusers_with_stable_diffusions_schedule(num_steps: int):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = PNDMScheduler(**settings, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    ours = NoiseSchedule(1000, 0.00085, 0.012, of_roots=True, offset=1, ends_clean=False)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-5, atol=0)
    assert ours.last_alpha_bar == pytest.approx(theirs.final_alpha_cumprod.item(), rel=1e-6)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = ours.alpha_bar, ours.alpha_bar[0]
    theirs.set_timesteps(num_steps)
    calls = []

    def predict(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        calls.append(int(t_B[0]))
        return predictor(z, t_B)

    z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = Sampler.registry["pndm"]()(predict, z, lambda: z, ours, num_steps, False)
    assert calls == theirs.timesteps.tolist()
    for t in theirs.timesteps:
        z = theirs.step(predictor(z, t.expand(2)), t, z).prev_sample
    torch.testing.assert_close(found, z, rtol=1e-9, atol=1e-9)


def gaussian(mean: float, std: float) -> Callable[..., torch.Tensor]:
    """The exact ε of data that are N(mean, std²) in every value."""

    def predict(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        alpha_bar = SCHEDULE.alpha_bar[t_B].reshape(-1, 1, 1, 1)
        return (1 - alpha_bar).sqrt() * (z - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar)

    return predict


def test_dpm_solver_comes_nearer_to_the_exact_flow_than_ddim_with_as_many_calls():
    start = in_double("ddim", lambda z, t: z * 0, 1, False) * SCHEDULE.alpha_bar[999].sqrt()
    exact = 0.3 + 0.5 * (start - SCHEDULE.alpha_bar[999].sqrt() * 0.3)
    errors = {}
    for sampler in ("ddim", "dpm++2m"):
        for steps in (10, 20):
            errors[sampler, steps] = (in_double(sampler, gaussian(0.3, 0.5), steps, False) - exact).abs().mean().item()
    assert errors["dpm++2m", 20] < 0.5 * errors["ddim", 20]
    assert errors["dpm++2m", 20] < 0.3 * errors["dpm++2m", 10]  # second order: a quarter


def test_ancestral_samples_have_the_moments_of_the_data():
    drawn = sample(gaussian(0.3, 0.5), (4, 8, 8), generators(*range(64)), SCHEDULE, 1000, sampler="ddpm")
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("sampler", Sampler.registry)
def test_a_clipped_sample_lies_in_the_pixel_range(sampler: str):
    wild = sample(lambda z, t: -3 * z, SHAPE, generators(1, 2), SCHEDULE, 5, sampler=sampler, clip=True)
    assert wild.dtype == torch.float32
    assert wild.abs().max() == 1


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
    actual = guided(recorder(batches), y, null=5, cfg_scale=4.0, cfg_channels=channels)(z, t)
    for b, (label, time) in enumerate([(0, 7), (3, 9)]):
        conditional, unconditional = 2 * z[b] + 10 * label + time, 2 * z[b] + 50 + time
        torch.testing.assert_close(actual[b], unconditional + 4 * (conditional - unconditional))
    assert batches == [4]


def test_guidance_on_three_channels_leaves_the_fourth_conditional():
    z, y, t = torch.randn(2, 4, 2, 2), torch.tensor([0, 3]), torch.tensor([7, 9])
    actual = guided(recorder([]), y, null=5, cfg_scale=4.0, cfg_channels=3)(z, t)
    everywhere = guided(recorder([]), y, null=5, cfg_scale=4.0)(z, t)
    assert torch.equal(actual[:, :3], everywhere[:, :3])
    torch.testing.assert_close(actual[:, 3], 2 * z[:, 3] + (10 * y + t)[:, None, None])
    assert not torch.allclose(actual[:, 3], everywhere[:, 3])


def test_scale_one_runs_the_conditional_half_alone():
    z, y, t = torch.randn(2, 4, 2, 2), torch.tensor([0, 3]), torch.tensor([7, 9])
    batches: list[int] = []
    actual = guided(recorder(batches), y, null=5, cfg_scale=1.0, cfg_channels=3)(z, t)
    torch.testing.assert_close(actual, 2 * z + (10 * y + t)[:, None, None, None])
    assert batches == [2]


def test_what_is_predicted_beside_the_noise_is_kept_where_it_is_asked_for():
    z, y, t = torch.randn(2, 4, 2, 2), torch.tensor([0, 3]), torch.tensor([7, 9])
    for scale in (1.0, 4.0):
        alone = guided(recorder([]), y, null=5, cfg_scale=scale, cfg_channels=3)(z, t)
        both = guided(recorder([]), y, null=5, cfg_scale=scale, cfg_channels=3, variance=True)(z, t)
        assert torch.equal(both[:, :4], alone)
        assert (both[:, 4:] == 1e6).all()


def test_outside_its_interval_guidance_is_off_and_costs_nothing():
    z, y = torch.randn(2, 4, 2, 2), torch.tensor([0, 3])
    batches: list[int] = []
    predict = guided(recorder(batches), y, null=5, cfg_scale=4.0, cfg_interval=(0.2, 0.5))
    for t in (150, 200, 400, 499, 600):
        actual = predict(z, torch.tensor([t]))
        scale = 4.0 if 0.2 <= t / 999 <= 0.5 else 1.0
        expected = guided(recorder([]), y, null=5, cfg_scale=scale)(z, torch.tensor([t, t]))
        assert torch.equal(actual, expected)
    assert batches == [2, 4, 4, 4, 2]


@pytest.mark.parametrize("sampler", Sampler.registry)
def test_a_sample_does_not_depend_on_the_others_in_its_batch(sampler: str):
    alone = sample(predictor, SHAPE, generators(7), SCHEDULE, 10, sampler=sampler)
    first = sample(predictor, SHAPE, generators(7, 8, 9), SCHEDULE, 10, sampler=sampler)
    last = sample(predictor, SHAPE, generators(1, 2, 7), SCHEDULE, 10, sampler=sampler)
    torch.testing.assert_close(first[:1], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last[2:], alone, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(first[1], first[0], atol=1e-2)


def test_the_same_batch_gives_the_same_bits():
    first, second = (sample(predictor, SHAPE, generators(7, 8), SCHEDULE, 10, sampler="ddpm") for _ in range(2))
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
