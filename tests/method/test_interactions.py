"""Factorisation machines on effects that are made by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from demur.method.interactions import draw_subsets, find_interactions, fit

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
