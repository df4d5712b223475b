"""Selectors of images against their definitions written as loops over small classes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ims3_ray.selection import ClassImages, ClassSelector, Selector
from ims3_ray.selection.moments import moments

K, N, M, D = 3, 12, 20, 6
SELECTORS = {name: kind() for name, kind in Selector.registry.items() if issubclass(kind, ClassSelector)}
NEEDED = {name: selector.needs for name, selector in SELECTORS.items()}


def unit(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, D, generator=generator, dtype=torch.float64), dim=-1)


def images(seed: int, count: int = N) -> ClassImages:
    g = torch.Generator().manual_seed(seed)
    log_probability = -torch.rand(count, generator=g, dtype=torch.float64)
    recognised = torch.rand(count, generator=g) < 0.6
    return ClassImages(count, torch.Generator().manual_seed(seed), unit(g, count), unit(g, M), log_probability, recognised)


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), k=st.integers(1, 6))
def test_any_selector_gives_k_distinct_images_or_one_whole_subgroup_and_the_same_again(name: str, seed: int, k: int):
    selector = SELECTORS[name]
    chosen = selector.choose(images(seed), k, "image")
    assert chosen.dtype == torch.int64
    assert len(set(chosen.tolist())) == k
    assert 0 <= chosen.min() <= chosen.max() < N
    assert torch.equal(selector.choose(images(seed), k, "image"), chosen)
    group = selector.choose(images(seed), k, "group")
    assert group[0] % k == 0
    assert group.tolist() == list(range(group[0], group[0] + k))
    costs = [selector.cost(images(seed), torch.arange(g, g + k)[None]).item() for g in range(0, N // k * k, k)]
    if name != "random":  # which draws anew for each call
        assert costs[group[0] // k] == pytest.approx(min(costs))


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("per", ["image", "group"])
def test_a_class_of_k_images_is_chosen_whole_and_fewer_are_refused(name: str, per: str):
    assert sorted(SELECTORS[name].choose(images(0, K), K, per).tolist()) == list(range(K))
    with pytest.raises(ValueError, match="3 images are to be chosen of 2"):
        SELECTORS[name].choose(images(0, 2), K, per)


@pytest.mark.parametrize("name", SELECTORS)
def test_what_a_selector_does_not_say_it_needs_it_does_not_look_at(name: str):
    whole = images(1)
    fields = {
        "features": {"features": whole.features},
        "references": {"references": whole.references},
        "confidence": {"log_probability": whole.log_probability, "recognised": whole.recognised},
    }
    given_to_it = {key: value for need in NEEDED[name] for key, value in fields[need].items()}
    alone = ClassImages(N, torch.Generator().manual_seed(1), **given_to_it)
    assert torch.equal(SELECTORS[name].choose(alone, K, "image"), SELECTORS[name].choose(whole, K, "image"))


@pytest.mark.parametrize("name", SELECTORS)
def test_equal_images_are_chosen_once_each(name: str):
    same = torch.full((N, D), D**-0.5, dtype=torch.float64)
    everything = ClassImages(
        N, torch.Generator().manual_seed(2), same, same, torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.bool)
    )
    assert len(set(SELECTORS[name].choose(everything, 5, "image").tolist())) == 5
    assert len(SELECTORS[name].choose(everything, 5, "group")) == 5


def test_first_takes_the_first_and_random_a_permutation_of_its_own_seed():
    assert SELECTORS["first"].choose(images(3), K, "image").tolist() == [0, 1, 2]
    assert SELECTORS["first"].choose(images(3), K, "group").tolist() == [0, 1, 2]
    draws = {tuple(SELECTORS["random"].choose(images(seed), K, "image").tolist()) for seed in range(40)}
    groups = {int(SELECTORS["random"].choose(images(seed), K, "group")[0]) for seed in range(40)}
    assert len(draws) > 30
    assert groups == {0, 3, 6, 9}


@pytest.mark.parametrize("seed", range(4))
def test_closest_is_nearest_by_angle_to_the_mean_of_the_real_ones(seed: int):
    it = images(seed)
    features, real = it.features_ND.numpy(), it.references_MD.numpy()
    mean = real.mean(axis=0)

    def angle(vector: np.ndarray) -> float:
        return math.acos(float(vector @ mean) / float(np.linalg.norm(vector) * np.linalg.norm(mean)))

    ranked = sorted(range(N), key=lambda i: angle(features[i]))
    assert SELECTORS["closest"].choose(it, K, "image").tolist() == ranked[:K]
    best = min(range(N // K), key=lambda g: angle(features[g * K : (g + 1) * K].mean(axis=0)))
    assert SELECTORS["closest"].choose(it, K, "group")[0] == best * K


@pytest.mark.parametrize("seed", range(4))
def test_herding_adds_what_brings_the_sum_nearest_to_that_of_the_mean(seed: int):
    it = images(seed)
    features, mean = it.features_ND.numpy(), it.references_MD.numpy().mean(axis=0)
    chosen: list[int] = []
    for size in range(1, 6):
        left = [i for i in range(N) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(size * mean - features[[*chosen, i]].sum(axis=0))))
    assert SELECTORS["herding"].choose(it, 5, "image").tolist() == chosen


def test_herding_one_by_one_ends_nearer_to_the_mean_than_most_random_sets():
    it = images(5, 60)
    selector = SELECTORS["herding"]
    mine = selector.cost(it, selector.choose(it, 10, "image")[None]).item()
    sets = torch.stack([torch.randperm(60, generator=it.rng)[:10] for _ in range(200)])
    assert mine < selector.cost(it, sets).quantile(0.02).item()


@pytest.mark.parametrize("seed", range(4))
def test_k_center_covers_within_twice_the_best_radius(seed: int):
    it = images(seed)
    features = it.features_ND.numpy()

    def radius(chosen: tuple[int, ...]) -> float:
        return max(min(float(np.linalg.norm(features[i] - features[j])) for j in chosen) for i in range(N))

    best = min(radius(chosen) for chosen in itertools.combinations(range(N), K))
    found = SELECTORS["k_center"].choose(it, K, "image")
    assert best <= radius(tuple(found.tolist())) <= 2 * best
    assert SELECTORS["k_center"].cost(it, found[None]).item() == pytest.approx(radius(tuple(found.tolist())))
    assert found[0] == np.linalg.norm(features - features.mean(axis=0), axis=1).argmin()


def test_moments_are_those_of_scipy():
    from scipy import stats

    features = unit(torch.Generator().manual_seed(6), 5, 8)
    mean, std, skewness = moments(features)
    np.testing.assert_allclose(mean, features.numpy().mean(axis=1))
    np.testing.assert_allclose(std, features.numpy().std(axis=1))
    np.testing.assert_allclose(skewness, stats.skew(features.numpy(), axis=1))
    assert torch.equal(moments(torch.ones(4, D))[2], torch.zeros(D))


def test_moment_matching_finds_the_best_set_where_all_can_be_tried():
    it = images(7, 8)
    sets = torch.tensor(list(itertools.combinations(range(8), K)))
    best = SELECTORS["moments"].cost(it, sets).min()
    found = SELECTORS["moments"].choose(it, K, "image")
    assert SELECTORS["moments"].cost(it, found[None]).item() == pytest.approx(best.item())


def test_confidence_ranks_what_is_recognised_and_then_the_likeliest_mistakes():
    log_probability = torch.tensor([-0.1, -3.0, -0.5, -0.2, -2.0], dtype=torch.float64)
    recognised = torch.tensor([True, False, True, True, False])
    it = ClassImages(5, torch.Generator(), log_probability=log_probability, recognised=recognised)
    assert SELECTORS["confidence"].choose(it, 5, "image").tolist() == [0, 3, 2, 4, 1]
    assert SELECTORS["least_confidence"].choose(it, 5, "image").tolist() == [2, 3, 0, 4, 1]
    assert SELECTORS["confidence"].choose(it, 2, "group").tolist() == [2, 3]  # 0 and a mistake against two that are recognised
