"""Rates with 95 % intervals, of one run and of several on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from demur.types import Outcome, Rate, Value, Verdict

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""

Outcomes = Sequence[bool | None] | np.ndarray
"""One run: an outcome for each prompt, prompts in one order for all runs."""
Numbers = Sequence[float] | np.ndarray


class Estimate(Value):
    """A number with its 95 % interval; `n` counts what it was measured on, `unscored` what could not be."""

    value: float
    low: float
    high: float
    n: int
    unscored: int = 0

    @classmethod
    def of(cls, rate: Rate) -> Estimate:
        """A rate as an estimate."""
        return cls(value=rate.value, low=rate.low, high=rate.high, n=rate.n, unscored=rate.unscored)

    @classmethod
    def unknown(cls, unscored: int = 0) -> Estimate:
        """Of nothing scored: all three numbers are nan."""
        return cls(value=math.nan, low=math.nan, high=math.nan, n=0, unscored=unscored)


def wilson(k: int, n: int, unscored: int = 0) -> Rate:
    """`k` of `n` with its Wilson 95 % score interval.

    With `n = 0` nothing is known: the interval is 0 to 1 and the rate's value is nan.

    Raises:
        ValueError: not `0 <= k <= n`, or `unscored` is negative.
    """
    if not 0 <= k <= n or unscored < 0:
        raise ValueError(f"k={k} of n={n} with {unscored} unscored is not a count of outcomes")
    low, high = wilson_interval(k / n, n) if n else (0.0, 1.0)
    return Rate(k=k, n=n, unscored=unscored, low=low, high=high)


def wilson_interval(p: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's interval of a share `p` of `n`, which need not be a whole number, at the quantile `z`."""
    z2 = z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At a share of 0 or 1 one end is exactly that; rounding must not leave it a hair inside or outside.
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))


def rate_of(verdicts: Iterable[Verdict], outcomes: Outcome | Iterable[Outcome]) -> Rate:
    """The rate of verdicts with one of `outcomes`; those without an outcome are unscored, not in `n`."""
    wanted = {outcomes} if isinstance(outcomes, Outcome) else set(outcomes)
    found = [verdict.outcome for verdict in verdicts]
    scored = [outcome for outcome in found if outcome is not None]
    hits = sum(outcome in wanted for outcome in scored)
    return wilson(hits, len(scored), unscored=len(found) - len(scored))


def clustered_rate(outcomes: Sequence[Outcomes]) -> Estimate:
    """The share of `True` over several runs, such as random sets of features, on the same prompts.

    Both the prompts and the runs are samples, crossed: answers to one prompt are alike, and so are those of one run.
    The interval is Wilson's with two changes. The number of answers is the effective one, `p (1 - p) / v`, where `v` is
    the two-way variance of the share (Cameron, Gelbach and Miller 2011, never less than that of the runs or of the
    prompts alone), and it is at most the number of prompts: with few runs and rare events `v` often comes out too small
    (coverage fell to .87). The normal quantile is Student's, with Satterthwaite's degrees of freedom. One run has its
    Wilson interval.

    Raises:
        ValueError: runs of different lengths.
    """
    table = outcome_table(outcomes)
    known = ~np.isnan(table)
    n, unscored = int(known.sum()), int((~known).sum())
    if n == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0, n=0, unscored=unscored)
    share, _, freedom = crossed_mean(table)
    low, high = wilson_interval(share, effective_answers(table), student(freedom))
    return Estimate(value=share, low=low, high=high, n=n, unscored=unscored)


def effective_answers(table: np.ndarray) -> float:
    """How many independent answers a table of runs by prompts is worth: 1 to the number of prompts."""
    prompts = int((~np.isnan(table)).any(0).sum())
    share, variance, _ = crossed_mean(table)
    return min(max(share * (1 - share) / variance, 1.0), prompts) if variance > 0 else prompts


def outcome_table(runs: Sequence[Outcomes]) -> np.ndarray:
    """Outcomes as 1, 0 and nan, one row for each run."""
    if len(lengths := sorted({len(run) for run in runs})) > 1:
        raise ValueError(f"runs have different numbers of prompts: {', '.join(map(str, lengths))}")
    return np.array(runs, dtype=np.float64).reshape(len(runs), lengths[0] if lengths else 0)


def crossed_mean(table: np.ndarray) -> tuple[float, float, float]:
    """Mean of a table of runs by prompts (nan: unscored), its two-way variance and Satterthwaite's degrees of freedom.

    The variance is `v_prompts + v_runs - v_answers`: each part as if that alone were sampled, and the answers are in
    both others. Without variance the degrees of freedom are infinite.
    """
    known = ~np.isnan(table)
    n = int(known.sum())
    mean = float(table[known].sum()) / n
    if known.any(1).sum() == 1:
        return mean, 0.0, math.inf
    gaps = np.where(known, table - mean, 0.0)
    alone = float((gaps * gaps).sum()) / n**2
    by_prompt, prompts = _cluster_variance(gaps, known, 0)
    by_run, runs = _cluster_variance(gaps, known, 1)
    # What rounding leaves of sums that cancel is no variance.
    by_prompt, by_run = (0.0 if part <= 1e-12 * alone else part for part in (by_prompt, by_run))
    variance = max(by_prompt + by_run - alone, by_prompt, by_run)
    parts = sum(part**2 / (m - 1) for part, m in ((by_prompt, prompts), (by_run, runs)) if part > 0)
    return mean, variance, max(variance**2 / parts, 1.0) if parts > 0 else math.inf


def _cluster_variance(gaps: np.ndarray, known: np.ndarray, axis: int) -> tuple[float, int]:
    """Variance of the mean when its clusters, summed along `axis`, are what was sampled; and how many there are.

    `gaps` are distances from the mean, 0 where unscored.
    """
    sums = gaps.sum(axis)[known.any(axis)]
    m = len(sums)
    return (float((sums @ sums) / known.sum() ** 2 * m / (m - 1)) if m > 1 else 0.0), m


def student(freedom: float, level: float = 0.05) -> float:
    """The two-sided quantile of Student's t; with infinite degrees of freedom it is the normal one."""
    from scipy.special import stdtrit

    return Z_95 if math.isinf(freedom) and level == 0.05 else float(stdtrit(freedom, 1 - level / 2))
