"""Rates, means and differences with 95 % intervals, tests, and trade-off curves.

Outcomes are `True`, `False` or `None` (unscored: counted, never guessed); in arrays 1, 0 and nan. scipy is imported
only where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

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
        return cls(value=rate.value, low=rate.low, high=rate.high, n=rate.n, unscored=rate.unscored)

    @classmethod
    def unknown(cls, unscored: int = 0) -> Estimate:
        """Of nothing scored: all three numbers are nan."""
        return cls(value=math.nan, low=math.nan, high=math.nan, n=0, unscored=unscored)


def wilson(k: int, n: int, unscored: int = 0) -> Rate:
    """`k` of `n` with its Wilson 95 % score interval: 0 to 1 with `n = 0`, where the rate's value is nan. Raises
    ValueError: not `0 <= k <= n`, or `unscored` is negative."""
    if not 0 <= k <= n or unscored < 0:
        raise ValueError(f"k={k} of n={n} with {unscored} unscored is not a count of outcomes")
    low, high = _wilson_interval(k / n, n) if n else (0.0, 1.0)
    return Rate(k=k, n=n, unscored=unscored, low=low, high=high)


def _wilson_interval(p: float, n: float, z: float = Z_95) -> tuple[float, float]:
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
    unscored = found.count(None)
    return wilson(sum(outcome in wanted for outcome in found), len(found) - unscored, unscored)


def clustered_rate(outcomes: Sequence[Outcomes]) -> Estimate:
    """The share of `True` over several runs, such as random sets of features, on the same prompts.

    Both the prompts and the runs are samples, crossed: answers to one prompt are alike, and so are those of one run.
    The interval is Wilson's with two changes. The number of answers is the effective one, `p (1 - p) / v`, where `v` is
    the two-way variance of the share (Cameron, Gelbach and Miller 2011, never less than that of the runs or of the
    prompts alone), and it is at most the number of prompts: with few runs and rare events `v` often comes out too small
    (coverage fell to .87). The normal quantile is Student's, with Satterthwaite's degrees of freedom. One run has its
    Wilson interval. Raises ValueError: runs of different lengths.
    """
    table = _outcome_table(outcomes)
    known = ~np.isnan(table)
    n, unscored = int(known.sum()), int((~known).sum())
    if n == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0, n=0, unscored=unscored)
    share, effective, freedom = _crossed_mean(table)
    low, high = _wilson_interval(share, effective, _student(freedom))
    return Estimate(value=share, low=low, high=high, n=n, unscored=unscored)


def _outcome_table(runs: Sequence[Outcomes]) -> np.ndarray:
    """Outcomes as 1, 0 and nan, one row for each run."""
    if len(lengths := sorted({len(run) for run in runs})) > 1:
        raise ValueError(f"runs have different numbers of prompts: {', '.join(map(str, lengths))}")
    return np.array(runs, dtype=np.float64).reshape(len(runs), lengths[0] if lengths else 0)


def _crossed_mean(table: np.ndarray) -> tuple[float, float, float]:
    """Mean of a table of runs by prompts (nan: unscored), how many independent answers it is worth as a share (1 to the
    number of prompts), and Satterthwaite's degrees of freedom.

    The two-way variance is `v_prompts + v_runs - v_answers`: each part as if that alone were sampled, and the answers
    are in both others. Without variance the degrees of freedom are infinite.
    """
    known = ~np.isnan(table)
    n = int(known.sum())
    mean = float(table[known].sum()) / n
    prompts = int(known.any(0).sum())
    if known.any(1).sum() == 1:
        return mean, prompts, math.inf
    gaps = np.where(known, table - mean, 0.0)
    alone = float((gaps * gaps).sum()) / n**2
    clustered = [_cluster_variance(gaps, known, axis) for axis in (0, 1)]
    # What rounding leaves of sums that cancel is no variance.
    by_prompt, by_run = (0.0 if part <= 1e-12 * alone else part for part, _ in clustered)
    variance = max(by_prompt + by_run - alone, by_prompt, by_run)
    if variance <= 0:
        return mean, prompts, math.inf
    parts = sum(part**2 / (m - 1) for part, (_, m) in zip((by_prompt, by_run), clustered, strict=True) if part > 0)
    return mean, min(max(mean * (1 - mean) / variance, 1.0), prompts), max(variance**2 / parts, 1.0)


def _cluster_variance(gaps: np.ndarray, known: np.ndarray, axis: int) -> tuple[float, int]:
    """Variance of the mean when its clusters, summed along `axis`, are what was sampled; and how many there are. `gaps`
    are distances from the mean, 0 where unscored."""
    sums = gaps.sum(axis)[known.any(axis)]
    m = len(sums)
    return (float((sums @ sums) / known.sum() ** 2 * m / (m - 1)) if m > 1 else 0.0), m


def _student(freedom: float, level: float = 0.05) -> float:
    """The two-sided quantile of Student's t; with infinite degrees of freedom it is the normal one."""
    from scipy.special import stdtrit

    return Z_95 if math.isinf(freedom) and level == 0.05 else float(stdtrit(freedom, 1 - level / 2))


def ratio_of(first: Estimate, second: Estimate) -> Estimate:
    """One rate divided by another, with the 95 % interval that their own limits give.

    Donner and Zou (2012, Stat. Methods Med. Res. 21:347), with no correlation between the two: on the same prompts,
    where successes go together, the interval is too wide rather than too narrow. It may end at infinity; without a
    success in `second` there is no ratio (nan). `n` is the smaller of the two.
    """
    a, b = first.value, second.value
    if not (first.n and second.n and b > 0):
        return Estimate.unknown(max(first.unscored, second.unscored))
    below, above = first.low * (2 * a - first.low), first.high * (2 * a - first.high)
    large, small = second.high * (2 * b - second.high), second.low * (2 * b - second.low)
    low = below / (a * b + math.sqrt(max((a * b) ** 2 - below * large, 0.0))) if a > 0 else 0.0
    high = (a * b + math.sqrt(max((a * b) ** 2 - above * small, 0.0))) / small if small > 0 else math.inf
    unscored = max(first.unscored, second.unscored)
    return Estimate(value=a / b, low=low, high=high, n=min(first.n, second.n), unscored=unscored)


class PairedTest(Value):
    """Two methods on the same prompts, compared by the exact McNemar test. `n` prompts are scored under both; on
    `only_first` the first method alone had the outcome. `p` is two-sided: a fair coin on the discordant pairs (1 when
    there are none)."""

    n: int
    only_first: int
    only_second: int
    p: float


def mcnemar(first: Outcomes, second: Outcomes) -> PairedTest:
    """Exact McNemar test; a prompt that is unscored in either is left out. Raises ValueError: the two have different
    lengths."""
    from scipy.special import bdtr

    a, b = _outcome_table([first, second])
    only_first, only_second = int((a > b).sum()), int((a < b).sum())
    p = min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))
    return PairedTest(n=int((~np.isnan(a - b)).sum()), only_first=only_first, only_second=only_second, p=p)


def paired_difference(first: Outcomes, second: Outcomes) -> Estimate:
    """Share of `True` in `first` less that in `second`, with Newcombe's paired 95 % interval.

    Method 10 of Newcombe (1998, Stat. Med. 17:2635): the Wilson limits of both shares, put together by their
    correlation over the pairs. It stays within -1 and 1, and keeps its width where the methods agree everywhere or
    nowhere. A prompt that is unscored in either is unscored; with no pair left all three numbers are nan. Raises
    ValueError: the two have different lengths.
    """
    return crossed_difference(first, [second])[0]


def crossed_difference(first: Outcomes, runs: Sequence[Outcomes]) -> tuple[Estimate, float]:
    """One run against several drawn at random, on the same prompts: the mean difference and its two-sided p value.

    How does the run `first`, taken as it is, differ from the mean over all runs that could have been drawn, on all such
    prompts? The difference is the mean of `first[prompt] - runs[run][prompt]` over the scored pairs (`n` of them). Its
    interval is Newcombe's for pairs, as in `paired_difference`, with the limits of `clustered_rate` for the runs.

    p is the larger of two: the level at which that interval would end at 0, and that of flipping the sign of each
    prompt's mean difference. The second alone takes the runs as given, and rejects far too often; the first alone is
    too sure of a few prompts. With one scored run p is McNemar's. With nothing scored all is nan. Raises ValueError:
    runs of different lengths.
    """
    from scipy.optimize import brentq

    both = _outcome_table([first, *runs])
    gaps = both[0] - both[1:]
    known = ~np.isnan(gaps)
    n, unscored = int(known.sum()), int((~known).sum())
    if n == 0:
        return Estimate.unknown(unscored), math.nan
    own, table = np.where(known, both[0], math.nan), np.where(known, both[1:], math.nan)
    value, limits = float(own[known].mean()) - float(table[known].mean()), _pair_limits(own, table)
    low, high = limits(0.05)
    if known.any(1).sum() == 1:
        run = int(known.any(1).argmax())
        p = mcnemar(own[run], table[run]).p
    else:
        p = sign_flip_p(np.where(known, gaps, 0.0).sum(0) / np.maximum(known.sum(0), 1))
        end = 0 if value > 0 else 1
        if limits(p)[end] * value < 0:
            p = cast("float", brentq(lambda level: limits(level)[end], p, 1.0))
    return Estimate(value=value, low=low, high=high, n=n, unscored=unscored), p


def _pair_limits(own: np.ndarray, table: np.ndarray) -> Callable[[float], tuple[float, float]]:
    """Ends of the interval of the difference of shares that misses in a given share of cases (Newcombe's method 10).

    Both are tables of runs by prompts that are scored at the same places. The shares' correlation is first that of
    answers, in the fourfold table in which each prompt counts as one, spread over its runs. What the runs add to the
    variance of their share is no part of `own`, so the shares correlate less. The prompts' part of that variance
    largely cancels; what is left has the differences' degrees of freedom.
    """
    known = ~np.isnan(table)
    n, p = int(known.any(0).sum()), float(own[known].mean())
    q, effective, freedom = _crossed_mean(table)
    freedom = min(_crossed_mean(own - table)[2], freedom)
    weight = known / np.maximum(known.sum(0), 1)
    first, second = own == 1, table == 1
    cells = (first & second, first & ~second, ~first & second)
    both, only_first, only_second = (float((weight * cell).sum()) for cell in cells)
    neither = n - both - only_first - only_second
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    if cross > 0:  # Newcombe's continuity correction.
        cross = max(cross - n / 2, 0.0)
    phi = cross / math.sqrt(margins) * math.sqrt(effective / n) if margins > 0 else 0.0

    def limits(level: float) -> tuple[float, float]:
        p_low, p_high = _wilson_interval(p, n, _student(math.inf, level))
        q_low, q_high = _wilson_interval(q, effective, _student(freedom, level))
        below, above = (p - p_low, q_high - q), (p_high - p, q - q_low)
        low, high = (math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0)) for a, b in (below, above))
        return max(p - q - low, -1.0), min(p - q + high, 1.0)

    return limits


def sign_flip_p(differences: Numbers, *, resamples: int = 10000) -> float:
    """Two-sided p value of a paired permutation test: the sign of each prompt's difference is a fair coin. All sign
    patterns are gone through where there are no more of them than `resamples`; otherwise that many are drawn and the
    observed one counts as one more, so that p is never 0. Zeros and nan say nothing and are left out."""
    found = np.asarray(differences, dtype=np.float64)
    found = found[~np.isnan(found) & (found != 0)]
    if len(found) == 0:
        return 1.0
    # Sums of the same numbers in another order differ in the last bits.
    seen = abs(found.sum()) - 1e-12 * float(np.abs(found).sum())
    if 2 ** len(found) <= resamples:
        patterns = np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1
        return float((np.abs((1 - 2 * patterns) @ found) >= seen).mean())
    flipped = np.random.default_rng(0).integers(2, size=(resamples, len(found)), dtype=np.uint8)
    sums = found.sum() - 2 * (flipped.astype(np.float64) @ found)
    return float((1 + (np.abs(sums) >= seen).sum()) / (resamples + 1))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment: the chance of one false finding among all stays below the level. nan (no test) is
    passed through and does not count."""
    p = np.array(p_values)
    tests = int((~np.isnan(p)).sum())
    order = np.argsort(p)[:tests]  # nan comes last
    p[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(tests, 0, -1), 1.0))
    return tuple(p.tolist())


class OneMoreDraw(Value):
    """Whether a value could be one more of those drawn at random. `p` is the share of all draws, the value among them,
    that lie at least as far from their mean; `low` and `high` are the 95 % interval for one more draw, infinite for a
    single draw."""

    p: float
    low: float
    high: float


def one_more_draw(value: float, draws: Sequence[float], *, n: int | None = None) -> OneMoreDraw:
    """Could `value`, that of F* say, be one more of `draws`, the values of random sets? Not, if it lies outside the
    interval, and p is small.

    p is exact where the value is exchangeable with the draws: `(1 + draws at least as extreme) / (1 + draws)`, so 19
    draws are needed for .05. The interval is Student's prediction interval, which takes the draws as normal. For rates,
    `n` is the number of prompts behind each: the interval then stays within 0 and 1, and is no narrower than chance
    answers to that many prompts make it (draws that are all 0 do not show that the next one is). Raises ValueError:
    there is no draw.
    """
    found = np.array(draws)
    m = len(found)
    if m == 0:
        raise ValueError("there is no draw to compare with")
    far = np.abs(np.append(found, value) - np.append(found, value).mean())
    p = float((far >= far[-1] - 1e-12).mean())
    mean, spread = float(found.mean()), float(found.std(ddof=1)) if m > 1 else math.inf
    if n is not None:
        shrunk = (mean * m * n + 2) / (m * n + 4)
        spread = max(spread, math.sqrt(shrunk * (1 - shrunk) / n))
    half = _student(m - 1) * spread * math.sqrt(1 + 1 / m) if m > 1 else math.inf
    least, most = (-math.inf, math.inf) if n is None else (0, 1)
    return OneMoreDraw(p=p, low=max(mean - half, least), high=min(mean + half, most))


def _resampled(n: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each of `n` prompts is in each bootstrap sample, shape (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def bootstrap_interval(value: float, resampled: np.ndarray, n: int, unscored: int = 0) -> Estimate:
    """An estimate with its percentile-bootstrap interval; samples that are nan are left out."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Estimate(value=value, low=float(low), high=float(high), n=n, unscored=unscored)


def bootstrap_mean(
    values: Numbers, weights: Numbers | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Weighted mean over prompts, `Σ w v / Σ w`, with a percentile-bootstrap 95 % interval: prompts are resampled. A
    value of nan and a weight of 0 are unscored. Weights are numbers of tokens, say. Raises ValueError: values and
    weights of different lengths."""
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
    return bootstrap_interval(float(np.average(numbers, weights=given)), means, n, unscored)


def bootstrap_p(gaps: np.ndarray) -> float:
    """Two-sided p of a difference from its bootstrap samples: twice the share on the other side of 0, the observed one
    among them."""
    tail = min((gaps <= 0).sum(), (gaps >= 0).sum())
    return min(1.0, 2 * (1 + float(tail)) / (1 + len(gaps)))


def bootstrap_of(
    statistic: Callable[..., np.ndarray], *tables: np.ndarray, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """A statistic of means over prompts, with a percentile-bootstrap 95 % interval. Each table has shape (prompt, ...)
    and is resampled by itself; `statistic` takes their means, shape (sample, ...), and gives one number a sample. With
    one table, paired values are columns of it. Tables without rows give an unknown estimate."""
    n = sum(map(len, tables))
    if min(map(len, tables)) == 0:
        return Estimate.unknown()
    value = statistic(*(table.mean(0, keepdims=True) for table in tables))
    draws = (_resampled(len(table), resamples, seed + k) / len(table) for k, table in enumerate(tables))
    means = [np.tensordot(counts, table, 1) for counts, table in zip(draws, tables, strict=True)]
    return bootstrap_interval(float(value[0]), statistic(*means), n)


def mean_of_runs(values: Sequence[float], *, n: int) -> Estimate:
    """Mean over a few runs, each a number measured on `n`, with Student's 95 % interval (infinite for one run)."""
    numbers, runs = np.asarray(values, dtype=np.float64), len(values)
    half = _student(runs - 1) * float(numbers.std(ddof=1)) / math.sqrt(runs) if runs > 1 else math.inf
    value = float(numbers.mean())
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def spearman(a: Numbers, b: Numbers) -> float:
    """Spearman's rank correlation, ties at their average rank; pairs in which either value is nan are left out. The
    result is nan where fewer than two pairs are left, or where one side is constant. Raises ValueError: the two are not
    one-dimensional and of one length."""
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
    return np.divide((x * y).sum(1), norm, out=np.full(len(norm), math.nan), where=norm > 0)


def spearman_over_prompts(a: np.ndarray, b: np.ndarray, *, resamples: int = 1000) -> Estimate:
    """Rank correlation over features of two tables' means over prompts, with a 95 % interval. Each table holds the
    finite scores by one method, shape (prompt, feature). Raises ValueError: the two are not tables of one shape."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"cannot correlate shapes {a.shape} and {b.shape}")
    n = len(a)
    if n == 0:
        return Estimate.unknown()
    counts = _resampled(n, resamples)
    return bootstrap_interval(spearman(a.mean(0), b.mean(0)), _rank_correlation(counts @ a, counts @ b), n)


def auroc(positive: Numbers, negative: Numbers, *, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Chance that a positive scores above a negative, ties one half, with a 95 % interval; nan is unscored.

    The interval is the union of two. The stratified bootstrap's makes no assumption on the scores, but is too narrow
    for few of them and has no width where they are perfectly separated. Newcombe's (2006, Stat. Med. 25:559, method 5)
    inverts a score test with Hanley and McNeil's variance: it always has width, and with few scores errs on the wide
    side.
    """
    high, low = np.asarray(positive), np.asarray(negative)
    unscored = int(np.isnan(high).sum() + np.isnan(low).sum())
    high, low = high[~np.isnan(high)], low[~np.isnan(low)]
    n = len(high) + len(low)
    if min(len(high), len(low)) == 0:
        return Estimate.unknown(unscored).model_copy(update={"n": n})
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    counts = _resampled(len(high), resamples, seed) @ wins, _resampled(len(low), resamples, seed + 1)
    found = bootstrap_interval(float(wins.mean()), (counts[0] * counts[1]).sum(1) / wins.size, n, unscored)
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


class TradeOff(NamedTuple):
    """What each setting of a method costs, and what it achieves on each prompt. `cost` is its side effect, shape
    (setting,); the clean model is a setting of cost 0. `outcomes`, shape (setting, prompt), are successes: 1, 0, a mean
    over sets, or nan (unscored)."""

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
    not count. nan below the least cost."""
    # Costs, ascending and each once, and the best success up to each.
    order = np.argsort(cost, kind="stable")
    x, y = cost[order], np.fmax.accumulate(success[..., order], axis=-1)
    last = np.append(np.diff(x) > 0, True)
    x, y = x[last], y[..., last]
    place = int(np.searchsorted(x, at, side="right"))
    if place == 0:
        return np.full(y.shape[:-1], math.nan)
    if place == len(x):
        return np.asarray(y[..., -1])
    share = (at - x[place - 1]) / (x[place] - x[place - 1])
    return np.asarray((1 - share) * y[..., place - 1] + share * y[..., place])


def compare_curves(first: TradeOff, second: TradeOff, cost: float, *, resamples: int = 2000) -> CurveGap:
    """Two curves on the same prompts, in one order, read at one cost. Prompts are resampled, costs are not. Raises
    ValueError: the curves are on different numbers of prompts."""
    n = first.outcomes.shape[1]
    if second.outcomes.shape[1] != n:
        raise ValueError(f"the curves are on different numbers of prompts: {n} and {second.outcomes.shape[1]}")
    counts = np.vstack([np.ones(n), _resampled(n, resamples)])
    a, b = (value_at(each.cost, _shares(each.outcomes, counts), cost) for each in (first, second))
    gaps = (a - b)[1:]
    p = math.nan if np.isnan(a[0] - b[0]) else bootstrap_p(gaps)
    one, two, apart = (bootstrap_interval(float(each[0]), each[1:], n) for each in (a, b, a - b))
    return CurveGap(first=one, second=two, difference=apart, p=p)


def _shares(outcomes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean success of each setting in each bootstrap sample, shape (sample, setting); nan where nothing is scored."""
    known = ~np.isnan(outcomes)
    scored = counts @ known.T
    return np.where(scored > 0, counts @ np.where(known, outcomes, 0.0).T / np.maximum(scored, 1.0), math.nan)
