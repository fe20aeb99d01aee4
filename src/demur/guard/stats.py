"""How well scores detect: thresholds at a given false-positive rate, paired AUROCs, calibration.

Scores are higher for positives. A prompt is flagged where its score is *above* the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from demur.stats import Estimate, Numbers, wilson
from demur.types import Value


def threshold_at(negatives: Numbers, fpr: float) -> float:
    """The lowest threshold that flags at most a share `fpr` of the negatives. With fewer than `1 / fpr` of them that is
    their maximum: none of them is flagged, and the rate on others may be higher. Raises ValueError: no negatives, or a
    rate outside 0 to 1."""
    scores = np.sort(np.asarray(negatives, dtype=np.float64))[::-1]
    if len(scores) == 0 or not 0 <= fpr < 1:
        raise ValueError(f"cannot set a threshold at a false-positive rate of {fpr} on {len(scores)} negatives")
    # 0.29 * 100 is 28.999…, which must still allow 29.
    return float(scores[math.floor(fpr * len(scores) + 1e-9)])


def share_above(scores: Numbers, threshold: float) -> Estimate:
    """The share of prompts that are flagged, with its Wilson interval; nan is unscored."""
    found = np.asarray(scores, dtype=np.float64)
    known = found[~np.isnan(found)]
    return Estimate.of(wilson(int((known > threshold).sum()), len(known), len(found) - len(known)))


def f1_score(positives: Numbers, negatives: Numbers, threshold: float) -> float:
    """Harmonic mean of precision and recall of what is flagged; nan where nothing is positive or flagged."""
    hits, alarms = (int((np.asarray(side) > threshold).sum()) for side in (positives, negatives))
    wanted = 2 * hits + alarms + (len(positives) - hits)
    return 2 * hits / wanted if wanted else math.nan


class DelongTest(Value):
    """Two scores' AUROCs on the same prompts. `variances` are DeLong's, `covariance` between the two; `difference` is
    the first less the second with its normal interval, `p` two-sided (1 where the two rank alike)."""

    first: float
    second: float
    variances: tuple[float, float]
    covariance: float
    difference: Estimate
    p: float


def delong(first: Numbers, second: Numbers, labels: Sequence[bool] | np.ndarray) -> DelongTest:
    """DeLong, DeLong and Clarke-Pearson's test (1988) of two correlated AUROCs, by mid-ranks (Sun and Xu, 2014). Raises
    ValueError: the three differ in length, or a class has fewer than two prompts."""
    from scipy.special import ndtr

    positive = np.asarray(labels, dtype=bool)
    if {len(first), len(second)} != {len(positive)}:
        raise ValueError(f"{len(first)} and {len(second)} scores for {len(positive)} labels")
    scores = np.array([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)])
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise ValueError(f"DeLong's test needs two prompts of each class; there are {m} positive and {n} negative ones")
    won, kept = _placements(scores, positive)
    areas = won.mean(1)
    cover = np.cov(won) / m + np.cov(kept) / n
    gap = float(areas[0] - areas[1])
    variance = float(cover[0, 0] + cover[1, 1] - 2 * cover[0, 1])
    spread = math.sqrt(max(variance, 0.0))
    # Scores that rank alike leave a variance of rounding.
    p = 1.0 if abs(gap) < 1e-12 else 0.0 if spread < 1e-9 else 2 * float(ndtr(-abs(gap) / spread))
    half = 1.959963984540054 * spread
    difference = Estimate(value=gap, low=max(gap - half, -1.0), high=min(gap + half, 1.0), n=m + n)
    return DelongTest(
        first=float(areas[0]),
        second=float(areas[1]),
        variances=(float(cover[0, 0]), float(cover[1, 1])),
        covariance=float(cover[0, 1]),
        difference=difference,
        p=p,
    )


def _placements(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive the share of negatives below it, of each negative the share of positives above it, ties one
    half; shapes (score, positive) and (score, negative)."""
    from scipy.stats import rankdata

    def ranks(table: np.ndarray) -> np.ndarray:
        return np.asarray(rankdata(table, axis=1))

    high, low = scores[:, positive], scores[:, ~positive]
    m, n = high.shape[1], low.shape[1]
    every = ranks(np.concatenate([high, low], 1))
    return (every[:, :m] - ranks(high)) / n, 1 - (every[:, m:] - ranks(low)) / m


class ReliabilityRow(Value):
    """One bin of predictions: their mean, the share of them that are positive with its Wilson interval."""

    predicted: float
    observed: Estimate


def reliability(probabilities: Numbers, labels: Sequence[bool] | np.ndarray, bins: int = 10) -> list[ReliabilityRow]:
    """Predictions in bins of equal counts (as nearly as may be), lowest first. Raises ValueError: no predictions, or
    labels of another number."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=bool)
    if len(p) == 0 or len(p) != len(y):
        raise ValueError(f"{len(p)} probabilities for {len(y)} labels")
    order = np.argsort(p, kind="stable")
    parts = np.array_split(order, min(bins, len(p)))
    return [
        ReliabilityRow(predicted=float(p[part].mean()), observed=Estimate.of(wilson(int(y[part].sum()), len(part))))
        for part in parts
    ]


def expected_calibration_error(rows: Sequence[ReliabilityRow]) -> float:
    """Mean distance between what is predicted and what comes true, over bins weighted by their counts."""
    counts = np.array([row.observed.n for row in rows], dtype=np.float64)
    gaps = np.array([abs(row.predicted - row.observed.value) for row in rows])
    return float(gaps @ counts / counts.sum())
