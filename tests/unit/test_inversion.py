"""DDIM inversion (Eq. 3) against plain numpy, diffusers' inverse scheduler and an ODE with a known solution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule()
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def clean(seed: int, batch: int) -> torch.Tensor:
    return torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predictor(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    time = (t_B.double() / 1000).reshape(-1, 1, 1, 1)
    return torch.tanh(1.3 * z) * (0.5 + time) + 0.2 * torch.sin(3 * z)


def numpy_predictor(z: np.ndarray, t: int) -> np.ndarray:
    return np.tanh(1.3 * z) * (0.5 + t / 1000) + 0.2 * np.sin(3 * z)


def numpy_inversion(z0: np.ndarray, t: int, n_steps: int) -> np.ndarray:
    """Eq. 3 for one sample: z/√ᾱ moves by Δσ times the noise that the latent of the step before is predicted to hold."""
    z, alpha_bar, time = z0, 1.0, 0
    for step in range(1, n_steps + 1):
        following = math.floor(t * step / n_steps)
        ahead = ALPHA_BAR[following]
        increment = math.sqrt((1 - ahead) / ahead) - math.sqrt((1 - alpha_bar) / alpha_bar)
        z = math.sqrt(ahead) * (z / math.sqrt(alpha_bar) + increment * numpy_predictor(z, time))
        alpha_bar, time = ahead, following
    return z


@pytest.mark.parametrize("n_steps", [1, 2, 5, 13])
def test_inversion_is_eq3_at_each_samples_own_timestep(n_steps: int):
    times = [0, 1, 3, 250, 617, 999]
    z0 = clean(0, len(times))
    actual = invert(predictor, z0, torch.tensor(times), SCHEDULE, n_steps, 0)
    for b, t in enumerate(times):
        np.testing.assert_allclose(actual[b].numpy(), numpy_inversion(z0[b].numpy(), t, n_steps), rtol=1e-9, atol=1e-10)


def test_a_chain_of_steps_equals_the_inverse_scheduler_of_diffusers():
    theirs = DDIMInverseScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    theirs.alphas_cumprod = SCHEDULE.alpha_bar
    theirs.initial_alpha_cumprod = torch.ones((), dtype=torch.float64)
    z0 = clean(1, 2)
    # from the clean latent to t in one stride needs a stride of 1000 there: an earlier time below zero is ᾱ = 1
    theirs.set_timesteps(1)
    z = theirs.step(predictor(z0, torch.zeros(2)), 200, z0).prev_sample
    torch.testing.assert_close(invert(predictor, z0, torch.tensor([200, 200]), SCHEDULE, 1, 0), z, rtol=1e-10, atol=1e-10)
    theirs.set_timesteps(5)
    for t in (400, 600, 800):
        z = theirs.step(predictor(z, torch.full((2,), t - 200)), t, z).prev_sample
    torch.testing.assert_close(invert(predictor, z0, torch.tensor([800, 800]), SCHEDULE, 4, 0), z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_inversion_converges_to_the_exact_flow_of_gaussian_data(s: float):
    def optimal(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        a = SCHEDULE.alpha_bar[t_B].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * z / (a * s**2 + 1 - a)

    z0, t = s * clean(2, 1), 900
    sigma = math.sqrt((1 - ALPHA_BAR[t]) / ALPHA_BAR[t])
    exact = math.sqrt(ALPHA_BAR[t]) * z0 * math.sqrt(s**2 + sigma**2) / s
    errors = [
        ((invert(optimal, z0, torch.tensor([t]), SCHEDULE, n, 0) - exact).norm() / exact.norm()).item()
        for n in (90, 180, 450, 900)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(2.5, rel=0.25)
    assert errors[2] / errors[3] == pytest.approx(2, rel=0.25)
    assert errors[3] < 0.01


@pytest.mark.parametrize("n_steps", [1, 4])
def test_timestep_zero_still_takes_the_step_to_the_first_noise_level(n_steps: int):
    z0, a = clean(3, 1), ALPHA_BAR[0]
    expected = math.sqrt(a) * z0.numpy() + math.sqrt(1 - a) * numpy_predictor(z0.numpy(), 0)
    actual = invert(predictor, z0, torch.tensor([0]), SCHEDULE, n_steps, 0)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10)


def test_the_predictor_sees_the_time_of_the_latent_it_is_given():
    seen = []

    def watch(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(t_B.tolist())
        return predictor(z, t_B)

    invert(watch, clean(4, 2), torch.tensor([900, 10]), SCHEDULE, 3, 0)
    assert seen == [[0, 0], [300, 3], [600, 6]]


@pytest.mark.parametrize("grad_steps", [0, 1, 2, 4])
def test_only_the_last_steps_carry_a_gradient(grad_steps: int):
    enabled = []

    def watch(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        enabled.append(torch.is_grad_enabled())
        return predictor(z, t_B)

    invert(watch, clean(5, 1), torch.tensor([900]), SCHEDULE, 4, grad_steps)
    assert enabled == [False] * (4 - grad_steps) + [True] * grad_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_steps_do_not_change_the_value_or_the_dtype(dtype: torch.dtype):
    z0, t = clean(6, 2).to(dtype), torch.tensor([300, 900])
    detached, attached = (invert(lambda z, t_B: predictor(z, t_B).to(dtype), z0, t, SCHEDULE, 3, g) for g in (0, 3))
    assert torch.equal(detached, attached)
    assert attached.dtype == dtype


@pytest.mark.parametrize(("n_steps", "grad_steps"), [(0, 0), (-1, 0), (2, 3), (2, -1)])
def test_impossible_step_counts_are_refused(n_steps: int, grad_steps: int):
    with pytest.raises(ValueError, match="n_steps"):
        invert(predictor, clean(7, 1), torch.tensor([5]), SCHEDULE, n_steps, grad_steps)
