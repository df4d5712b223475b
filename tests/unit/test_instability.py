"""Eq. 12 against the singular values of the whole map's Jacobian, formed by brute force."""

from __future__ import annotations

import pytest
import torch

from ims3_ray.diffusion.instability import exact_log_volume, log_instability, log_volume
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.dit import DiT, DiTConfig

SCHEDULE = NoiseSchedule()


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    shape = DiTConfig(input_size=4, in_channels=2, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    model = DiT(shape).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.15)
    return model


def test_it_is_the_geometric_mean_of_the_singular_values_of_the_sampler(model: DiT):
    noise = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    predict = guided(model, torch.tensor([0, 2]), 3, 1.0)
    found = log_instability(predict, noise, SCHEDULE, 5, exact=True)
    for b, label in enumerate((0, 2)):
        alone = guided(model, torch.tensor([label]), 3, 1.0)

        def whole(x: torch.Tensor, alone=alone) -> torch.Tensor:  # the sampler itself, fed this noise
            z, steps = x.reshape(1, 2, 4, 4), SCHEDULE.respaced(5).tolist()
            for i in range(4, -1, -1):
                now, after = SCHEDULE.alpha_bar[steps[i]], SCHEDULE.alpha_bar[steps[i - 1]] if i else torch.tensor(1.0)
                eps = alone(z, torch.tensor([steps[i]]))
                z = after.sqrt() * (z - (1 - now).sqrt() * eps) / now.sqrt() + (1 - after).sqrt() * eps
            return z.flatten()

        singular = torch.linalg.svdvals(torch.autograd.functional.jacobian(whole, noise[b].flatten()))
        assert found[b] == pytest.approx(singular.log().mean().item(), rel=1e-9)
        rng = torch.Generator().manual_seed(7)
        drawn = sample(lambda z, t, alone=alone: alone(z.double(), t), (2, 4, 4), [rng], SCHEDULE, 5)
        start = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(7)).double()
        torch.testing.assert_close(whole(start.flatten()).reshape(1, 2, 4, 4).float(), drawn, rtol=1e-4, atol=1e-4)


def test_the_estimate_meets_the_exact_value(model: DiT):
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = log_instability(guided(model, torch.tensor([0, 1, 2]), 3, 1.0), noise, SCHEDULE, 4, exact=True)
    often = torch.tensor([0, 1, 2]).repeat_interleave(60)  # many directions at once
    estimate = log_instability(
        guided(model, often, 3, 1.0), noise[often], SCHEDULE, 4, exact=False, lanczos_steps=10,
        generator=torch.Generator().manual_seed(3),
    ).reshape(3, 60)  # fmt: skip
    error = estimate.std(dim=1) / 60**0.5
    assert ((estimate.mean(dim=1) - exact).abs() < 3 * error + 1e-3).all()
    assert error.max() < 0.02


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_a_map_that_scales_everything_has_its_scale(scale: float):
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    for found in (exact_log_volume(lambda x: scale * x, z), log_volume(lambda x: scale * x, z, 1, 4)):
        torch.testing.assert_close(found, torch.full((2,), scale).double().log(), rtol=1e-5, atol=1e-6)


def test_a_linear_map_by_its_determinant():
    generator = torch.Generator().manual_seed(5)
    matrix = torch.eye(12, dtype=torch.float64) + 0.2 * torch.randn(12, 12, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    wanted = torch.linalg.slogdet(matrix).logabsdet / 12
    torch.testing.assert_close(exact_log_volume(lambda x: x @ matrix.T, z), wanted.expand(2))
    # with as many Lanczos steps as dimensions the quadrature is exact; what is left is the choice of directions
    estimate = log_volume(lambda x: x @ matrix.T, z[:1].repeat(4000, 1), 2, 12, generator)
    assert estimate.mean() == pytest.approx(wanted.item(), abs=0.01)
