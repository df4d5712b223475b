"""MGD3's mode guidance, D3HR's inverted starts, CaO2's refinement: each formula against a computation of its own."""

from __future__ import annotations

import math

import pytest
import torch

from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.samplers.ddim import Ddim
from ims3_ray.diffusion.samplers.ddpm import Ddpm
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.diffusion.steering.inverted_gaussian import Gaussian, draw_group, invert_to_start, start_index
from ims3_ray.diffusion.steering.mode_guidance import toward_modes
from ims3_ray.diffusion.steering.modes import find_modes
from ims3_ray.diffusion.steering.prototypes import Prototypes
from ims3_ray.synthesis.cao2 import refine, refinement_loss

SCHEDULE = NoiseSchedule()
HOW = {"steps": 1, "lr": 0.1, "timesteps": (1, 12), "of": 50, "peak_weight": 0.0}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_gaussian_data(mean: float, std: float):
    """The exact noise predictor of independent normal data."""

    def predict(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        alpha_bar = SCHEDULE.alpha_bar[t_B].reshape(-1, 1, 1, 1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        return ((z - alpha_bar.sqrt() * mean) * (1 - alpha_bar).sqrt() / variance).to(z.dtype)

    return predict


def test_modes_are_the_means_of_clusters_the_largest_first():
    centres = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]])
    sizes = (10, 40, 20)
    latents = torch.cat([c + 0.1 * torch.randn(n, 4, generator=rng(n)) for c, n in zip(centres, sizes, strict=True)])
    found = find_modes(latents.reshape(-1, 1, 2, 2), 3, seed=0)
    modes, counts = found.centres, found.counts
    expected = torch.stack([part.mean(dim=0) for part in latents.split(sizes)])[[1, 2, 0]].reshape(3, 1, 2, 2)
    torch.testing.assert_close(modes, expected)
    assert counts.tolist() == [40, 20, 10]
    assert (find_modes(latents.reshape(-1, 1, 2, 2), 3, seed=0).centres == modes).all()
    with pytest.raises(ValueError, match="3 modes are to be found of 2 images"):
        find_modes(torch.zeros(2, 1, 2, 2), 3, seed=0)


def test_one_guided_step_is_the_formula_of_mgd3():
    """x_{t−1} = μ_θ + σ_t·[−λ(ẑ_0 − m)] + σ_t·ε, for the first of two steps."""
    predict, strength = of_gaussian_data(0.3, 0.5), 0.1
    z = torch.randn(2, 1, 2, 2, generator=rng(1), dtype=torch.float64)
    mode, noise = torch.full_like(z, 0.7), torch.randn(z.shape, generator=rng(2), dtype=torch.float64)
    timesteps = [0, 999]
    now, before = (SCHEDULE.alpha_bar[t].item() for t in (999, 0))
    beta = 1 - now / before
    eps = predict(z, torch.tensor([999]))
    z0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
    mu = (math.sqrt(before) * beta * z0 + math.sqrt(1 - beta) * (1 - before) * z) / (1 - now)
    sigma = math.sqrt(beta * (1 - before) / (1 - now))
    x = mu + sigma * (-strength * (z0 - mode)) + sigma * noise
    last = predict(x, torch.tensor([timesteps[0]]))
    expected = (x - math.sqrt(1 - before) * last) / math.sqrt(before)
    drift = toward_modes(mode, strength, 0.25)
    found = Ddpm()(predict, z, lambda: noise, SCHEDULE, 2, False, drift=drift)
    torch.testing.assert_close(found, expected)


def test_guidance_draws_samples_nearer_to_their_modes_and_none_changes_nothing():
    predict, modes = of_gaussian_data(0.0, 0.5), torch.linspace(-1, 1, 8).reshape(8, 1, 1, 1).expand(8, 1, 2, 2)

    def sampled(strength: float, until: float) -> torch.Tensor:
        generators = [rng(seed) for seed in range(8)]
        drift = toward_modes(modes, strength, until)
        return sample(predict, (1, 2, 2), generators, SCHEDULE, 50, sampler="ddpm", drift=drift)

    plain = sample(predict, (1, 2, 2), [rng(seed) for seed in range(8)], SCHEDULE, 50, sampler="ddpm")
    assert torch.equal(sampled(0.0, 0.5), plain)
    assert torch.equal(sampled(1.0, 1.0), plain)
    distances = [(sampled(strength, 0.2) - modes).norm().item() for strength in (0.0, 0.2, 0.5)]
    assert distances[0] > distances[1] > distances[2]


def test_sums_give_mean_and_deviation():
    latents = torch.randn(50, 2, 3, 3, generator=rng(), dtype=torch.float64) * 3 + 1
    gaussian = Gaussian.of(latents.sum(dim=0), latents.square().sum(dim=0), 50)
    torch.testing.assert_close(gaussian.mean, latents.mean(dim=0))
    torch.testing.assert_close(gaussian.std, latents.std(dim=0, correction=0))


def test_the_group_is_the_one_with_the_best_moments_of_all_that_are_drawn():
    gaussian = Gaussian(torch.tensor([[[1.0, -2.0]]]).double(), torch.tensor([[[0.5, 3.0]]]).double())
    k, groups, weight = 4, 200, 0.1
    unit = torch.randn(groups, k, 1, 1, 2, generator=rng(7))
    best, lowest = None, math.inf
    for one in unit.double():
        starts = gaussian.mean + gaussian.std * one
        mean, std = starts.mean(dim=0), starts.std(dim=0)
        skew = ((starts - mean) ** 3).mean(dim=0) / starts.std(dim=0, correction=0) ** 3
        cost = (mean - gaussian.mean).norm() + (std - gaussian.std).norm() + weight * skew.norm()
        if cost < lowest:
            best, lowest = starts, cost
    torch.testing.assert_close(draw_group(gaussian, k, groups, weight, rng(7)), best.float())


def test_one_start_alone_has_no_moments_but_its_mean():
    found = draw_group(Gaussian(torch.zeros(1, 2, 2).double(), torch.ones(1, 2, 2).double()), 1, 500, 0.1, rng())
    assert found.shape == (1, 1, 2, 2)
    assert found.norm() < 0.7  # of 500 draws the one nearest to the mean


def test_inverted_images_come_back_when_sampled_from_where_they_were_taken():
    predict = of_gaussian_data(0.2, 0.4)
    z0 = 0.2 + 0.4 * torch.randn(6, 1, 3, 3, generator=rng(), dtype=torch.float64)
    start = invert_to_start(predict, z0, SCHEDULE, 500, 0.6)
    back = Ddim()(predict, start, lambda: start, SCHEDULE, 500, False, first=start_index(500, 0.6))
    torch.testing.assert_close(back, z0, atol=0.02, rtol=0)
    assert (start - z0).abs().mean() > 0.1


def test_a_start_lies_between_the_first_and_the_last_step():
    assert [start_index(50, share) for share in (0.01, 0.6, 1.0)] == [1, 30, 49]


def test_the_loss_of_refinement_is_the_mean_square_and_the_largest_error():
    eps, predicted = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[0.0, 4.0]]], [[[3.0, 0.0]]]])
    torch.testing.assert_close(refinement_loss(eps, predicted, 10.0), torch.tensor([2.5 + 20, 4.5 + 30]))


def test_refinement_moves_latents_to_where_the_generator_expects_them():
    predict, how = of_gaussian_data(0.5, 0.05), {**HOW, "steps": 60, "lr": 0.01}
    z0 = torch.full((3, 1, 2, 2), -0.2)
    refined = refine(predict, z0, SCHEDULE, [rng(seed) for seed in range(3)], **how)
    assert (refined > z0).all()
    assert ((refined - 0.5).abs() < (z0 - 0.5).abs()).all()
    alone = refine(predict, z0[1:2], SCHEDULE, [rng(1)], **how)
    torch.testing.assert_close(alone, refined[1:2])


def test_one_step_of_refinement_is_one_of_adam_by_hand():
    how = {**HOW, "timesteps": (3, 4), "peak_weight": 10.0}
    scale = 0.5

    def predict(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        assert t_B.tolist() == [61]  # the fourth of 0, 20, 41, 61 …
        return scale * z

    z0 = torch.tensor([[[[0.4, -0.3]]]])
    noise = torch.randn(1, 1, 2, generator=rng(4))
    alpha_bar = SCHEDULE.alpha_bar[61].float()
    error = noise - scale * (alpha_bar.sqrt() * z0[0] + (1 - alpha_bar).sqrt() * noise)
    gradient = -scale * alpha_bar.sqrt() * error  # of the mean of two squares
    largest = error.abs().argmax()
    gradient.flatten()[largest] -= 10 * scale * alpha_bar.sqrt() * error.flatten()[largest].sign()
    expected = z0[0] - 0.1 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(refine(predict, z0, SCHEDULE, [rng(4)], **how)[0], expected)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_that_starts_at_a_prototype_is_noised_and_denoised_from_there(sampler: str):
    """D4M: of ten steps at a strength of 0.7, seven are taken, from the timestep to which the centre is noised."""
    modes = torch.stack([torch.full((1, 2, 2), value) for value in (-0.5, 0.8)])
    steering = Prototypes(Prototypes.Config(strength=0.7), 2, 0, 10, lambda label: [{"modes": modes}], "cpu")
    options = steering.options(3, [0, 1, 2])
    assert options["strength"] == 0.7
    assert torch.equal(options["around"], modes[[0, 1, 0]])
    seen: list[int] = []
    starts: list[torch.Tensor] = []

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(int(t))
        starts.append(z)
        return torch.zeros_like(z)

    sample(predict, (1, 2, 2), [rng(seed) for seed in range(3)], SCHEDULE, 10, sampler=sampler, **options)
    timesteps = SCHEDULE.respaced(10, "leading" if sampler == "ddim" else "dit")
    assert seen == timesteps[:7].flip(0).tolist()
    noise = torch.stack([torch.randn(1, 2, 2, generator=rng(seed)) for seed in range(3)])
    share = SCHEDULE.alpha_bar[seen[0]].float()
    torch.testing.assert_close(starts[0], share.sqrt() * modes[[0, 1, 0]] + (1 - share).sqrt() * noise)
