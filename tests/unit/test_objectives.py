"""L_Diff, L_IM and their sum (Eq. 5 to 7) against numpy and finite differences."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.objectives.diffusion import diffusion_loss, drop_labels
from ims3_ray.objectives.inversion_matching import ImsLoss, ims3_loss, inversion_matching_loss

SCHEDULE = NoiseSchedule()
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
CONFIG = DiTConfig(
    input_size=4, in_channels=2, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=3, learn_sigma=True
)
TIMES, LABELS, DROPPED = torch.tensor([120, 640, 930]), torch.tensor([0, 2, 1]), torch.tensor([0, 3, 1])


def difffit_model() -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    add_difffit(model, scaled_blocks=1)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("gamma") else 0.0, std=0.2)
    return model.double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z0, noise = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return z0, noise


def loss_of(model: DiT, lambda_im: float, n_steps: int = 3, grad_steps: int = 3) -> ImsLoss:
    z0, noise = batch()
    return ims3_loss(
        model, z0, LABELS, DROPPED, TIMES, noise, SCHEDULE, lambda_im=lambda_im, n_steps=n_steps, grad_steps=grad_steps
    )


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    return sum(u.ravel() * v.ravel()) / math.sqrt(sum(u.ravel() ** 2) * sum(v.ravel() ** 2))


@torch.no_grad()
def numpy_losses(model: DiT, n_steps: int) -> tuple[float, float]:
    """L_Diff and L_IM of Algorithm 1; only the network itself runs in torch."""
    z0, noise = (tensor.numpy() for tensor in batch())
    times = TIMES.tolist()

    def network(z: list[np.ndarray], t: list[int], y: torch.Tensor) -> np.ndarray:
        return model(torch.from_numpy(np.stack(z)), torch.tensor(t), y)[:, :2].numpy()

    z_t = [math.sqrt(ALPHA_BAR[t]) * z0[b] + math.sqrt(1 - ALPHA_BAR[t]) * noise[b] for b, t in enumerate(times)]
    diffusion = np.mean((network(z_t, times, DROPPED) - noise) ** 2)
    z, levels, reached = list(z0), [1.0] * 3, [0] * 3
    for step in range(1, n_steps + 1):
        eps = network(z, reached, LABELS)
        for b, t in enumerate(times):
            reached[b] = t * step // n_steps
            ahead = ALPHA_BAR[reached[b]]
            increment = math.sqrt((1 - ahead) / ahead) - math.sqrt((1 - levels[b]) / levels[b])
            z[b] = math.sqrt(ahead) * (z[b] / math.sqrt(levels[b]) + increment * eps[b])
            levels[b] = ahead
    return float(diffusion), 1 - float(np.mean([cosine(u, v) for u, v in zip(z, z_t, strict=True)]))


def test_diffusion_loss_is_the_mean_square():
    predicted, noise = batch()
    total = sum((float(p) - float(n)) ** 2 for p, n in zip(predicted.flatten(), noise.flatten(), strict=True))
    assert diffusion_loss(predicted, noise).item() == pytest.approx(total / predicted.numel(), rel=1e-6)


def test_inversion_matching_loss_is_one_minus_the_cosine_of_each_sample():
    u, v = batch()
    mean = np.mean([cosine(u[b].numpy(), v[b].numpy()) for b in range(3)])
    assert inversion_matching_loss(u, v).item() == pytest.approx(1 - mean, rel=1e-6)


def test_inversion_matching_loss_sees_directions_only():
    u, _ = batch()
    assert inversion_matching_loss(u, 7 * u).item() == pytest.approx(0, abs=1e-6)
    assert inversion_matching_loss(u, -u).item() == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("n_steps", [1, 4])
@pytest.mark.parametrize("lambda_im", [0.002, 1.5])
def test_the_total_is_eq7_of_losses_computed_by_hand(lambda_im: float, n_steps: int):
    model = difffit_model()
    loss = loss_of(model, lambda_im, n_steps, 1)
    diffusion, matching = numpy_losses(model, n_steps)
    assert loss.diffusion.item() == pytest.approx(diffusion, rel=1e-5)
    assert loss.inversion_matching.item() == pytest.approx(matching, rel=1e-5)
    assert loss.total.item() == pytest.approx(diffusion + lambda_im * matching, rel=1e-5)


def test_without_lambda_only_the_diffusion_loss_is_computed():
    calls = []
    model = difffit_model()
    model.register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(model, 0.0)
    assert len(calls) == 1
    assert loss.total.item() == loss.diffusion.item() == pytest.approx(numpy_losses(model, 1)[0], rel=1e-5)
    assert loss.inversion_matching.item() == 0


@pytest.mark.parametrize("grad_steps", [1, 3])
def test_inversion_matching_moves_every_kind_of_difffit_parameter(grad_steps: int):
    model = difffit_model()
    loss_of(model, 1.0, grad_steps=grad_steps).inversion_matching.backward()
    for kind in ("gamma", "bias", "y_embed"):
        largest = [p.grad.abs().max() for name, p in model.named_parameters() if p.requires_grad and kind in name]
        assert max(largest) > 1e-4
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_detached_inversion_has_no_gradient():
    model = difffit_model()
    loss = loss_of(model, 1.0, grad_steps=0)
    assert loss.inversion_matching.item() > 0
    assert not loss.inversion_matching.requires_grad
    alone = loss_of(model, 0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    both = (torch.autograd.grad(each.total, trained) for each in (loss, alone))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize(
    ("name", "index"),
    [("blocks.0.attn.gamma", 3), ("blocks.0.mlp.gamma", 5), ("blocks.1.mlp.fc1.bias", 7), ("final_layer.linear.bias", 1)],
)
def test_the_gradient_equals_finite_differences(name: str, index: int):
    lambda_im, step = 2.0, 1e-5
    model = difffit_model()
    loss_of(model, lambda_im, n_steps=2, grad_steps=2).total.backward()
    actual = model.get_parameter(name).grad[index].item()
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.get_parameter(name)[index] += sign * step
        diffusion, matching = numpy_losses(moved, n_steps=2)
        sides.append(diffusion + lambda_im * matching)
    assert abs(actual) > 1e-4
    assert actual == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-7)


def test_labels_are_dropped_one_sample_at_a_time_at_the_given_rate():
    y = torch.arange(20_000) % 10
    dropped = drop_labels(y, 10, 0.1, torch.Generator().manual_seed(0))
    gone = dropped == 10
    assert gone.float().mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / 20_000))
    assert torch.equal(dropped[~gone], y[~gone])
    assert dropped.dtype == y.dtype


@pytest.mark.parametrize(("probability", "expected"), [(0.0, [4, 5, 6]), (1.0, [9, 9, 9])])
def test_dropping_never_or_always(probability: float, expected: list[int]):
    assert drop_labels(torch.tensor([4, 5, 6]), 9, probability).tolist() == expected


def test_dropping_follows_its_generator():
    y = torch.zeros(100, dtype=torch.int64)
    first, again, other = (drop_labels(y, 1, 0.5, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not y.any()
