"""Trade-off curves: what a method achieves at which cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from demur.stats._means import percentiles, resampled
from demur.stats._rates import Estimate
from demur.types import Value


class TradeOff(NamedTuple):
    """What each setting of a method costs, and what it achieves on each prompt.

    Attributes:
        cost: side effect of each setting, shape (setting,); the clean model is a setting of cost 0.
        outcomes: success, shape (setting, prompt): 1, 0, a mean over sets, or nan (unscored).
    """

    cost: np.ndarray
    outcomes: np.ndarray


class CurveGap(Value):
    """Two curves read in the same way, and how far they are apart."""

    first: Estimate
    second: Estimate
    difference: Estimate
    """First less second."""
    p: float
    """Two-sided, of the bootstrap: twice the share of samples on the other side of 0, the observed one among them."""


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
    range. `cost` has the shape (setting,), `success` (..., setting).
    """
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
    first: TradeOff,
    second: TradeOff,
    cost: float,
    read: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = value_at,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> CurveGap:
    """Two curves on the same prompts, both read at one cost. Prompts are resampled; costs are taken as measured.

    Args:
        first: of one method.
        second: of another, on the same prompts in the same order.
        cost: where both are read.
        read: `value_at`, success at that cost, or `area_under`, mean success up to it.
        resamples: number of bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: the curves are on different numbers of prompts.
    """
    n = first.outcomes.shape[1]
    if second.outcomes.shape[1] != n:
        raise ValueError(f"the curves are on different numbers of prompts: {n} and {second.outcomes.shape[1]}")
    counts = np.vstack([np.ones(n), resampled(n, resamples, seed)])
    a, b = (read(each.cost, _shares(each.outcomes, counts), cost) for each in (first, second))
    gaps = (a - b)[1:]
    tail = min((gaps <= 0).sum(), (gaps >= 0).sum())
    p = math.nan if np.isnan(a[0] - b[0]) else min(1.0, 2 * (1 + float(tail)) / (1 + resamples))
    one, two, apart = (percentiles(float(each[0]), each[1:], n) for each in (a, b, a - b))
    return CurveGap(first=one, second=two, difference=apart, p=p)


def _shares(outcomes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean success of each setting in each bootstrap sample, shape (sample, setting); nan where nothing is scored."""
    known = ~np.isnan(outcomes)
    scored = counts @ known.T
    return np.where(scored > 0, counts @ np.where(known, outcomes, 0.0).T / np.maximum(scored, 1.0), math.nan)
