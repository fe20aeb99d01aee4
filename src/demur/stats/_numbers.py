"""Numbers: means, rank correlations, areas under the ROC curve and trade-off curves, prompts resampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np

from demur.stats._outcomes import Z_95, Estimate, Numbers, student
from demur.types import Value


def _resampled(n: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each of `n` prompts is in each bootstrap sample, shape (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def _percentiles(value: float, resampled: np.ndarray, n: int, unscored: int = 0) -> Estimate:
    """An estimate with its percentile-bootstrap interval; samples that are nan are left out."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Estimate(value=value, low=float(low), high=float(high), n=n, unscored=unscored)


def bootstrap_mean(
    values: Numbers, weights: Numbers | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Weighted mean over prompts, `Σ w v / Σ w`, with a percentile-bootstrap 95 % interval: prompts are resampled.

    A value of nan and a weight of 0 are unscored. Weights are numbers of tokens, say. Raises ValueError: values and
    weights of different lengths.
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
    counts = _resampled(n, resamples, seed)
    means = counts @ (numbers * given) / (counts @ given)
    return _percentiles(float(np.average(numbers, weights=given)), means, n, unscored)


def mean_of_runs(values: Sequence[float], *, n: int) -> Estimate:
    """Mean over a few runs, each a number measured on `n`, with Student's 95 % interval (infinite for one run)."""
    numbers, runs = np.asarray(values, dtype=np.float64), len(values)
    half = student(runs - 1) * float(numbers.std(ddof=1)) / math.sqrt(runs) if runs > 1 else math.inf
    value = float(numbers.mean())
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation, ties at their average rank; pairs in which either value is nan are left out.

    The result is nan where fewer than two pairs are left, or where one side is constant. Raises ValueError: the two are
    not one-dimensional and of one length.
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


def spearman_over_prompts(a: np.ndarray, b: np.ndarray, *, resamples: int = 1000) -> Estimate:
    """Rank correlation over features of two tables' means over prompts, with a 95 % interval. Each table holds the
    finite scores by one method, shape (prompt, feature). Raises ValueError: the two are not tables of one shape."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"cannot correlate shapes {a.shape} and {b.shape}")
    n = len(a)
    if n == 0:
        return Estimate.unknown()
    counts = _resampled(n, resamples) / n
    return _percentiles(spearman(a.mean(0), b.mean(0)), _rank_correlation(counts @ a, counts @ b), n)


def auroc(positive: Numbers, negative: Numbers, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Chance that a positive scores above a negative, ties one half, with a 95 % interval; nan is unscored.

    The interval is the union of two. The stratified bootstrap's makes no assumption on the scores, but is too narrow
    for few of them and has no width where they are perfectly separated. Newcombe's (2006, Stat. Med. 25:559, method 5)
    inverts a score test with Hanley and McNeil's variance: it always has width, and with few scores errs on the wide
    side.
    """
    high, low = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    unscored = int(np.isnan(high).sum() + np.isnan(low).sum())
    high, low = high[~np.isnan(high)], low[~np.isnan(low)]
    n = len(high) + len(low)
    if min(len(high), len(low)) == 0:
        return Estimate.unknown(unscored).model_copy(update={"n": n})
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    counts = _resampled(len(high), resamples, seed) @ wins, _resampled(len(low), resamples, seed + 1)
    found = _percentiles(float(wins.mean()), (counts[0] * counts[1]).sum(1) / wins.size, n, unscored)
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


Reading = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""Costs, successes and a cost → what a curve is worth there."""


class TradeOff(NamedTuple):
    """What each setting of a method costs, and what it achieves on each prompt.

    `cost` is its side effect, shape (setting,); the clean model is a setting of cost 0. `outcomes`, shape (setting,
    prompt), are successes: 1, 0, a mean over sets, or nan (unscored).
    """

    cost: np.ndarray
    outcomes: np.ndarray


class CurveGap(Value):
    """Two curves read in the same way, and how far they are apart: `difference` is the first less the second. `p` is
    two-sided: twice the share of bootstrap samples on the other side of 0, the observed one among them."""

    first: Estimate
    second: Estimate
    difference: Estimate
    p: float


def value_at(cost: np.ndarray, success: np.ndarray, at: float) -> np.ndarray:
    """The most success, shape (...), that costs at most `at`: linear between the best settings, level after the last.

    `cost` has the shape (setting,), `success` (..., setting). Settings that cost more than another and achieve less do
    not count. nan below the least cost.
    """
    x, y = _best(cost, success)
    place = int(np.searchsorted(x, at, side="right"))
    if place == 0:
        return np.full(y.shape[:-1], math.nan)
    if place == len(x):
        return np.asarray(y[..., -1])
    share = (at - x[place - 1]) / (x[place] - x[place - 1])
    return np.asarray((1 - share) * y[..., place - 1] + share * y[..., place])


def area_under(cost: np.ndarray, success: np.ndarray, upto: float) -> np.ndarray:
    """Mean success, shape (...), from the least cost to `upto`, on the curve that `value_at` reads; nan without such a
    range. `cost` has the shape (setting,), `success` (..., setting)."""
    x, y = _best(cost, success)
    if not upto > x[0]:
        return np.full(y.shape[:-1], math.nan)
    inside = x < upto
    x, y = np.append(x[inside], upto), np.append(y[..., inside], value_at(x, y, upto)[..., None], axis=-1)
    return np.asarray(((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(-1) / (upto - x[0]))


def _best(cost: np.ndarray, success: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs, ascending and each once, and the best success up to each."""
    order = np.argsort(cost, kind="stable")
    x, y = cost[order], np.fmax.accumulate(success[..., order], axis=-1)
    last = np.append(np.diff(x) > 0, True)
    return x[last], y[..., last]


def compare_curves(
    first: TradeOff, second: TradeOff, cost: float, read: Reading = value_at, *, resamples: int = 2000
) -> CurveGap:
    """Two curves on the same prompts, in one order, both read at one cost. Prompts are resampled, costs are not.

    `read` is `value_at`, success at that cost, or `area_under`, mean success up to it. Raises ValueError: the curves
    are on different numbers of prompts.
    """
    n = first.outcomes.shape[1]
    if second.outcomes.shape[1] != n:
        raise ValueError(f"the curves are on different numbers of prompts: {n} and {second.outcomes.shape[1]}")
    counts = np.vstack([np.ones(n), _resampled(n, resamples)])
    a, b = (read(each.cost, _shares(each.outcomes, counts), cost) for each in (first, second))
    gaps = (a - b)[1:]
    tail = min((gaps <= 0).sum(), (gaps >= 0).sum())
    p = math.nan if np.isnan(a[0] - b[0]) else min(1.0, 2 * (1 + float(tail)) / (1 + resamples))
    one, two, apart = (_percentiles(float(each[0]), each[1:], n) for each in (a, b, a - b))
    return CurveGap(first=one, second=two, difference=apart, p=p)


def _shares(outcomes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean success of each setting in each bootstrap sample, shape (sample, setting); nan where nothing is scored."""
    known = ~np.isnan(outcomes)
    scored = counts @ known.T
    return np.where(scored > 0, counts @ np.where(known, outcomes, 0.0).T / np.maximum(scored, 1.0), math.nan)
