"""Means, rank correlations and areas under the ROC curve, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from demur.stats._rates import Z_95, Estimate, Numbers, student


def resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `n` prompts is in each bootstrap sample, shape (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def percentiles(value: float, resampled: np.ndarray, n: int, unscored: int = 0) -> Estimate:
    """An estimate with its percentile-bootstrap interval; samples that are nan are left out."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Estimate(value=value, low=float(low), high=float(high), n=n, unscored=unscored)


def bootstrap_mean(
    values: Numbers, weights: Numbers | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Weighted mean over prompts with a percentile-bootstrap 95 % interval; prompts are what is resampled.

    Args:
        values: one for each prompt; nan is unscored.
        weights: of the prompts (their numbers of tokens, say): the mean is `Σ w v / Σ w`. Weight 0 is unscored.
        resamples: number of bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: values and weights of different lengths.
    """
    numbers = np.asarray(values, dtype=np.float64)
    given = np.ones_like(numbers) if weights is None else np.asarray(weights, dtype=np.float64)
    if numbers.shape != given.shape or numbers.ndim != 1:
        raise ValueError(f"cannot weight values of shape {numbers.shape} with {given.shape}")
    known = ~np.isnan(numbers) & (given > 0)
    n, unscored = int(known.sum()), int((~known).sum())
    if n == 0:
        return Estimate.unknown(unscored)
    numbers, given = numbers[known], given[known]
    counts = resampled(n, resamples, seed)
    means = counts @ (numbers * given) / (counts @ given)
    return percentiles(float(np.average(numbers, weights=given)), means, n, unscored)


def mean_of_runs(values: Sequence[float], *, n: int) -> Estimate:
    """Mean over a few runs, each a number of its own, with Student's 95 % interval (infinite for one run).

    Args:
        values: one for each run.
        n: what each run was measured on, for the record.
    """
    numbers = np.asarray(values, dtype=np.float64)
    runs, value, half = len(numbers), float(numbers.mean()), math.inf
    if runs > 1:
        half = student(runs - 1) * float(numbers.std(ddof=1)) / math.sqrt(runs)
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation, ties at their average rank.

    Pairs in which either value is nan are left out. The result is nan where fewer than two pairs are left, or
    where one side is constant.

    Raises:
        ValueError: the two are not one-dimensional and of one length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"cannot correlate shapes {first.shape} and {second.shape}")
    known = ~(np.isnan(first) | np.isnan(second))
    return float(_rank_correlation(first[None, known], second[None, known])[0])


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of `a` with that of `b`, nan where a row is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(side, axis=1) - (side.shape[1] + 1) / 2 for side in (a, b))
    norm = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.where(norm > 0, (x * y).sum(1) / np.where(norm > 0, norm, 1.0), math.nan)


def spearman_over_prompts(a: np.ndarray, b: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Rank correlation over features of two tables' means over prompts, with a 95 % interval.

    Args:
        a: scores by one method, shape (prompt, feature), finite.
        b: scores by another, of the same shape.
        resamples: bootstrap samples of the prompts.
        seed: of the bootstrap.

    Raises:
        ValueError: the two are not tables of one shape.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"cannot correlate shapes {a.shape} and {b.shape}")
    n = len(a)
    if n == 0:
        return Estimate.unknown()
    counts = resampled(n, resamples, seed) / n
    return percentiles(spearman(a.mean(0), b.mean(0)), _rank_correlation(counts @ a, counts @ b), n)


def auroc(positive: Numbers, negative: Numbers, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Chance that a positive scores above a negative, ties one half, with a 95 % interval; nan is unscored.

    The interval is the union of two. The stratified bootstrap's makes no assumption on the scores, but is too narrow
    for few of them and has no width where they are perfectly separated. Newcombe's (2006, Stat. Med. 25:559, method 5)
    inverts a score test with Hanley and McNeil's variance: it always has width, and with few scores errs on the wide
    side.

    Args:
        positive: scores of the class that should score high.
        negative: scores of the other class.
        resamples: number of bootstrap samples.
        seed: of the bootstrap.
    """
    high, low = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    unscored = int(np.isnan(high).sum() + np.isnan(low).sum())
    high, low = high[~np.isnan(high)], low[~np.isnan(low)]
    n = len(high) + len(low)
    if min(len(high), len(low)) == 0:
        return Estimate.unknown(unscored).model_copy(update={"n": n})
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    counts = resampled(len(high), resamples, seed) @ wins, resampled(len(low), resamples, seed + 1)
    found = percentiles(float(wins.mean()), (counts[0] * counts[1]).sum(1) / wins.size, n, unscored)
    floor, ceiling = _auroc_limits(found.value, len(high), len(low))
    return found.model_copy(update={"low": min(found.low, floor), "high": max(found.high, ceiling)})


def _auroc_limits(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """The areas that a score test with Hanley and McNeil's variance would not reject at 5 %."""
    from scipy.optimize import brentq

    # Newcombe puts the mean of the two counts in place of each, so that either class may be the positive one.
    star = (positives + negatives) / 2 - 1

    def gap(x: float) -> float:
        spread = x * (1 - x) * (1 + star * ((1 - x) / (2 - x) + x / (1 + x))) / (positives * negatives)
        return (x - area) ** 2 - Z_95 * Z_95 * spread

    # The gap is negative at the area and positive at 0 and 1; where the area is one of these, it is zero there and
    # negative just inside, and that end is exactly the area.
    low = 0.0 if area == 0 else cast("float", brentq(gap, 0.0, min(area, 1 - 1e-9)))
    high = 1.0 if area == 1 else cast("float", brentq(gap, max(area, 1e-9), 1.0))
    return low, high
