"""Selective Subgroup Sampling against Eq. 8 to 10 written as loops and searched by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ims3_ray.selection import centroid, distances, path, select_subgroups
from ims3_ray.selection.distances import pool_tables

seeds = st.integers(0, 2**31 - 1)
weights = st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0))
few = settings(max_examples=40, deadline=None)


def instance(seed: int, C: int = 4, G: int = 3, D: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(C, G, D, generator=generator, dtype=torch.float64)
    return candidates, torch.randn(C, D, generator=generator, dtype=torch.float64)


def clustered(seed: int, C: int = 4, G: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative features whose candidates lie around their class's reference, as those of a ResNet do."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.rand(C, 16, generator=generator, dtype=torch.float64)
    spread = torch.randn(C, G, 16, generator=generator, dtype=torch.float64)
    return (references[:, None] + 0.1 * spread).relu(), references


def log_distance(u: torch.Tensor, v: torch.Tensor) -> float:
    u, v = u.tolist(), v.tolist()
    cosine = sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))
    return math.log(1 - cosine)


def eq10_pool(c: torch.Tensor, r: torch.Tensor, groups: tuple[int, ...], alpha: float, beta: float) -> float:
    C, G, _ = c.shape
    total = 0.0
    for i in range(C):
        total += alpha * log_distance(c[i, groups[i]], r[i])
        for j in range(C):
            for g in range(G):
                if j != i:
                    total -= beta / ((C - 1) * G) * log_distance(c[i, groups[i]], c[j, g])
    return total


def eq10_selected(c: torch.Tensor, r: torch.Tensor, groups: tuple[int, ...], alpha: float, beta: float) -> float:
    C = len(c)
    total = 0.0
    for i in range(C):
        total += alpha * log_distance(c[i, groups[i]], r[i])
        for j in range(C):
            if j != i:
                total -= beta / (C - 1) * log_distance(c[i, groups[i]], c[j, groups[j]])
    return total


def selected_optimum(c: torch.Tensor, r: torch.Tensor, alpha: float, beta: float) -> float:
    """The best coupled objective over all G^C choices, from tables so that many instances can be searched."""
    C, G, _ = c.shape
    near = [[alpha * log_distance(c[i, g], r[i]) for g in range(G)] for i in range(C)]
    far = np.zeros((C, G, C, G))
    for i, g, j, h in itertools.product(range(C), range(G), range(C), range(G)):
        if i != j:
            far[i, g, j, h] = beta / (C - 1) * log_distance(c[i, g], c[j, h])
    return min(
        sum(near[i][groups[i]] - sum(far[i, groups[i], j, groups[j]] for j in range(C)) for i in range(C))
        for groups in itertools.product(range(G), repeat=C)
    )


@pytest.mark.parametrize(("C", "seed"), [(4, 0), (4, 1), (5, 2)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.9), (0.9, 0.3)])
def test_pool_is_the_brute_force_optimum_of_eq10(C: int, seed: int, alpha: float, beta: float):
    c, r = instance(seed, C=C)
    costs = {groups: eq10_pool(c, r, groups, alpha, beta) for groups in itertools.product(range(3), repeat=C)}
    best = min(costs, key=costs.__getitem__)
    chosen = select_subgroups(c, r, alpha=alpha, beta=beta)
    assert tuple(chosen.groups.tolist()) == best
    assert chosen.objective == pytest.approx(costs[best], rel=1e-10)
    assert chosen.lower_bound == chosen.objective


def test_the_tables_hold_the_terms_of_eq10():
    c, r = instance(3)
    chosen = select_subgroups(c, r, alpha=0.7, beta=0.4)
    for i, g in itertools.product(range(4), range(3)):
        proximity = log_distance(c[i, g], r[i])
        repulsion = np.mean([log_distance(c[i, g], c[j, h]) for j in range(4) if j != i for h in range(3)])
        assert chosen.proximity_CG[i, g].item() == pytest.approx(proximity, rel=1e-9)
        assert chosen.repulsion_CG[i, g].item() == pytest.approx(repulsion, rel=1e-9)
        assert chosen.score_CG[i, g].item() == pytest.approx(0.7 * proximity - 0.4 * repulsion, rel=1e-9)


def test_ties_take_the_lowest_index():
    c, r = instance(4)
    c[2, 2] = c[2, 0]
    c[2, 1] = -r[2]
    assert select_subgroups(c, r, alpha=1.0, beta=0.0).groups[2] == 0


@pytest.mark.parametrize("seed", range(6))
def test_selected_reports_its_literal_objective_and_bounds_the_optimum(seed: int):
    c, r = instance(seed, C=5)
    chosen = select_subgroups(c, r, alpha=0.4, beta=0.8, coupling="selected")
    literal = eq10_selected(c, r, tuple(chosen.groups.tolist()), 0.4, 0.8)
    optimum = min(eq10_selected(c, r, groups, 0.4, 0.8) for groups in itertools.product(range(3), repeat=5))
    assert chosen.objective == pytest.approx(literal, rel=1e-10)
    assert chosen.lower_bound <= optimum + 1e-9
    assert optimum <= chosen.objective + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_released_counts_each_pair_of_classes_once_and_does_not_normalise(seed: int):
    c, r = instance(seed, C=5)
    chosen = select_subgroups(c, r, alpha=0.4, beta=0.9, coupling="released")
    groups = chosen.groups.tolist()
    pairs = [log_distance(c[i, groups[i]], c[j, groups[j]]) for i, j in itertools.combinations(range(5), 2)]
    own = [log_distance(c[i, groups[i]], r[i]) for i in range(5)]
    assert chosen.objective == pytest.approx(0.4 * sum(own) - 0.9 * sum(pairs), rel=1e-10)


def test_selected_names_the_repulsion_of_the_selected_rivals():
    c, r = instance(7, C=5)
    chosen = select_subgroups(c, r, alpha=0.4, beta=0.8, coupling="selected")
    for i, g in itertools.product(range(5), range(3)):
        rivals = [log_distance(c[i, g], c[j, chosen.groups[j]]) for j in range(5) if j != i]
        assert chosen.repulsion_CG[i, g].item() == pytest.approx(np.mean(rivals), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_single_class_can_improve_on_coordinate_descent(seed: int):
    c, r = instance(seed, C=5)
    chosen = select_subgroups(c, r, alpha=0.4, beta=0.8, coupling="selected")
    groups = chosen.groups.tolist()
    for i, g in itertools.product(range(5), range(3)):
        moved = (*groups[:i], g, *groups[i + 1 :])
        assert eq10_selected(c, r, moved, 0.4, 0.8) >= chosen.objective - 1e-9


def coupled_optimum(c: torch.Tensor, r: torch.Tensor, alpha: float, beta: float) -> float:
    """The best coupled objective over all G^C choices at once: one axis per class."""
    C, G, _ = c.shape
    unit_c, unit_r = (x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True) for x in (c, r))
    total = np.zeros((G,) * C)
    for i in range(C):
        total += (alpha * np.log(1 - unit_c[i] @ unit_r[i])).reshape([G if axis == i else 1 for axis in range(C)])
        for j in range(i + 1, C):
            pairs = 2 * beta / (C - 1) * np.log(1 - unit_c[i] @ unit_c[j].T)
            total -= pairs.reshape([G if axis in (i, j) else 1 for axis in range(C)])
    return float(total.min())


def test_coordinate_descent_finds_the_coupled_optimum_of_99_percent_of_500_instances():
    hits, coupled = 0, 0
    for seed in range(500):
        c, r = clustered(seed, C=8, G=4) if seed % 2 else instance(seed, C=8, G=4)
        chosen = select_subgroups(c, r, alpha=0.5, beta=0.9, coupling="selected")
        optimum = coupled_optimum(c, r, 0.5, 0.9)
        hits += chosen.objective <= optimum + 1e-9
        coupled += not torch.equal(chosen.groups, select_subgroups(c, r, alpha=0.5, beta=0.9).groups)
        assert chosen.lower_bound <= optimum + 1e-9
    assert hits >= 495
    assert coupled >= 100  # else the separable optimum alone would pass


def test_two_ways_to_search_by_brute_force_agree():
    c, r = clustered(3)
    assert coupled_optimum(c, r, 0.5, 0.9) == pytest.approx(selected_optimum(c, r, 0.5, 0.9))


@pytest.mark.parametrize("seed", range(3))
def test_without_room_for_all_pairs_the_descent_ends_at_the_same_place(seed: int, monkeypatch: pytest.MonkeyPatch):
    c, r = clustered(seed, C=6, G=5)
    tabled = select_subgroups(c, r, alpha=0.4, beta=0.9, coupling="selected")
    monkeypatch.setattr("ims3_ray.selection.coupled.TABLE_VALUES", 0)
    alone = select_subgroups(c, r, alpha=0.4, beta=0.9, coupling="selected")
    assert torch.equal(alone.groups, tabled.groups)
    torch.testing.assert_close(alone.repulsion_CG, tabled.repulsion_CG, rtol=1e-12, atol=1e-12)
    assert alone.objective == pytest.approx(tabled.objective, rel=1e-12)
    assert alone.gap == pytest.approx(alone.objective - alone.lower_bound)


@few
@given(seeds, st.integers(1, 7), st.integers(1, 5), st.integers(1, 9))
def test_tables_do_not_depend_on_the_size_of_the_tiles(seed: int, C: int, G: int, tile: int):
    c = torch.nn.functional.normalize(instance(seed, C=C, G=G)[0], dim=-1)
    pairs = torch.empty(C, G, C, G, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ims3_ray.selection.distances.TILE", tile)
        mean, farthest = pool_tables(c, pairs)
    expected = torch.zeros(C, G, C, G, dtype=torch.float64)
    for i, g, j, h in itertools.product(range(C), range(G), range(C), range(G)):
        if i != j:
            expected[i, g, j, h] = log_distance(c[i, g], c[j, h])
    torch.testing.assert_close(pairs, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, expected.sum(dim=(2, 3)) / max(1, C - 1) / G, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(farthest, expected.amax(dim=3).sum(dim=2) / max(1, C - 1), rtol=1e-9, atol=1e-9)


def test_nearly_equal_vectors_keep_the_digits_of_their_distance():
    u = torch.zeros(1, 4, dtype=torch.float64)
    u[0, 0] = 1
    for angle in (1e-4, 1e-6, 1e-7):
        v = torch.tensor([[math.cos(angle), math.sin(angle), 0, 0]], dtype=torch.float64)
        assert distances.log_distance(u, v).item() == pytest.approx(math.log(2 * math.sin(angle / 2) ** 2), rel=1e-6)
    assert distances.log_distance(u, u).item() == pytest.approx(math.log(np.finfo(np.float64).eps))


@few
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_the_path_is_the_selection_at_every_share_of_a_dense_grid(seed: int, C: int, G: int):
    c, r = instance(seed, C=C, G=G)
    whole = path(c, r)
    assert whole.shares[0] == 0
    assert whole.shares[-1] == 1
    assert (whole.shares.diff() > 0).all()
    assert 1 <= len(whole) == len(whole.shares) - 1 <= C * (G - 1) + 1
    for share in np.linspace(0, 1, 201)[:-1] if C > 1 else [0.0, 0.5]:
        if (whole.shares - share).abs().min() < 1e-9 and share > 0:
            continue  # two selections meet
        groups = select_subgroups(c, r, alpha=1 - share, beta=share).groups
        assert torch.equal(whole.at(1 - share, share), groups)
    for start, end, groups in zip(whole.shares, whole.shares[1:], whole.groups, strict=False):
        middle = (start + end).item() / 2
        if end - start > 1e-6:
            assert torch.equal(select_subgroups(c, r, alpha=1 - middle, beta=middle).groups, groups)


def test_the_path_of_parallel_lines_has_one_selection():
    c, r = instance(21, C=1, G=4)
    assert path(c, r).groups.tolist() == [select_subgroups(c, r, alpha=1.0, beta=0.0).groups.tolist()]
    assert path(c, r).shares.tolist() == [0, 1]


@few
@given(seeds, weights, st.sampled_from(["pool", "selected"]), st.data())
def test_the_length_of_a_vector_does_not_matter(seed, weight, coupling, data):
    c, r = instance(seed)
    scales = st.floats(1e-6, 1e6)
    by_C = torch.tensor(data.draw(st.lists(scales, min_size=4, max_size=4)), dtype=torch.float64)
    by_CG = torch.tensor(data.draw(st.lists(scales, min_size=12, max_size=12)), dtype=torch.float64).reshape(4, 3)
    before = select_subgroups(c, r, alpha=weight[0], beta=weight[1], coupling=coupling)
    after = select_subgroups(c * by_CG[..., None], r * by_C[:, None], alpha=weight[0], beta=weight[1], coupling=coupling)
    assert torch.equal(before.groups, after.groups)
    assert after.objective == pytest.approx(before.objective, rel=1e-9, abs=1e-9)


@few
@given(seeds, weights, st.sampled_from([1e-12, 0.01, 0.3, 7.0, 100.0, 1e9]), st.sampled_from(["pool", "selected"]))
def test_only_the_ratio_of_alpha_and_beta_matters(seed, weight, k, coupling):
    c, r = instance(seed)
    before = select_subgroups(c, r, alpha=weight[0], beta=weight[1], coupling=coupling)
    after = select_subgroups(c, r, alpha=k * weight[0], beta=k * weight[1], coupling=coupling)
    assert torch.equal(before.groups, after.groups)
    assert after.objective == pytest.approx(k * before.objective, rel=1e-9, abs=1e-9 * k)


@few
@given(seeds, weights, st.permutations(range(4)))
def test_the_order_of_the_classes_does_not_matter(seed, weight, order):
    c, r = instance(seed)
    before = select_subgroups(c, r, alpha=weight[0], beta=weight[1])
    after = select_subgroups(c[order], r[order], alpha=weight[0], beta=weight[1])
    assert torch.equal(before.groups[order], after.groups)
    assert after.objective == pytest.approx(before.objective, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("coupling", ["pool", "selected"])
def test_a_candidate_equal_to_its_reference_stays_finite_and_wins(coupling: str):
    c, r = instance(5)
    c[1, 2] = 3 * r[1]
    chosen = select_subgroups(c, r, alpha=1.0, beta=0.1, coupling=coupling)
    assert chosen.groups[1] == 2
    assert math.isfinite(chosen.objective)
    assert chosen.score_CG.isfinite().all()


def test_candidates_a_millionth_apart_keep_their_order():
    c, r = instance(6)
    side = torch.roll(r[0], 1)
    for g, distance in enumerate((3e-6, 1e-6, 2e-6)):
        c[0, g] = r[0] + distance * side
    assert select_subgroups(c.float().double(), r.float().double(), alpha=1.0, beta=0.0).groups[0] == 1


@pytest.mark.parametrize("coupling", ["pool", "selected"])
def test_a_single_class_takes_the_candidate_nearest_to_its_reference(coupling: str):
    c, r = instance(8, C=1, G=6)
    chosen = select_subgroups(c, r, alpha=0.5, beta=0.5, coupling=coupling)
    distances = [log_distance(c[0, g], r[0]) for g in range(6)]
    assert chosen.groups.tolist() == [int(np.argmin(distances))]
    assert chosen.objective == pytest.approx(0.5 * min(distances), rel=1e-10)


@pytest.mark.parametrize("coupling", ["pool", "selected"])
def test_groups_are_int64_per_class(coupling: str):
    c, r = instance(9)
    groups = select_subgroups(c.float(), r.float(), alpha=1.0, beta=1.0, coupling=coupling).groups
    assert groups.dtype == torch.int64
    assert groups.shape == (4,)


@pytest.mark.parametrize(
    ("c_shape", "r_shape"),
    [
        ((4, 3, 5), (4, 6)),
        ((4, 3, 5), (3, 5)),
        ((4, 5), (4, 5)),
        ((4, 3, 5), (4, 3, 5)),
        ((4, 0, 5), (4, 5)),
        ((0, 3, 5), (0, 5)),
    ],
)
def test_shapes_that_do_not_match_are_refused(c_shape: tuple[int, ...], r_shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="candidates"):
        select_subgroups(torch.ones(c_shape), torch.ones(r_shape), alpha=1.0, beta=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused(value: float, which: int):
    tensors = instance(10)
    tensors[which].view(-1)[3] = value
    with pytest.raises(ValueError, match=("candidates", "references")[which] + " hold values that are not finite"):
        select_subgroups(*tensors, alpha=1.0, beta=1.0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_zero_vector_is_refused(which: int):
    tensors = instance(11)
    tensors[which][0, ..., :] = 0
    with pytest.raises(ValueError, match=("candidates", "references")[which] + " hold a zero vector"):
        select_subgroups(*tensors, alpha=1.0, beta=1.0)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (-0.1, 1.0), (1.0, -0.1), (math.nan, 1.0), (1.0, math.nan)])
def test_impossible_weights_are_refused(alpha: float, beta: float):
    with pytest.raises(ValueError, match="alpha and beta"):
        select_subgroups(*instance(12), alpha=alpha, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_an_unknown_coupling_is_refused(beta: float):
    with pytest.raises(ValueError, match="coupling must be"):
        select_subgroups(*instance(13), alpha=1.0, beta=beta, coupling="both")


def test_centroid_is_eq8_and_eq9():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(14))
    rows = [row / np.sqrt((row**2).sum()) for row in features.double().numpy()]
    mean = sum(rows) / len(rows)
    actual = centroid(features)
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), mean / np.sqrt((mean**2).sum()), rtol=1e-12)
