"""Factorisation machines on effects that are made by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from demur.method.interactions import FactorisationMachine, draw_subsets, find_interactions, fit

K = 12
WEIGHTS = np.linspace(-1, 1, K)
PAIRS = {(0, 5): -2.0, (3, 4): 1.5, (2, 9): 0.5}


def effects(members: np.ndarray) -> np.ndarray:
    """Each feature's own effect, and what three pairs do beyond that."""
    return members @ WEIGHTS + sum(size * (members[:, a] & members[:, b]) for (a, b), size in PAIRS.items())


def test_known_pairs_are_found_with_their_sizes() -> None:
    members = draw_subsets(K, 200)
    found = find_interactions(members, effects(members), rank=6)
    assert (found.pairs == found.pairs.T).all()
    for a, b in combinations(range(K), 2):
        assert found.pairs[a, b] == pytest.approx(PAIRS.get((a, b), 0.0), abs=0.05)
    assert found.r2.value > 0.999
    assert found.additive_r2.high < found.r2.low
    assert found.gain.value == pytest.approx(found.r2.value - found.additive_r2.value)
    assert (found.r2.n, found.gain.n) == (50, 50)


def test_features_that_stand_in_for_each_other_fit_a_low_rank() -> None:
    """Any one of a group does what all of it does: every pair within a group interacts below zero."""
    members = draw_subsets(K, 300, seed=1)
    either = np.stack([members[:, :6].any(1), members[:, 6:].any(1)]).sum(0).astype(float)
    found = find_interactions(members, either, rank=4)
    within = [found.pairs[a, b] for a, b in combinations(range(K), 2) if (a < 6) == (b < 6)]
    across = [found.pairs[a, 6 + b] for a in range(6) for b in range(6)]
    assert max(within) < min(across)
    assert found.gain.low > 0


def test_additive_effects_have_no_interactions() -> None:
    members = draw_subsets(K, 200)
    found = find_interactions(members, members @ WEIGHTS, rank=4)
    assert np.abs(found.pairs).max() < 0.05
    assert found.additive_r2.value > 0.999
    assert abs(found.gain.value) < 1e-3


def test_subsets_hold_each_feature_alone_and_two_to_half() -> None:
    members = draw_subsets(K, 50)
    assert (members[:K] == np.eye(K, dtype=bool)).all()
    sizes = members[K:].sum(1)
    assert (sizes.min(), sizes.max()) == (2, K // 2)
    assert (draw_subsets(K, 50) == members).all()
    assert (draw_subsets(K, 50, seed=1) != members).any()


def test_a_fit_of_rank_0_is_additive() -> None:
    members = draw_subsets(K, 50)
    made = fit(members, effects(members), 0)
    assert not made.pairs.any()
    assert made(members[:K]) == pytest.approx(made.weights.numpy())


@pytest.mark.parametrize(
    ("factors", "pairs"),
    [
        # The first half of the factors, and the middle one, count positively, the others negatively.
        ([[2.0], [3.0], [-1.0]], {(0, 1): 6.0, (0, 2): -2.0, (1, 2): -3.0}),
        ([[2.0, 1], [3, 4], [-1, 0]], {(0, 1): 6.0 - 4, (0, 2): -2.0, (1, 2): -3.0}),
        ([[2.0, 1, 1], [3, 4, 5], [-1, 0, 2]], {(0, 1): 6.0 + 4 - 5, (0, 2): -2.0 - 2, (1, 2): -3.0 - 10}),
    ],
)
def test_a_subset_has_its_features_weights_and_its_pairs_products(
    factors: list[list[float]], pairs: dict[tuple[int, int], float]
) -> None:
    weights = [1.0, 10.0, 100.0]
    made = FactorisationMachine(torch.tensor(weights).double(), torch.tensor(factors).double())
    table = np.zeros((3, 3))
    for (a, b), size in pairs.items():
        table[a, b] = table[b, a] = size
    assert made.pairs == pytest.approx(table)
    members = np.array([[n >> bit & 1 for bit in range(3)] for n in range(8)], dtype=bool)
    expected = [
        sum(w for w, inside in zip(weights, row, strict=True) if inside)
        + sum(size for (a, b), size in pairs.items() if row[a] and row[b])
        for row in members
    ]
    assert made(members) == pytest.approx(expected)


@pytest.mark.parametrize("unit", [1.0, 250.0])
def test_an_additive_fit_is_the_ridge_regression_whatever_the_unit(unit: float) -> None:
    """In closed form: the penalty is a thousandth of the effects' variance, divided by the number of features."""
    members = draw_subsets(4, 8, seed=2)
    x, y = members.astype(float), unit * effects(np.pad(members, ((0, 0), (0, K - 4))))
    expected = np.linalg.solve(x.T @ x / len(x) + 1e-3 / 4 * np.eye(4), x.T @ y / len(x))
    assert fit(members, y, 0).weights.numpy() == pytest.approx(expected, rel=1e-4)


def test_effects_without_variance_fit_nothing() -> None:
    made = fit(draw_subsets(4, 8), np.zeros(12), 0)
    assert made.weights.tolist() == [0.0] * 4


def test_a_machine_scales_with_its_effects() -> None:
    members = draw_subsets(6, 30)
    known = effects(np.pad(members, ((0, 0), (0, K - 6))))
    one, many = (fit(members, unit * known, 1) for unit in (1.0, 400.0))
    assert many(members) == pytest.approx(400 * one(members), rel=1e-3, abs=0.5)
    assert many.pairs == pytest.approx(400 * one.pairs, rel=1e-3, abs=0.5)


def test_the_fit_is_measured_on_subsets_that_it_was_not_fitted_to() -> None:
    """Every fourth of those with several features; the interactions that are given are of a fit to all."""
    members = draw_subsets(6, 21)
    noisy = effects(np.pad(members, ((0, 0), (0, K - 6)))) + np.random.default_rng(1).normal(size=27)
    found = find_interactions(members, noisy, 1, seed=3)
    held = np.isin(np.arange(27), range(6, 27, 4))
    truth = noisy[held]
    spread = ((truth - truth.mean()) ** 2).mean()
    shares = [
        1 - ((truth - fit(members[~held], noisy[~held], rank, seed=3)(members[held])) ** 2).mean() / spread
        for rank in (1, 0)
    ]
    assert (found.r2.value, found.additive_r2.value) == pytest.approx(shares)
    assert found.gain.value == pytest.approx(shares[0] - shares[1])
    assert found.r2.n == found.additive_r2.n == found.gain.n == 6
    assert found.pairs == pytest.approx(fit(members, noisy, 1, seed=3).pairs)


@pytest.mark.parametrize(("features", "most"), [(2, 2), (3, 2), (5, 2), (6, 3), (9, 4)])
def test_random_subsets_have_two_features_to_half_of_all(features: int, most: int) -> None:
    sizes = draw_subsets(features, 60)[features:].sum(1)
    assert set(sizes.tolist()) == set(range(2, most + 1))
    assert draw_subsets(features, 0).sum() == features
