"""Differences on the same prompts, and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self, cast

import numpy as np

from demur.stats._rates import (
    Estimate,
    Numbers,
    Outcomes,
    crossed_mean,
    effective_answers,
    outcome_table,
    student,
    wilson_interval,
)
from demur.types import Value


class PairedTest(Value):
    """Two methods on the same prompts, compared by the exact McNemar test."""

    n: int
    """Prompts scored under both methods."""
    only_first: int
    """Prompts on which the first method alone had the outcome."""
    only_second: int
    p: float
    """Two-sided exact p value: a fair coin on the discordant pairs (1 when there are none)."""


def mcnemar(first: Outcomes, second: Outcomes) -> PairedTest:
    """Exact McNemar test; a prompt that is unscored in either is left out.

    Raises:
        ValueError: the two have different lengths.
    """
    from scipy.special import bdtr

    a, b = outcome_table([first, second])
    only_first, only_second = int((a > b).sum()), int((a < b).sum())
    p = min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))
    return PairedTest(n=int((~np.isnan(a - b)).sum()), only_first=only_first, only_second=only_second, p=p)


def paired_difference(first: Outcomes, second: Outcomes) -> Estimate:
    """Share of `True` in `first` less that in `second`, with Newcombe's paired 95 % interval.

    Method 10 of Newcombe (1998, Stat. Med. 17:2635): the Wilson limits of both shares, put together by their
    correlation over the pairs. It stays within -1 and 1, and keeps its width where the methods agree everywhere or
    nowhere. A prompt that is unscored in either is unscored; with no pair left all three numbers are nan.

    Raises:
        ValueError: the two have different lengths.
    """
    return crossed_difference(first, [second])[0]


def crossed_difference(first: Outcomes, runs: Sequence[Outcomes]) -> tuple[Estimate, float]:
    """One run against several drawn at random, on the same prompts: the mean difference and its two-sided p value.

    How does the run `first`, taken as it is, differ from the mean over all runs that could have been drawn, on all such
    prompts? The difference is the mean of `first[prompt] - runs[run][prompt]` over the scored pairs (`n` of them). Its
    interval is Newcombe's for pairs, as in `paired_difference`, with the limits of `clustered_rate` for the runs.

    p is the larger of two: the level at which that interval would end at 0, and that of flipping the sign of each
    prompt's mean difference. The second alone takes the runs as given, and rejects far too often; the first alone
    is too sure of a few prompts. With one scored run p is McNemar's. With nothing scored all is nan.

    Raises:
        ValueError: runs of different lengths.
    """
    both = outcome_table([first, *runs])
    gaps = both[0] - both[1:]
    known = ~np.isnan(gaps)
    n, unscored = int(known.sum()), int((~known).sum())
    if n == 0:
        return Estimate.unknown(unscored), math.nan
    own, table = np.where(known, both[0], math.nan), np.where(known, both[1:], math.nan)
    pairs = _Pairs.of(own, table)
    low, high = pairs.limits()
    if known.any(1).sum() == 1:
        run = int(known.any(1).argmax())
        p = mcnemar(own[run], table[run]).p
    else:
        p = pairs.p_value(sign_flip_p(np.where(known, gaps, 0.0).sum(0) / np.maximum(known.sum(0), 1)))
    return Estimate(value=pairs.p - pairs.q, low=low, high=high, n=n, unscored=unscored), p


class _Pairs(NamedTuple):
    """Shares `p` of `n` prompts and `q`, worth `effective` answers, of runs on the same prompts; their correlation."""

    p: float
    n: int
    q: float
    effective: float
    freedom: float
    phi: float

    @classmethod
    def of(cls, own: np.ndarray, table: np.ndarray) -> Self:
        """From tables of runs by prompts that are scored at the same places.

        The correlation is first that of answers, in the fourfold table in which each prompt counts as one, spread over
        its runs. What the runs add to the variance of their share is no part of `own`, so the shares correlate less.
        The prompts' part of that variance largely cancels; what is left has the differences' degrees of freedom.
        """
        known = ~np.isnan(table)
        n, effective = int(known.any(0).sum()), effective_answers(table)
        weight = known / np.maximum(known.sum(0), 1)
        first, second = own == 1, table == 1
        cells = (first & second, first & ~second, ~first & second)
        both, only_first, only_second = (float((weight * cell).sum()) for cell in cells)
        neither = n - both - only_first - only_second
        margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
        cross = both * neither - only_first * only_second
        if cross > 0:
            # Newcombe's continuity correction.
            cross = max(cross - n / 2, 0.0)
        phi = cross / math.sqrt(margins) * math.sqrt(effective / n) if margins > 0 else 0.0
        freedom = min(crossed_mean(own - table)[2], crossed_mean(table)[2])
        return cls(float(own[known].mean()), n, float(table[known].mean()), effective, freedom, phi)

    def limits(self, level: float = 0.05) -> tuple[float, float]:
        """Ends of the interval of `p - q` that misses in a share `level` of cases (Newcombe's method 10)."""
        p, q = self.p, self.q
        p_low, p_high = wilson_interval(p, self.n, student(math.inf, level))
        q_low, q_high = wilson_interval(q, self.effective, student(self.freedom, level))
        below, above = (p - p_low, q_high - q), (p_high - p, q - q_low)
        low, high = (math.sqrt(max(a * a - 2 * self.phi * a * b + b * b, 0.0)) for a, b in (below, above))
        return max(p - q - low, -1.0), min(p - q + high, 1.0)

    def p_value(self, least: float) -> float:
        """The level at which the interval ends at 0, and `least` where that is greater."""
        from scipy.optimize import brentq

        end = 0 if self.p > self.q else 1

        def gap(level: float) -> float:
            return self.limits(level)[end]

        return cast("float", brentq(gap, least, 1.0)) if gap(least) * (self.p - self.q) < 0 else least


def sign_flip_p(differences: Numbers, *, resamples: int = 10000, seed: int = 0) -> float:
    """Two-sided p value of a paired permutation test: the sign of each prompt's difference is a fair coin.

    All sign patterns are gone through where there are no more of them than `resamples`; otherwise that many are drawn
    and the observed one counts as one more, so that p is never 0. Zeros and nan say nothing and are left out.
    """
    found = np.asarray(differences, dtype=np.float64)
    found = found[~np.isnan(found) & (found != 0)]
    if len(found) == 0:
        return 1.0
    # Sums of the same numbers in another order differ in the last bits.
    seen = abs(found.sum()) - 1e-12 * float(np.abs(found).sum())
    if 2 ** len(found) <= resamples:
        patterns = np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1
        return float((np.abs((1 - 2 * patterns) @ found) >= seen).mean())
    flipped = np.random.default_rng(seed).integers(2, size=(resamples, len(found)), dtype=np.uint8)
    sums = found.sum() - 2 * (flipped.astype(np.float64) @ found)
    return float((1 + (np.abs(sums) >= seen).sum()) / (resamples + 1))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment: the chance of one false finding among all stays below the level.

    nan (no test) is passed through and does not count.
    """
    p = np.array(p_values, dtype=np.float64)
    tests = int((~np.isnan(p)).sum())
    order = np.argsort(p)[:tests]  # nan comes last
    p[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(tests, 0, -1), 1.0))
    return tuple(p.tolist())


class OneMoreDraw(Value):
    """Whether a value could be one more of those drawn at random."""

    p: float
    """Two-sided: the share of all draws, the value among them, that lie at least as far from their mean."""
    low: float
    """95 % interval for one more draw; infinite for a single draw."""
    high: float


def one_more_draw(value: float, draws: Sequence[float], *, n: int | None = None) -> OneMoreDraw:
    """Could `value`, that of F* say, be one more of `draws`, the values of random sets? Not, if it lies outside the
    interval, and p is small.

    p is exact where the value is exchangeable with the draws: `(1 + draws at least as extreme) / (1 + draws)`, so 19
    draws are needed for .05. The interval is Student's prediction interval, which takes the draws as normal.

    Args:
        value: that is asked about.
        draws: values of the same kind.
        n: for rates, the number of prompts behind each: the interval then stays within 0 and 1, and is no narrower than
            chance answers to that many prompts make it (draws that are all 0 do not show that the next one is).

    Raises:
        ValueError: there is no draw.
    """
    found = np.array(draws, dtype=np.float64)
    m = len(found)
    if m == 0:
        raise ValueError("there is no draw to compare with")
    everything = np.append(found, value)
    far = np.abs(everything - everything.mean())
    p = float((far >= far[-1] - 1e-12).mean())
    mean, spread = float(found.mean()), float(found.std(ddof=1)) if m > 1 else math.inf
    if n is not None:
        shrunk = (mean * m * n + 2) / (m * n + 4)
        spread = max(spread, math.sqrt(shrunk * (1 - shrunk) / n))
    half = student(m - 1) * spread * math.sqrt(1 + 1 / m) if m > 1 else math.inf
    low, high = mean - half, mean + half
    return OneMoreDraw(p=p, low=low, high=high) if n is None else OneMoreDraw(p=p, low=max(low, 0), high=min(high, 1))
