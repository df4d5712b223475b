"""L_Diff, L_IM and their sum (Eq. 5 to 7) against numpy and finite differences."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from ims3_ray.diffusion.prediction import target_of
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.objectives.base import Losses, TrainingStep, add_up
from ims3_ray.objectives.diffusion import Diffusion, diffusion_loss, drop_conditions, min_snr_weight, variational_bound
from ims3_ray.objectives.inversion_matching import InversionMatching, inversion_matching_loss
from ims3_ray.objectives.inversion_matching_released import InversionMatchingReleased, reverse_step
from ims3_ray.objectives.minimax import Minimax

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


def diffusion(**settings: Any) -> Diffusion:
    return Diffusion(Diffusion.Config(**settings))


def matching(weight: float, n_steps: int, grad_steps: int) -> InversionMatching:
    settings = {"weight": weight, "n_steps": n_steps, "grad_steps": grad_steps, "similarity": "cosine"}
    return InversionMatching(InversionMatching.Config.model_construct(**settings))  # which takes 0 steps with a gradient


def released(weight: float) -> InversionMatchingReleased:
    return InversionMatchingReleased(InversionMatchingReleased.Config(weight=weight))


def minimax_of(representativeness: float, diversity: float, **settings: Any) -> Minimax:
    return Minimax(Minimax.Config(representativeness=representativeness, diversity=diversity, **settings))


def step_of(model: DiT, times: torch.Tensor = TIMES) -> TrainingStep:
    z0, noise = batch()
    return TrainingStep(model, SCHEDULE, z0, LABELS, DROPPED, times, noise)


def loss_of(model: DiT, lambda_im: float, n_steps: int = 3, grad_steps: int = 3) -> Losses:
    return add_up([diffusion(), matching(lambda_im, n_steps, grad_steps)], step_of(model))


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


def test_in_expectation_the_loss_asks_for_inverted_latents_that_are_parallel_to_the_clean_ones():
    """z_inv does not depend on the noise of z_t, so that E[1 − cos(z_inv, z_t)] = 1 − E[cos(z_0, z_t)]·cos(z_inv, z_0)
    (docs/inversion-matching.md): here with 400,000 draws of the noise, and inverted latents in any direction."""
    g = torch.Generator().manual_seed(0)
    z0, z_inv = torch.randn(2, 1, 6, generator=g, dtype=torch.float64)
    for alpha_bar in (0.9, 0.5, 0.05):
        noise = torch.randn(400_000, 6, generator=g, dtype=torch.float64)
        z_t = alpha_bar**0.5 * z0 + (1 - alpha_bar) ** 0.5 * noise
        cosines = torch.nn.functional.cosine_similarity
        loss = inversion_matching_loss(z_inv.expand_as(z_t), z_t).item()
        expected = 1 - cosines(z0, z_t).mean() * cosines(z_inv, z0)
        assert loss == pytest.approx(expected.item(), abs=3e-3)


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
    assert loss.terms["diffusion"].item() == pytest.approx(diffusion, rel=1e-5)
    assert loss.terms["inversion_matching"].item() == pytest.approx(matching, rel=1e-5)
    assert loss.total.item() == pytest.approx(diffusion + lambda_im * matching, rel=1e-5)


@pytest.mark.parametrize(("order", "passes"), [((0, 1), [3, 3, 3, 3]), ((1, 0), [3, 3, 6])])
def test_a_pass_with_gradient_takes_the_shared_one_along(order: tuple[int, int], passes: list[int]):
    model = difffit_model()
    expected = loss_of(model, 1.5, 3, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(expected.total, trained)
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parts = [diffusion(), matching(1.5, 3, 1)]
    found = add_up([parts[i] for i in order], step_of(model))
    assert sizes == passes
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found.total, trained), gradient, rtol=1e-9, atol=1e-12)


def test_no_pass_is_taken_along_that_nobody_looks_at():
    model, sizes = difffit_model(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    alone = dataclasses.replace(step_of(model), output_is_needed=InversionMatching.needs_output)
    add_up([matching(1.5, 2, 1)], alone)
    assert sizes == [3, 3]


@pytest.mark.parametrize("grad_steps", [1, 3])
def test_inversion_matching_moves_every_kind_of_difffit_parameter(grad_steps: int):
    model = difffit_model()
    loss_of(model, 1.0, grad_steps=grad_steps).terms["inversion_matching"].backward()
    for kind in ("gamma", "bias", "y_embed"):
        largest = [p.grad.abs().max() for name, p in model.named_parameters() if p.requires_grad and kind in name]
        assert max(largest) > 1e-4
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_detached_inversion_has_no_gradient():
    model = difffit_model()
    loss = loss_of(model, 1.0, grad_steps=0)
    assert loss.terms["inversion_matching"].item() > 0
    assert not loss.terms["inversion_matching"].requires_grad
    alone = add_up([diffusion()], step_of(model))
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
    dropped = drop_conditions(y, 10, 0.1, torch.Generator().manual_seed(0))
    gone = dropped == 10
    assert gone.float().mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / 20_000))
    assert torch.equal(dropped[~gone], y[~gone])
    assert dropped.dtype == y.dtype


@pytest.mark.parametrize(("probability", "expected"), [(0.0, [4, 5, 6]), (1.0, [9, 9, 9])])
def test_dropping_never_or_always(probability: float, expected: list[int]):
    assert drop_conditions(torch.tensor([4, 5, 6]), 9, probability).tolist() == expected


def test_dropping_follows_its_generator():
    y = torch.zeros(100, dtype=torch.int64)
    first, again, other = (drop_conditions(y, 1, 0.5, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not y.any()


@pytest.mark.parametrize(("similarity", "power"), [("l1", 1), ("l2", 2)])
def test_the_alternatives_of_table_7_are_mean_differences(similarity: str, power: int):
    u, v = batch()
    expected = np.mean(np.abs(u.numpy() - v.numpy()) ** power)
    assert inversion_matching_loss(u, v, similarity).item() == pytest.approx(expected, rel=1e-6)


def numpy_posterior(z0: np.ndarray, z_t: np.ndarray, t: int) -> tuple[np.ndarray, float]:
    """Mean and variance of q(z_{t-1} | z_t, z_0): the product of two Gaussians in z_{t-1}, by completing the square."""
    beta = 1e-4 + (0.02 - 1e-4) * t / 999
    before = ALPHA_BAR[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (math.sqrt(1 - beta) / beta * z_t + math.sqrt(before) / (1 - before) * z0) / precision
    return mean, 1 / precision


@torch.no_grad()
def numpy_released(model: DiT, z0: np.ndarray, noise: np.ndarray, times: list[int]) -> float:
    """The released reading from its description; only the network itself runs in torch."""

    def network(z: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(z), torch.tensor(times), DROPPED)[:, :2].numpy()

    now = ALPHA_BAR[times][:, None, None, None]
    ahead = np.append(ALPHA_BAR, 0.0)[np.array(times) + 1][:, None, None, None]
    clean = np.clip((z0 - np.sqrt(1 - now) * network(z0)) / np.sqrt(now), -1, 1)
    upward = (z0 / np.sqrt(now) - clean) / np.sqrt(1 / now - 1)
    inverted = np.sqrt(ahead) * clean + np.sqrt(1 - ahead) * upward
    z_t = np.sqrt(now) * z0 + np.sqrt(1 - now) * noise
    z0_hat = (z_t - np.sqrt(1 - now) * network(z_t)) / np.sqrt(now)
    denoised = [numpy_posterior(z0_hat[b], z_t[b], t)[0] for b, t in enumerate(times)]
    pairs = [cosine(inverted[i], denoised[j]) for i in range(len(times)) for j in range(len(times))]
    return 1 - float(np.mean(pairs))


@pytest.mark.parametrize("times", [[120, 640, 930], [1, 500, 999]])
def test_the_released_reading_equals_its_description(times: list[int]):
    model = difffit_model()
    z0, noise = (tensor.numpy() for tensor in batch())
    term = released(0.002)(step_of(model, torch.tensor(times)))["inversion_matching_released"]
    assert term.item() == pytest.approx(numpy_released(model, z0, noise, times), rel=1e-5)


def test_the_released_reading_has_its_gradient_through_the_denoised_latent_only():
    model = difffit_model()
    step = step_of(model)
    released(1.0)(step)["inversion_matching_released"].backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.requires_grad and p.grad is not None) > 1e-6
    assert not reverse_step(step.predict, step.z0, step.t_B, SCHEDULE).requires_grad


def test_the_variational_bound_is_the_divergence_of_two_gaussians():
    model = difffit_model()
    step = step_of(model)
    total = []
    for b, t in enumerate(TIMES.tolist()):
        z_t = step.z_t[b].numpy()
        true_mean, variance = numpy_posterior(step.z0[b].numpy(), z_t, t)
        mean, _ = numpy_posterior(step.z0_hat[b].detach().numpy(), z_t, t)
        share = (step.output[b, 2:].detach().numpy() + 1) / 2
        largest = math.log(1e-4 + (0.02 - 1e-4) * t / 999)
        std = np.exp(0.5 * (share * largest + (1 - share) * math.log(variance)))
        ours, truth = (
            torch.distributions.Normal(torch.as_tensor(m), torch.as_tensor(s))
            for m, s in ((mean, std), (true_mean, np.full_like(std, math.sqrt(variance))))
        )
        total.append(torch.distributions.kl_divergence(truth, ours).mean().item() / math.log(2))
    assert variational_bound(step).item() == pytest.approx(np.mean(total), rel=1e-4)


def test_at_the_last_step_the_bound_is_the_likelihood_of_eight_bits():
    model = difffit_model()
    step = step_of(model, torch.zeros(3, dtype=torch.int64))
    mean = step.z0_hat.detach().double()  # q(z_0 | z_1, z_0) is a point: the prediction itself
    variances = 1e-4 + (0.02 - 1e-4) / 999 * np.arange(2)
    smallest = math.log(variances[1] * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[1]))
    share = (step.output[:, 2:].detach() + 1) / 2
    std = (0.5 * (share * math.log(1e-4) + (1 - share) * smallest)).exp()
    gaussian = torch.distributions.Normal(mean, std)
    low, high = gaussian.cdf(step.z0 - 1 / 255), gaussian.cdf(step.z0 + 1 / 255)
    mass = torch.where(step.z0 < -0.999, high, torch.where(step.z0 > 0.999, 1 - low, high - low)).clamp(min=1e-12)
    assert variational_bound(step).item() == pytest.approx(-mass.log2().mean().item(), rel=1e-4)


def test_the_bound_trains_the_variance_and_leaves_the_noise_alone():
    model = difffit_model()
    bias = model.final_layer.linear.bias
    variational_bound(step_of(model)).backward()
    of_noise, of_variance = bias.grad.reshape(4, 4)[:, :2], bias.grad.reshape(4, 4)[:, 2:]
    assert of_variance.abs().min() > 0
    assert not of_noise.any()


def test_minimax_looks_at_the_least_and_the_most_similar_latent_of_a_class():
    model = difffit_model()
    minimax = minimax_of(0.002, 0.008, memory=2)
    first = minimax(step_of(model))
    assert first["representativeness"].item() == first["diversity"].item() == 0  # nothing remembered yet
    other = step_of(model, torch.tensor([10, 400, 700]))
    real, predicted = [*step_of(model).z0], [*step_of(model).z0_hat.detach()]
    second = minimax(other)
    z0_hat = other.z0_hat.detach().numpy()
    near = [1 - cosine(z0_hat[b], real[b].numpy()) for b in range(3)]
    apart = [cosine(z0_hat[b], predicted[b].numpy()) for b in range(3)]
    assert second["representativeness"].item() == pytest.approx(np.mean(near), rel=1e-4)
    assert second["diversity"].item() == pytest.approx(np.mean(apart), rel=1e-4)
    second["diversity"].backward()
    assert model.final_layer.linear.bias.grad.abs().max() > 0
    same_class = dataclasses.replace(other, y_B=torch.tensor([2, 2, 2]))
    third = minimax(same_class)
    memory = [real[1], other.z0[1]]
    least = min(cosine(z0_hat[k], z.numpy()) for k in range(3) for z in memory)
    most = max(cosine(z0_hat[k], z.numpy()) for k in range(3) for z in (predicted[1], other.z0_hat.detach()[1]))
    assert third["representativeness"].item() == pytest.approx(1 - least, rel=1e-4)
    assert third["diversity"].item() == pytest.approx(most, rel=1e-4)
    assert len(minimax.real[2]) == len(minimax.predicted[2]) == 2  # the newest two of five


def test_minimax_goes_on_from_its_state():
    model = difffit_model()
    one, other = minimax_of(1, 1), minimax_of(1, 1)
    one(step_of(model))
    other.restore(one.state())
    values = [[term.item() for term in minimax(step_of(model)).values()] for minimax in (one, other)]
    assert values[0] == values[1]
    assert values[0][0] > 0


def test_minimax_memories_that_are_shared_hold_what_all_workers_gathered(monkeypatch: pytest.MonkeyPatch):
    model = difffit_model()
    monkeypatch.setattr("ims3_ray.objectives.minimax._of_all_workers", lambda tensor: torch.cat([tensor, tensor + 0]))
    alone, minimax = minimax_of(1, 1), minimax_of(1, 1, shared=True)
    alone(step_of(model))
    minimax(step_of(model))
    assert {label: len(latents) for label, latents in alone.real.items()} == {0: 1, 1: 1, 2: 1}
    assert {label: len(latents) for label, latents in minimax.real.items()} == {0: 2, 1: 2, 2: 2}


def test_terms_add_up_by_weight():
    model = difffit_model()
    parts = [diffusion(weight=2.0, variance=True), released(0.5), minimax_of(0.002, 0.008)]
    total, terms = add_up(parts, step_of(model))
    weights = {
        "diffusion": 2.0,
        "variance": 2.0,
        "inversion_matching_released": 0.5,
        "representativeness": 0.002,
        "diversity": 0.008,
    }
    assert terms.keys() == weights.keys()
    assert total.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()), rel=1e-6)


@pytest.mark.parametrize("parametrisation", ["epsilon", "v"])
def test_min_snr_weighs_the_error_of_the_clean_image(parametrisation: str):
    schedule, gamma = NoiseSchedule(), 5.0
    t = torch.tensor([0, 100, 400, 700, 999])
    z0, noise, wrong = (torch.randn(5, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    z_t, alpha_bar = schedule.add_noise(z0, noise, t), schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
    predicted_z0 = z0 + wrong
    eps = (z_t - alpha_bar.sqrt() * predicted_z0) / (1 - alpha_bar).sqrt()
    predicted = eps if parametrisation == "epsilon" else (alpha_bar.sqrt() * z_t - predicted_z0) / (1 - alpha_bar).sqrt()
    target = target_of(z0, noise, t, schedule, parametrisation)  # type: ignore[arg-type]
    weight = min_snr_weight(t, schedule, gamma, parametrisation)  # type: ignore[arg-type]
    snr = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma)
    assert diffusion_loss(predicted, target, weight).item() == pytest.approx((snr * wrong.square()).mean().item(), rel=1e-4)


def test_minimax_alone_has_a_gradient_on_the_first_step():
    """Its memories are empty then, so both terms are 0."""
    network = difffit_model()
    add_up([minimax_of(0.002, 0.008)], step_of(network)).total.backward()
