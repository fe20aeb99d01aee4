"""Detection statistics against scikit-learn, a slow DeLong, and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import roc_auc_score

from demur.guard.stats import (
    delong,
    expected_calibration_error,
    f1_score,
    reliability,
    share_above,
    threshold_at,
)


def slow_delong(first, second, labels) -> tuple[list[float], np.ndarray]:
    """DeLong et al. (1988), equations 4 to 8, pair by pair."""
    areas, tens, ones = [], [], []
    for scores in (first, second):
        positive, negative = scores[labels], scores[~labels]
        psi = np.array([[1.0 if x > y else 0.5 if x == y else 0.0 for y in negative] for x in positive])
        areas.append(float(psi.mean()))
        tens.append(psi.mean(1))
        ones.append(psi.mean(0))
    cover = np.zeros((2, 2))
    m, n = len(tens[0]), len(ones[0])
    for r in range(2):
        for s in range(2):
            s10 = sum((tens[r][i] - areas[r]) * (tens[s][i] - areas[s]) for i in range(m)) / (m - 1)
            s01 = sum((ones[r][j] - areas[r]) * (ones[s][j] - areas[s]) for j in range(n)) / (n - 1)
            cover[r, s] = s10 / m + s01 / n
    return areas, cover


@pytest.mark.parametrize("ties", [False, True])
def test_delong_agrees_with_the_slow_one(ties: bool) -> None:
    random = np.random.default_rng(1)
    labels = random.random(60) < 0.4
    base = random.normal(size=60) + labels
    first, second = base + random.normal(size=60) * 0.5, base + random.normal(size=60)
    if ties:
        first, second = np.round(first), np.round(second)
    found = delong(first, second, labels)
    areas, cover = slow_delong(first, second, labels)
    assert [found.first, found.second] == pytest.approx(areas)
    assert [found.first, found.second] == pytest.approx([roc_auc_score(labels, s) for s in (first, second)])
    assert found.variances == pytest.approx((cover[0, 0], cover[1, 1]))
    assert found.covariance == pytest.approx(cover[0, 1])
    spread = math.sqrt(cover[0, 0] + cover[1, 1] - 2 * cover[0, 1])
    gap = areas[0] - areas[1]
    assert found.p == pytest.approx(2 * norm.sf(abs(gap) / spread))
    assert found.difference.low == pytest.approx(gap + norm.ppf(0.025) * spread)
    assert found.difference.high == pytest.approx(gap + norm.ppf(0.975) * spread)


def test_delong_of_equal_rankings() -> None:
    labels = np.array([True, True, False, False, True])
    scores = np.array([3.0, 1.0, 2.0, 0.0, 4.0])
    found = delong(scores, 2 * scores + 1, labels)
    assert (found.p, found.difference.value) == (1.0, 0.0)
    with pytest.raises(ValueError, match="two prompts of each class"):
        delong(scores, scores, np.array([True, False, False, False, False]))
    with pytest.raises(ValueError, match="5 and 4 scores for 5 labels"):
        delong(scores, scores[:4], labels)


def test_thresholds_flag_at_most_the_rate() -> None:
    scores = np.arange(100.0)
    assert threshold_at(scores, 0.01) == 98.0
    assert share_above(scores, 98.0).value == 0.01
    assert threshold_at(scores, 0.29) == 70.0
    assert threshold_at(scores, 0.0) == 99.0
    # Too few negatives for 1 %: none is flagged.
    assert threshold_at([3.0, 1.0, 2.0], 0.01) == 3.0
    # Ties on the border flag fewer, never more.
    assert share_above([1.0, 1.0, 1.0, 0.0], threshold_at([1.0, 1.0, 1.0, 0.0], 0.25)).value == 0
    with pytest.raises(ValueError, match="0 negatives"):
        threshold_at([], 0.01)


def test_shares_have_wilson_intervals() -> None:
    found = share_above([0.9, 0.8, 0.1, math.nan], 0.5)
    # Wilson's interval of 2 of 3, by the formula with z = 1.959964.
    assert (found.value, found.n, found.unscored) == (2 / 3, 3, 1)
    assert (found.low, found.high) == pytest.approx((0.20766, 0.93851), abs=1e-5)


def test_f1_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(2)
    positive, negative = random.normal(size=30) + 1, random.normal(size=50)
    scores, labels = np.concatenate([positive, negative]), np.repeat([1, 0], [30, 50])
    assert f1_score(positive, negative, 0.7) == pytest.approx(sklearn_f1(labels, scores > 0.7))
    assert math.isnan(f1_score([], [0.1], 0.5))


def test_calibration_by_hand() -> None:
    p = [0.1, 0.9, 0.3, 0.7]
    rows = reliability(p, [False, True, True, True], bins=2)
    assert [row.predicted for row in rows] == pytest.approx([0.2, 0.8])
    assert [row.observed.value for row in rows] == [0.5, 1.0]
    assert expected_calibration_error(rows) == pytest.approx((0.3 + 0.2) / 2)
    # Five predictions in two bins: three and two, weighted so.
    rows = reliability([0.0, 0.0, 0.0, 1.0, 1.0], [False, False, True, True, False], bins=2)
    assert expected_calibration_error(rows) == pytest.approx((3 * (1 / 3) + 2 * 0.5) / 5)
    assert len(reliability([0.2, 0.4], [True, False])) == 2
    with pytest.raises(ValueError, match="0 probabilities"):
        reliability([], [])
