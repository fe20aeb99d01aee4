from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, spearmanr, t

from demur.stats import (
    Estimate,
    TradeOff,
    auroc,
    bootstrap_mean,
    bootstrap_of,
    clustered_rate,
    compare_curves,
    crossed_difference,
    holm,
    mcnemar,
    mean_of_runs,
    one_more_draw,
    paired_difference,
    rate_of,
    ratio_of,
    sign_flip_p,
    spearman,
    spearman_over_prompts,
    value_at,
    wilson,
)
from demur.types import Outcome, Verdict


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe (1998), table I, method 3 (Wilson without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_newcombes_published_intervals(k: int, n: int, low: float, high: float) -> None:
    rate = wilson(k, n)
    assert (rate.low, rate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert rate.value == k / n


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy_and_holds_the_rate(counts: tuple[int, int]) -> None:
    k, n = counts
    rate = wilson(k, n)
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (rate.low, rate.high) == (
        pytest.approx(expected.low, abs=1e-12),
        pytest.approx(expected.high, abs=1e-12),
    )
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_nothing_scored_is_unknown_not_zero() -> None:
    rate = wilson(0, 0, unscored=3)
    assert (rate.low, rate.high, rate.unscored) == (0.0, 1.0, 3)
    assert math.isnan(rate.value)


@pytest.mark.parametrize(("k", "n", "unscored"), [(3, 2, 0), (-1, 2, 0), (1, 2, -1)])
def test_impossible_counts_are_refused(k: int, n: int, unscored: int) -> None:
    with pytest.raises(ValueError, match="not a count"):
        wilson(k, n, unscored)


def test_unscored_verdicts_are_outside_n() -> None:
    outcomes = [Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL, Outcome.COMPLIANCE, None, None]
    verdicts = [Verdict(outcome=outcome, judge="test") for outcome in outcomes]
    one = rate_of(verdicts, Outcome.REFUSAL)
    both = rate_of(verdicts, {Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL})
    assert (one.k, one.n, one.unscored) == (1, 3, 2)
    assert (both.k, both.n, both.unscored) == (2, 3, 2)


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * (1 + 1 + 1 + 1) / (5 * 24).
    assert spearman([10, 20, 30, 40, 50], [2, 1, 4, 3, 5]) == pytest.approx(0.8)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=40))
def test_spearman_agrees_with_scipy_on_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0], abs=1e-12)


def test_spearman_leaves_out_pairs_with_nan() -> None:
    nan = math.nan
    assert spearman([1, nan, 2, 3, 9], [1, 7, 2, 3, nan]) == pytest.approx(1.0)
    assert math.isnan(spearman([1, nan], [nan, 2]))


def test_spearman_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="shapes"):
        spearman([1, 2, 3], [1, 2])


def test_mcnemar_by_hand() -> None:
    # Five discordant pairs, all one way: 2 * 0.5 ** 5. The unscored pair does not count.
    first = [True] * 5 + [False, True, None]
    second = [False] * 5 + [False, True, True]
    result = mcnemar(first, second)
    assert (result.n, result.only_first, result.only_second) == (7, 5, 0)
    assert result.p == pytest.approx(0.0625)
    # One against four: 2 * (1 + 5) / 32.
    assert mcnemar([True] + [False] * 4, [False] + [True] * 4).p == pytest.approx(0.375)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_agrees_with_scipys_binomial_test(only_first: int, only_second: int) -> None:
    first = [True] * only_first + [False] * only_second
    expected = binomtest(only_first, only_first + only_second, 0.5).pvalue if first else 1.0
    assert mcnemar(first, [not x for x in first]).p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_disagreement_is_one() -> None:
    assert mcnemar([True, False], [True, False]).p == 1.0
    with pytest.raises(ValueError, match="numbers of prompts"):
        mcnemar([True], [])


def test_a_clustered_rate_of_one_run_is_wilsons() -> None:
    rate = wilson(3, 10, unscored=1)
    assert clustered_rate([[True] * 3 + [False] * 7 + [None]]) == Estimate.of(rate)


def test_runs_that_repeat_each_other_count_once() -> None:
    run = [True, True, False, False, False, True, False, False, False, False]
    once, five = clustered_rate([run]), clustered_rate([run] * 5)
    assert (once.value, five.value, five.n) == (0.3, pytest.approx(0.3), 50)
    # v = sum of (5 h - 5 p)^2 / 50^2 * 10/9 = .0233 = p (1 - p) / 9: worth nine answers, one less than the prompts.
    # All of it is between ten prompts: 9 degrees of freedom, at which the 97.5 % point of Student's t is 2.262157.
    assert (five.low, five.high) == pytest.approx(score_limits(0.3, 9, 2.262157), abs=1e-6)


def score_limits(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's ends: the shares x with (p - x)^2 = z^2 x (1 - x) / n."""
    low, high = sorted(np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]))
    return float(low), float(high)


def two_way(table: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of a full table of runs by prompts, from its row and column means; degrees of freedom."""
    runs, prompts = table.shape
    by_run = table.mean(1).var(ddof=1) / runs
    by_prompt = table.mean(0).var(ddof=1) / prompts
    variance = by_run + by_prompt - table.var() / table.size
    variance = max(variance, by_run, by_prompt)
    return variance, variance**2 / (by_run**2 / (runs - 1) + by_prompt**2 / (prompts - 1))


STAIRS = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=bool)
"""Three runs on six prompts, with differences between both."""


def test_prompts_and_runs_both_widen_a_clustered_rate() -> None:
    variance, freedom = two_way(STAIRS.astype(float))
    p = 10 / 18
    found = clustered_rate(STAIRS.tolist())
    assert (found.value, found.n) == (pytest.approx(p), 18)
    expected = score_limits(p, min(p * (1 - p) / variance, 6), float(t.ppf(0.975, freedom)))
    assert (found.low, found.high) == pytest.approx(expected)


def test_answers_are_never_worth_more_than_prompts() -> None:
    # Ten runs, each true on two other prompts of twenty: shares of runs and prompts alike, so no variance is seen.
    runs = [[prompt % 10 == run for prompt in range(20)] for run in range(10)]
    found = clustered_rate(runs)
    assert (found.value, found.n) == (pytest.approx(0.1), 200)
    assert (found.low, found.high) == pytest.approx((wilson(2, 20).low, wilson(2, 20).high))


def shares(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def logit_of(rate: float, sd: float) -> float:
    """The mean of normal logits of that SD whose shares have the mean `rate`."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    means = np.linspace(-15, 5, 20001)
    return float(np.interp(rate, shares(means[:, None] + sd * points) @ weights / weights.sum(), means))


def crossed_tables(rate: float, runs: int, prompts: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers of a first run and of several others, all with that mean rate. Sets and prompts differ, by SDs of 1 and
    1.5 logits."""
    random = np.random.default_rng(runs * prompts)
    prompt_effects = 1.5 * random.normal(size=(times, 1, prompts))
    logits = logit_of(rate, math.hypot(1, 1.5)) + random.normal(size=(times, runs, 1)) + prompt_effects
    first = random.random((times, prompts)) < shares(logit_of(rate, 1.5) + prompt_effects[:, 0])
    return first, random.random((times, runs, prompts)) < shares(logits)


def test_a_ratio_of_rates_solves_the_quadratic_of_its_method() -> None:
    """At either end r, the distance of a − r·b from 0 is made of the distances of a and b from their own limits."""
    a, b = Estimate.of(wilson(12, 40)), Estimate.of(wilson(30, 40))
    found = ratio_of(a, b)
    assert (found.value, found.n) == (pytest.approx(0.4), 40)
    for r, (below, above) in ((found.low, (a.low, b.high)), (found.high, (a.high, b.low))):
        gap = (a.value - r * b.value) ** 2
        assert gap == pytest.approx((a.value - below) ** 2 + r**2 * (above - b.value) ** 2)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"), [(0, 20, 0.0, 0.2), (20, 20, 0.8, 1.3), (5, 0, None, None)]
)
def test_a_ratio_keeps_its_width_and_is_unknown_without_a_success_below(
    first: int, second: int, low: float | None, high: float | None
) -> None:
    found = ratio_of(Estimate.of(wilson(first, 20)), Estimate.of(wilson(second, 20)))
    if low is None or high is None:
        assert math.isnan(found.value)
        assert found.n == 0
    else:
        assert found.value == first / second
        assert low - 0.1 < found.low <= found.value < found.high < high + 0.1


@pytest.mark.parametrize(("n", "p", "q"), [(10, 0.3, 0.9), (50, 0.05, 0.6), (100, 0.8, 0.9)])
def test_a_ratio_holds_the_truth(n: int, p: float, q: float) -> None:
    random = np.random.default_rng(n)
    counts = random.binomial(n, [p, q], size=(1000, 2)).tolist()
    pairs = (ratio_of(Estimate.of(wilson(a, n)), Estimate.of(wilson(b, n))) for a, b in counts if b)
    held = [each.low <= p / q <= each.high for each in pairs]
    assert sum(held) / len(held) > 0.93


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("runs", [3, 5, 10])
@pytest.mark.parametrize("prompts", [30, 100])
def test_few_runs_and_rare_events_are_covered(rate: float, runs: int, prompts: int) -> None:
    # An interval that trusts the seen variance alone holds the truth in as few as .87 of such cases.
    tables = crossed_tables(rate, runs, prompts, 300)[1]
    found = [clustered_rate(list(table)) for table in tables]
    assert sum(each.low <= rate <= each.high for each in found) / 300 >= 0.93


@pytest.mark.parametrize(("rate", "runs", "prompts"), [(0.02, 10, 30), (0.1, 3, 100), (0.5, 5, 30)])
def test_a_crossed_difference_of_equal_rates_is_rarely_found(rate: float, runs: int, prompts: int) -> None:
    # A t test, or flipping signs, finds it in up to .23 of such cases.
    first, tables = crossed_tables(rate, runs, prompts, 100)
    found = [crossed_difference(a, list(b)) for a, b in zip(first, tables, strict=True)]
    assert sum(p < 0.05 for _, p in found) <= 7
    assert sum(each.low <= 0 <= each.high for each, _ in found) >= 93


def pairs_of(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_a_paired_difference_is_newcombes_method_10(cells: tuple[int, int, int, int]) -> None:
    e, f, g, h = cells
    n = e + f + g + h
    (l2, u2), (l3, u3) = (score_limits(k / n, n, 1.959963984540054) for k in (e + f, e + g))
    product = (e + f) * (g + h) * (e + g) * (f + h)
    phi = 0.0
    if product:
        phi = (max(e * h - f * g - n / 2, 0) if e * h > f * g else e * h - f * g) / np.sqrt(product)
    dl2, du2, dl3, du3 = (e + f) / n - l2, u2 - (e + f) / n, (e + g) / n - l3, u3 - (e + g) / n
    # Two sides of a triangle and the cosine of its angle; np.roots leaves rounding that may turn a square negative.
    delta = np.sqrt(max(0.0, dl2**2 - 2 * phi * dl2 * du3 + du3**2))
    epsilon = np.sqrt(max(0.0, du2**2 - 2 * phi * du2 * dl3 + dl3**2))
    found = paired_difference(*pairs_of(e, f, g, h))
    assert (found.value, found.n) == (pytest.approx((f - g) / n), n)
    assert (found.low, found.high) == pytest.approx(((f - g) / n - delta, (f - g) / n + epsilon), abs=1e-6)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.01
    swapped = paired_difference(*reversed(pairs_of(e, f, g, h)))
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_a_paired_difference_gives_the_published_interval() -> None:
    # Complete response before and after treatment (Cavo et al. 2012), as worked out for Newcombe's method by Fagerland,
    # Lydersen and Laake, Statistical Analysis of Contingency Tables, chapter 8.
    found = paired_difference(*pairs_of(59, 6, 16, 80))
    assert (found.value, found.low, found.high) == pytest.approx((-0.0621, -0.1186, -0.0046), abs=5e-5)


def test_a_paired_difference_never_collapses() -> None:
    apart = paired_difference([True] * 6, [False] * 6)
    # Both margins are certain, so phi is 0: 1 - sqrt(2) z^2 / (6 + z^2).
    assert (apart.value, apart.high) == (1.0, 1.0)
    assert apart.low == pytest.approx(1 - math.sqrt(2) * 3.841459 / 9.841459, abs=1e-6)
    alike = paired_difference([True, False] * 6, [True, False] * 6)
    assert alike.low < alike.value == 0 < alike.high


def test_unscored_pairs_are_left_out_of_a_difference() -> None:
    first, second = [True, True, None, False, True], [False, True, True, None, False]
    found = paired_difference(first, second)
    assert found == paired_difference([True, True, True], [False, True, False]).model_copy(update={"unscored": 2})
    nothing = paired_difference([None, True], [True, None])
    assert (nothing.n, nothing.unscored) == (0, 2)
    assert all(math.isnan(x) for x in (nothing.value, nothing.low, nothing.high))
    assert paired_difference([], []).n == 0
    with pytest.raises(ValueError, match="numbers of prompts: 0, 1"):
        paired_difference([True], [])


def test_a_paired_difference_holds_the_truth() -> None:
    random = np.random.default_rng(5)
    for cells in ([0.3, 0.3, 0.1, 0.3], [0.85, 0.1, 0.01, 0.04]):
        held = 0
        for counts in random.multinomial(40, cells, size=500).tolist():
            found = paired_difference(*pairs_of(*counts))
            held += found.low <= cells[1] - cells[2] <= found.high
        assert held / 500 >= 0.93


def test_a_crossed_difference_by_hand() -> None:
    # F* is True on the first four prompts, the runs on what the stairs leave empty.
    first, runs = np.array([1, 1, 1, 1, 0, 0], dtype=bool), ~STAIRS
    found, p = crossed_difference(first, runs.tolist())
    assert (found.value, found.n) == (pytest.approx(4 / 6 - 8 / 18), 18)
    # Shares of the runs by prompt: 0, 0, 1/3, 2/3, 2/3, 1.
    both, only_first, only_second = 1.0, 3.0, 5 / 3
    neither = 6 - both - only_first - only_second
    phi = (both * neither - only_first * only_second) / math.sqrt(4 * 2 * (8 / 3) * (10 / 3))
    assert phi < 0
    variance, freedom = two_way(runs.astype(float))
    effective = min(8 / 18 * 10 / 18 / variance, 6)
    quantile = float(t.ppf(0.975, min(freedom, two_way(first - runs.astype(float))[1])))
    phi *= math.sqrt(effective / 6)
    (a, b), (c, d) = score_limits(4 / 6, 6, 1.959964), score_limits(8 / 18, effective, quantile)
    below, above = (4 / 6 - a, d - 8 / 18), (b - 4 / 6, 8 / 18 - c)
    low, high = (math.sqrt(x * x + y * y - 2 * phi * x * y) for x, y in (below, above))
    assert (found.low, found.high) == pytest.approx((found.value - low, min(1.0, found.value + high)), abs=1e-5)
    assert p > 0.05


def test_the_p_of_a_crossed_difference_is_where_its_interval_ends_at_zero() -> None:
    # Every prompt's mean difference is .5, but the two runs are 0 and 1: worth one answer, one degree of freedom.
    found, p = crossed_difference([True] * 20, [[True] * 20, [False] * 20])
    (low, _), (q_low, q_high) = score_limits(1, 20, 1.959964), score_limits(0.5, 1, float(t.ppf(0.975, 1)))
    assert (found.value, found.high) == (0.5, pytest.approx(1 - q_low, abs=1e-5))
    assert found.low == pytest.approx(0.5 - math.hypot(1 - low, q_high - 0.5), abs=1e-5)
    (low, _), (_, q_high) = score_limits(1, 20, float(norm.isf(p / 2))), score_limits(0.5, 1, float(t.isf(p / 2, 1)))
    assert 0.05 < p < 0.2
    assert 0.5 - math.hypot(1 - low, q_high - 0.5) == pytest.approx(0, abs=1e-6)


def test_a_crossed_difference_that_never_varies_counts_prompts() -> None:
    found, p = crossed_difference([True] * 6, [[False] * 6] * 5)
    once = paired_difference([True] * 6, [False] * 6)
    assert (found.value, found.low, found.high) == (1.0, pytest.approx(once.low), 1.0)
    assert (found.n, p) == (30, 2 / 64)
    # A prompt that one run left unscored still counts once.
    some, _ = crossed_difference([True] * 6, [[False] * 6, [False] * 5 + [None]])
    assert (some.n, some.unscored, some.low) == (11, 1, pytest.approx(once.low))
    same, p = crossed_difference([True, False] * 3, [[True, False] * 3] * 5)
    assert (same.value, p) == (0, 1.0)
    assert same.low < 0 < same.high


def test_a_crossed_difference_of_one_scored_run_is_paired() -> None:
    first, run = [True, True, True, False, None], [False, False, True, None, True]
    found, p = crossed_difference(first, [run])
    assert (found, p) == (paired_difference(first, run), mcnemar(first, run).p)
    found, p = crossed_difference(first, [run, [None] * 5])
    assert found == paired_difference(first, run).model_copy(update={"unscored": 7})
    assert p == mcnemar(first, run).p


@pytest.mark.parametrize("runs", [[[None, True], [None, None]], []])
def test_a_crossed_difference_of_nothing_is_unknown(runs: list[list[bool | None]]) -> None:
    found, p = crossed_difference([True, None], runs)
    assert (found.n, found.unscored) == (0, 2 * len(runs))
    assert all(math.isnan(x) for x in (found.value, found.low, found.high, p))


def test_a_crossed_difference_refuses_different_lengths() -> None:
    with pytest.raises(ValueError, match="numbers of prompts: 1, 2"):
        crossed_difference([True], [[True], [True, False]])


def test_a_crossed_difference_keeps_its_level_where_sign_flips_alone_do_not() -> None:
    # A prompt is refused where it, and the set, are above a threshold; F* is the mean random set. By symmetry all rates
    # are .5, so the null is true.
    random = np.random.default_rng(8)
    rejected = flipped = held = 0
    for _ in range(300):
        prompts = 2 * random.normal(size=100) + random.logistic(size=100)
        first, runs = prompts > 0, prompts + 0.7 * random.normal(size=(5, 1)) > 0
        found, p = crossed_difference(first.tolist(), runs.tolist())
        rejected += p < 0.05
        held += found.low <= 0 <= found.high
        flipped += sign_flip_p(first - runs.mean(0), resamples=500) < 0.05
    assert rejected / 300 <= 0.10
    assert held / 300 >= 0.92
    assert flipped / 300 > 0.3


def test_runs_that_disagree_widen_the_interval() -> None:
    apart = clustered_rate([[True] * 50, [False] * 50])
    mixed = clustered_rate([[True, False] * 25, [False, True] * 25])
    assert apart.value == mixed.value == 0.5
    assert apart.high - apart.low > 0.7 > mixed.high - mixed.low


def test_runs_that_never_vary_count_prompts_not_answers() -> None:
    assert clustered_rate([[False] * 20] * 5) == Estimate(value=0, low=0, high=wilson(0, 20).high, n=100)


def test_a_clustered_rate_of_nothing_is_unknown() -> None:
    assert math.isnan(clustered_rate([]).value)
    unknown = clustered_rate([[None, None], [None, None]])
    assert (unknown.n, unknown.unscored, unknown.low, unknown.high) == (0, 4, 0.0, 1.0)
    with pytest.raises(ValueError, match="different numbers"):
        clustered_rate([[True], [True, False]])


def test_one_more_draw_by_hand() -> None:
    # Mean .3, SD .1 of four draws; t of 3 degrees of freedom is 3.182446, times .1 * sqrt(5 / 4).
    found = one_more_draw(0.9, [0.2, 0.4, 0.4, 0.2])
    spread = math.sqrt(0.04 / 3)
    assert (found.low, found.high) == pytest.approx(
        (0.3 - 3.182446 * spread * math.sqrt(1.25), 0.3 + 3.182446 * spread * math.sqrt(1.25)), abs=1e-6
    )
    assert found.p == 1 / 5
    # Low and high both count: the mean of all is 4, which 0 and 8 are as far from as can be.
    assert one_more_draw(8.0, [0.0, 3.0, 5.0]).p == 2 / 4
    assert one_more_draw(1.0, [1.0, 1.0]).p == 1.0
    assert one_more_draw(1.0, [0.0] * 19).p == 1 / 20
    alone = one_more_draw(1.0, [0.0])
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="no draw"):
        one_more_draw(1.0, [])


def test_draws_that_are_all_zero_do_not_show_that_the_next_one_is() -> None:
    assert (one_more_draw(0.1, [0.0] * 5).low, one_more_draw(0.1, [0.0] * 5).high) == (0.0, 0.0)
    found = one_more_draw(0.1, [0.0] * 5, n=50)
    share = 2 / 254
    expected = 2.776445 * math.sqrt(share * (1 - share) / 50) * math.sqrt(6 / 5)
    assert (found.low, found.high) == (0.0, pytest.approx(expected, abs=1e-6))


def test_one_more_draw_keeps_its_level() -> None:
    random = np.random.default_rng(4)
    found = [one_more_draw(float(values[0]), values[1:].tolist()) for values in random.normal(size=(2000, 20))]
    assert sum(each.p <= 0.05 for each in found) / 2000 == pytest.approx(0.05, abs=0.01)
    inside = sum(each.low <= 0.7 <= each.high for each in found)
    assert inside > 1900
    values = random.normal(size=(2000, 6))
    held = [one_more_draw(float(v[0]), v[1:].tolist()) for v in values]
    kept = sum(each.low <= v[0] <= each.high for each, v in zip(held, values, strict=True))
    assert kept / 2000 == pytest.approx(0.95, abs=0.015)


COSTS = np.array([0.0, 0.4, 0.1, 0.2, 0.4])
SUCCESS = np.array([0.0, 0.6, 0.5, 0.3, 0.9])
"""The third setting costs more than the second best and achieves less; the second ties in cost with the last."""


@pytest.mark.parametrize(
    ("at", "expected"),
    [(-0.1, math.nan), (0.0, 0.0), (0.05, 0.25), (0.1, 0.5), (0.15, 0.5), (0.3, 0.7), (0.4, 0.9), (2.0, 0.9)],
)
def test_a_curve_is_read_between_its_best_settings(at: float, expected: float) -> None:
    assert float(value_at(COSTS, SUCCESS, at)) == pytest.approx(expected, nan_ok=True)


def test_many_curves_are_read_at_once() -> None:
    table = np.stack([SUCCESS, SUCCESS / 2, np.full(5, math.nan)])
    assert value_at(COSTS, table, 0.05) == pytest.approx([0.25, 0.125, math.nan], nan_ok=True)


def curve(*successes: int, n: int = 40) -> TradeOff:
    """The clean model, which never succeeds, and settings of cost .1, .2, … that succeed on so many of `n` prompts."""
    rows = [[1.0] * k + [0.0] * (n - k) for k in (0, *successes)]
    return TradeOff(np.arange(len(rows)) / 10, np.array(rows))


def test_curves_are_compared_at_equal_cost() -> None:
    high, low = curve(20, 40), curve(10, 20)
    at = compare_curves(high, low, 0.15)
    assert (at.first.value, at.second.value, at.difference.value) == pytest.approx((0.75, 0.375, 0.375))
    # Per prompt the difference is 0 - 0, .25, .5 or 0: its SD gives the interval.
    per_prompt = (
        np.repeat([0.5, 0.5, 0.5, 0.5], 10) - np.repeat([0.5, 0.25, 0, 0], 10) + np.repeat([0.5, 0.5, 0, 0], 10)
    )
    per_prompt -= np.repeat([0.5, 0.25, 0.0, 0.0], 10)
    half = 1.96 * per_prompt.std() / math.sqrt(40)
    assert (at.difference.low, at.difference.high) == pytest.approx((0.375 - half, 0.375 + half), abs=0.02)
    assert at.p == 2 / 2001
    same = compare_curves(high, high, 0.1)
    assert (same.difference.value, same.difference.low, same.difference.high, same.p) == (0, 0, 0, 1)


def test_unscored_answers_are_left_out_of_a_curve() -> None:
    some = curve(20)
    some.outcomes[1, :10] = math.nan
    assert compare_curves(some, curve(20), 0.1).first.value == pytest.approx(10 / 30)
    nothing = TradeOff(some.cost, np.full((2, 40), math.nan))
    found = compare_curves(nothing, some, 0.1)
    assert math.isnan(found.p)
    assert math.isnan(found.difference.low)
    with pytest.raises(ValueError, match="different numbers of prompts: 40 and 3"):
        compare_curves(some, curve(1, n=3), 0.1)


def test_the_rank_correlation_of_means_has_an_interval_over_prompts() -> None:
    random = np.random.default_rng(6)
    truth = random.normal(size=(30, 50)) + 2 * random.normal(size=50)
    guess = truth + random.normal(size=(30, 50))
    found = spearman_over_prompts(guess, truth)
    assert found.value == pytest.approx(spearmanr(guess.mean(0), truth.mean(0))[0])
    assert (found.low < found.value <= found.high, found.n) == (True, 30)
    # One prompt holds the agreement up: without it the ranks are reversed.
    steps = np.arange(5.0)
    shaky = spearman_over_prompts(np.stack([10 * steps, -steps, -steps]), np.stack([steps] * 3))
    assert (shaky.value, shaky.low, shaky.high) == (1.0, -1.0, 1.0)
    assert spearman_over_prompts(truth, truth).low == 1.0
    assert math.isnan(spearman_over_prompts(np.empty((0, 3)), np.empty((0, 3))).value)
    with pytest.raises(ValueError, match="shapes"):
        spearman_over_prompts(truth, truth[:, 1:])


def test_bootstrap_of_a_weighted_mean_against_scipy() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).normal(2.0, 1.0, 80)
    found = bootstrap_mean(values, resamples=20000)
    expected = bootstrap((values,), np.mean, n_resamples=20000, method="percentile").confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=0.02), pytest.approx(expected.high, abs=0.02))
    # Weights are how often a value counts.
    assert bootstrap_mean([1.0, 4.0], [3, 1]).value == pytest.approx(7 / 4)
    with_gap = bootstrap_mean([1.0, math.nan, 3.0], [1, 1, 1])
    assert (with_gap.value, with_gap.n, with_gap.unscored) == (2.0, 2, 1)
    assert math.isnan(bootstrap_mean([]).value)


def test_bootstrap_of_a_ratio_of_means_against_scipy() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(4)
    up, down = rng.normal(3.0, 1.0, (60, 1)), rng.normal(5.0, 1.0, (90, 1))

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a[..., 0] / b[..., 0]

    found = bootstrap_of(ratio, up, down, resamples=20000)
    expected = bootstrap(
        (up[:, 0], down[:, 0]),
        lambda a, b: a.mean() / b.mean(),
        n_resamples=5000,
        method="percentile",
        vectorized=False,
    ).confidence_interval
    assert (found.value, found.n) == (pytest.approx(up.mean() / down.mean()), 150)
    assert (found.low, found.high) == (pytest.approx(expected.low, abs=0.01), pytest.approx(expected.high, abs=0.01))
    # Columns of one table are paired: the ratio of a thing to itself does not vary.
    same = bootstrap_of(lambda a: a[..., 0] / a[..., 1], np.repeat(up, 2, axis=1))
    assert (same.low, same.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert math.isnan(bootstrap_of(ratio, up, down[:0]).value)


def test_a_permutation_p_counts_the_observed_pattern_too() -> None:
    # Of 2 ** 40 patterns two are as extreme, so none of 99 drawn ones is.
    assert sign_flip_p([1.0] * 40, resamples=99) == 1 / 100


def test_sign_flips_are_counted_exactly_and_agree_with_scipy() -> None:
    from scipy.stats import permutation_test

    # Of the 8 sign patterns of (1, 2, 3) two have a sum as large as 6 in size.
    assert sign_flip_p([1.0, 2.0, 3.0, 0.0, math.nan]) == 2 / 8
    assert sign_flip_p([0.0, 0.0]) == 1.0
    values = np.random.default_rng(0).normal(0.4, 1.0, 40)
    expected = permutation_test(
        (values, np.zeros(40)),
        lambda x, y: float((x - y).mean()),
        permutation_type="samples",
        vectorized=False,
        n_resamples=4000,
        rng=1,
    ).pvalue
    assert sign_flip_p(values, resamples=20000) == pytest.approx(expected, abs=0.01)


def test_holm_by_hand() -> None:
    # 4 x .005, 3 x .01, 2 x .03, then never lower than before: 1 x .04 becomes .06.
    adjusted = holm([0.01, 0.04, 0.03, math.nan, 0.005])
    assert adjusted[:3] == pytest.approx((0.03, 0.06, 0.06))
    assert (math.isnan(adjusted[3]), adjusted[4]) == (True, pytest.approx(0.02))
    assert holm([0.5, 0.9]) == (1.0, 1.0)


def test_auroc_by_hand_and_against_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    assert auroc([2.0, 3.0], [1.0, 2.0]).value == 3.5 / 4
    random = np.random.default_rng(0)
    high, low = random.normal(1, 1, 60), random.normal(0, 1, 50)
    found = auroc(high, low, resamples=200)
    assert found.value == pytest.approx(roc_auc_score([1] * 60 + [0] * 50, np.concatenate([high, low])))
    assert found.low < found.value < found.high
    assert math.isnan(auroc([1.0], []).value)


def test_perfect_separation_of_a_few_is_not_certain() -> None:
    found = auroc([5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.5 < found.low < 0.7
    # Hanley and McNeil's variance (1982, equation 2) of four against four puts the seen area 1.96 errors away.
    x = found.low
    q1, q2 = x / (2 - x), 2 * x * x / (1 + x)
    variance = (x * (1 - x) + 3 * (q1 - x * x) + 3 * (q2 - x * x)) / 16
    assert (1 - x) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-5)
    reverse = auroc([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    assert (reverse.low, reverse.value, reverse.high) == (0.0, 0.0, pytest.approx(1 - x))


def test_one_against_one_is_one_trial() -> None:
    found = auroc([1.0], [0.0])
    assert (found.low, found.high) == (pytest.approx(wilson(1, 1).low), 1.0)


def test_auroc_holds_the_truth_with_few_scores() -> None:
    random = np.random.default_rng(2)
    # Normals 2 apart: the difference has SD sqrt(2), so the area is Phi(sqrt(2)).
    truth = 0.5 * (1 + math.erf(1.0))
    held = 0
    for _ in range(250):
        found = auroc(random.normal(2, 1, 8), random.normal(0, 1, 8), resamples=100)
        held += found.low <= truth <= found.high
    assert held / 250 >= 0.93


def test_the_mean_of_runs_by_hand() -> None:
    found = mean_of_runs([1.0, 2.0, 3.0], n=50)
    # Standard deviation 1, so Student's 4.3027 for two degrees of freedom, over the root of 3.
    assert (found.value, found.n) == (2.0, 50)
    half = 4.30265 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2.0 - half, 2.0 + half), rel=1e-4)
    two = mean_of_runs([1.0, 2.0], n=50)
    assert two.high - two.value == pytest.approx(t.ppf(0.975, 1) * math.sqrt(0.5) / math.sqrt(2))
    one = mean_of_runs([1.0], n=50)
    assert (one.value, one.low, one.high) == (1.0, -math.inf, math.inf)


def test_nothing_is_unscored_unless_said() -> None:
    assert wilson(1, 2).unscored == 0
    assert Estimate.unknown().unscored == 0


def test_adjusted_p_values_end_at_one() -> None:
    assert holm([0.6, 0.9, 0.2]) == (1.0, 1.0, pytest.approx(0.6))


@pytest.mark.parametrize(
    ("values", "weights"), [([1.0, 2.0], [1.0]), (np.ones((2, 2)), None), (np.ones((2, 2)), np.ones((2, 2)))]
)
def test_values_and_weights_are_one_for_each_prompt(values: Any, weights: Any) -> None:
    with pytest.raises(ValueError, match="cannot weight"):
        bootstrap_mean(values, weights)


def test_only_ratios_of_weights_count() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    once, twice = bootstrap_mean(values), bootstrap_mean(values, [2.0] * 5)
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))
    assert once.low < once.value < once.high


def test_two_draws_have_an_interval_and_rates_stay_rates() -> None:
    # Mean .2, standard deviation .1414; Student's 12.706 for one degree of freedom, times the root of 1.5.
    free = one_more_draw(0.9, [0.1, 0.3])
    half = 12.7062 * math.sqrt(0.02) * math.sqrt(1.5)
    assert (free.low, free.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-4)
    rates = one_more_draw(0.9, [0.1, 0.3], n=100)
    assert (rates.low, rates.high) == (0.0, 1.0)


def test_one_more_rate_varies_at_least_as_answers_do() -> None:
    # Three draws of .2 on 50 prompts: (30 + 2) of (150 + 4), so a rate of .2078 and a standard deviation of .0574.
    found = one_more_draw(0.9, [0.2, 0.2, 0.2], n=50)
    spread = math.sqrt(32 / 154 * 122 / 154 / 50)
    assert found.high == pytest.approx(0.2 + 4.30265 * spread * math.sqrt(4 / 3), rel=1e-4)
    assert found.low == 0.0


def test_two_pairs_have_a_rank_correlation_and_tables_have_none() -> None:
    assert spearman([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert spearman([1.0, 2.0], [4.0, 3.0]) == -1.0
    with pytest.raises(ValueError, match="cannot correlate"):
        spearman(np.ones((2, 2)), np.ones((2, 2)))


def test_curves_on_one_prompt_and_below_the_least_cost() -> None:
    one = TradeOff(np.array([0.0, 1.0]), np.array([[0.0], [1.0]]))
    found = compare_curves(one, TradeOff(np.array([0.0]), np.array([[0.0]])), 0.5, resamples=1)
    assert (found.first.value, found.second.value, found.difference.value) == (0.5, 0.0, 0.5)
    # One prompt is in every sample, so a single sample gives the interval.
    assert (found.first.low, found.first.high) == (0.5, 0.5)
    nothing = value_at(np.array([0.1, 0.2]), np.ones((3, 2)), 0.05)
    assert nothing.shape == (3,)
    assert np.isnan(nothing).all()


def test_intervals_are_the_same_at_each_call_and_of_as_many_samples_as_documented() -> None:
    """A page that is drawn again shows the same numbers; more samples, or another seed, would give others."""
    random = np.random.default_rng(12)
    values, other = random.normal(size=40), random.normal(0.5, 1, size=40)
    table, truth = random.normal(size=(12, 60)), random.normal(size=(12, 60))

    def mean(a: np.ndarray) -> np.ndarray:
        return a[..., 0]

    def mean_of(**how: Any) -> Estimate:
        return bootstrap_mean(values, **how)

    def statistic_of(**how: Any) -> Estimate:
        return bootstrap_of(mean, values[:, None], **how)

    for drawn in (mean_of, statistic_of):
        assert drawn() == drawn(resamples=2000, seed=0)
        assert drawn() not in (drawn(resamples=2001), drawn(seed=1))
    assert auroc(values, other) == auroc(values, other, resamples=2000, seed=0) != auroc(values, other, seed=1)
    assert spearman_over_prompts(table, truth) == spearman_over_prompts(table, truth, resamples=1000)
    assert spearman_over_prompts(table, truth) != spearman_over_prompts(table, truth, resamples=1001)
    assert sign_flip_p(values + 0.3) == sign_flip_p(values + 0.3, resamples=10000)
    assert sign_flip_p(values + 0.3) != sign_flip_p(values + 0.3, resamples=10001)
