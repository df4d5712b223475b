"""Coverage, Fréchet distance and nearest images against their definitions as loops, and against other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from ims3_ray.selection import coverage as module
from ims3_ray.selection.coverage import boundary_distance, coverage, frechet, nearest, radii, reached

D = 4


def features(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def ball(points: list[list[float]], number: int, k: int) -> float:
    others = sorted(math.dist(points[number], other) for i, other in enumerate(points) if i != number)
    return others[min(k, len(others)) - 1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 9), m=st.integers(2, 12), k=st.integers(1, 6), shift=st.floats(0, 2))
def test_the_four_shares_are_those_of_their_definitions(seed: int, n: int, m: int, k: int, shift: float):
    fake, real = features(seed, n, shift), features(seed + 1, m)
    found, a, b = coverage(fake, real, k), fake.tolist(), real.tolist()
    real_balls = [ball(b, i, k) for i in range(m)]
    within = [[math.dist(x, y) <= radius for y, radius in zip(b, real_balls, strict=True)] for x in a]
    assert found.precision == pytest.approx(sum(any(row) for row in within) / n)
    assert found.density == pytest.approx(sum(sum(row) for row in within) / (min(k, m - 1) * n))
    assert found.coverage == pytest.approx(sum(any(row[j] for row in within) for j in range(m)) / m)
    if n == 1:
        assert found.recall is None
    else:
        own = [ball(a, i, k) for i in range(n)]
        recalled = [any(math.dist(x, y) <= radius for x, radius in zip(a, own, strict=True)) for y in b]
        assert found.recall == pytest.approx(sum(recalled) / m)


def test_distances_are_computed_in_parts_of_rows(monkeypatch: pytest.MonkeyPatch):
    fake, real = features(0, 23), features(1, 31)
    whole = coverage(fake, real), nearest(fake, real)
    monkeypatch.setattr(module, "ROWS", 7)
    parts = coverage(fake, real), nearest(fake, real)
    assert parts[0] == whole[0]
    assert all(torch.equal(getattr(parts[1], name), getattr(whole[1], name)) for name in ("index", "distance", "ratio"))


def test_radii_that_are_known_already_give_the_same_values():
    fake, real = features(0, 23, 0.3), features(1, 31)
    known = radii(real, 3)
    assert coverage(fake, real, 3, known) == coverage(fake, real, 3)
    assert torch.equal(reached(fake, real, 3, known), reached(fake, real, 3))
    assert coverage(fake, real, 3, 0 * known).coverage == 0


def test_neighbours_are_those_of_scikit_learn():
    fake, real = normalize(features(0, 20), dim=-1), normalize(features(1, 50), dim=-1)
    distances, indices = NearestNeighbors(n_neighbors=2).fit(real.numpy()).kneighbors(fake.numpy())
    found = nearest(fake.float().double(), real)
    np.testing.assert_array_equal(found.index, indices[:, 0])
    np.testing.assert_allclose(found.distance, distances[:, 0], atol=1e-6)
    np.testing.assert_allclose(found.ratio, distances[:, 0] / distances[:, 1], atol=1e-5)
    own, _ = NearestNeighbors(n_neighbors=6).fit(real.numpy()).kneighbors(real.numpy())
    np.testing.assert_allclose(radii(real), own[:, -1], atol=1e-12)


def test_a_copy_is_known_by_its_ratio():
    real = features(0, 40)
    found = nearest(torch.cat([real[7:8], real[9:10] + 1e-6, features(1, 1)]), real)
    assert found.index[:2].tolist() == [7, 9]
    assert found.distance[0] == found.ratio[0] == 0
    assert found.ratio[1] < 1e-4
    assert found.ratio[2] > 0.1


def test_real_images_cover_themselves_and_far_images_nothing():
    real = features(0, 200)
    same, far = coverage(real[::2], real[1::2]), coverage(real[:50] + 100, real)
    assert same.precision > 0.9
    assert same.density == pytest.approx(1, abs=0.15)
    assert same.coverage > 0.9
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


@pytest.mark.parametrize("count", [3, 200])
def test_the_frechet_distance_is_that_of_a_matrix_root(count: int):
    """With 3 images of 4 features, the covariances have no full rank."""
    fake, real = features(0, count, 0.5) * torch.tensor([1.0, 2.0, 0.5, 1.0]), features(1, count + 5)
    covariances = [np.cov(each.numpy(), rowvar=False) for each in (fake, real)]
    mixed = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-15 * np.eye(D)).real
    means = (fake.mean(dim=0) - real.mean(dim=0)).square().sum().item()
    wanted = means + np.trace(covariances[0] + covariances[1] - 2 * mixed)
    assert frechet(fake, real) == pytest.approx(wanted, rel=1e-4)
    assert frechet(real, real) == pytest.approx(0, abs=1e-9)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="1 images cannot be compared with 1 real ones; it takes 1 and 2"):
        coverage(features(0, 1), features(1, 1))


def test_what_a_growing_set_has_reached_is_the_coverage_of_its_beginning():
    rng = torch.Generator().manual_seed(5)
    features, real = torch.randn(9, 3, generator=rng), torch.randn(40, 3, generator=rng)
    found = reached(features, real, 3)
    assert found.shape == (9,)
    assert found.tolist() == pytest.approx([coverage(features[:n], real, 3).coverage for n in range(1, 10)])
    with pytest.raises(ValueError, match="cannot be compared"):
        reached(features[:0], real)


def test_at_the_distance_to_the_boundary_another_class_has_the_same_score():
    rng = torch.Generator().manual_seed(6)
    weight, bias = torch.randn(4, 5, generator=rng).double(), torch.randn(4, generator=rng).double()
    features = torch.randn(20, 5, generator=rng).double()
    scores = features @ weight.T + bias
    label = 2
    found = boundary_distance(scores, weight, label)
    assert torch.equal(found > 0, scores.argmax(dim=1) == label)
    for image, distance, of_classes in zip(features, found.tolist(), scores, strict=True):
        moved = []
        for other in (0, 1, 3):
            across = (weight[label] - weight[other]) / (weight[label] - weight[other]).norm()
            there = weight @ (image - distance * across) + bias
            moved.append(float(there[label] - there[other]))
            assert float(of_classes[label] - of_classes[other]) / (weight[label] - weight[other]).norm() >= distance - 1e-9
        assert min(map(abs, moved)) < 1e-9
