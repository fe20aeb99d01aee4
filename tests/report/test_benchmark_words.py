"""What a benchmark's headline claims, and how its numbers are written, against sentences written by hand."""

from __future__ import annotations

import math

import pytest

from demur.report import benchmark as words
from demur.stats import Estimate
from demur.studies.benchmark.results import Answered, BenchmarkResult, Comparison, Counters
from demur.types import Outcome
from synthetic_benchmark import (
    JUDGE,
    NAN,
    UNKNOWN,
    UNSCORED,
    about,
    behaviour,
    capability,
    comparison,
    emptied,
    share,
    synthetic_benchmark,
    with_comparisons,
)


def ap(difference: float | None, p_holm: float = NAN, budget: float | None = None) -> Comparison:
    return comparison("ap", difference, p_holm, budget=budget, other_strength=None if difference is None else -1.0)


MORE = "More harmful test prompts were complied with under F* (CosSim+AP) than under AP, "
FEWER = "Fewer harmful test prompts were complied with under F* (CosSim+AP) than under AP, "
TIE = "F* (CosSim+AP) against other methods on harmful test prompts: no clear difference from AP."
EMPTY = "No other method could be compared with F* (CosSim+AP)."


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ((ap(0.4, 0.01), ap(0.3, 0.01, 0.05)), MORE + "at each method’s own best strength and at equal damage."),
        ((ap(-0.4, 0.01), ap(-0.3, 0.01, 0.05)), FEWER + "at each method’s own best strength and at equal damage."),
        # Not significant, however large, or exactly at the level: no claim.
        ((ap(0.4, 0.05), ap(0.3, 0.06, 0.05)), TIE),
        ((ap(-0.4, 0.05),), TIE),
        # Equal damage must hold at every budget; those at which the two could be compared are named if not all.
        (
            (ap(0.4, 0.01), ap(0.3, 0.01, 0.01), ap(0.1, 0.3, 0.05)),
            MORE + "at each method’s own best strength, not clearly at every budget of damage.",
        ),
        (
            (ap(0.4, 0.01), ap(None, budget=0.01), ap(0.1, 0.01, 0.05), ap(0.1, 0.01, 0.2)),
            MORE + "at each method’s own best strength and at equal damage (up to 0.05 and 0.2 nats per token).",
        ),
        (
            (ap(0.4, 0.01), ap(None, budget=0.01)),
            MORE + "at own best strengths (not compared at equal damage).",
        ),
        ((ap(0.1, 0.3), ap(0.3, 0.01, 0.05)), MORE + "at equal damage, not clearly at own best strengths."),
        ((ap(0.1, 0.3), ap(0.3, 0.01, 0.01), ap(0.1, 0.9, 0.05)), MORE + "at some budgets only."),
        (
            (ap(0.4, 0.01), ap(-0.3, 0.01, 0.05), comparison("random", 0.9, 0.01)),
            "More harmful test prompts were complied with under F* (CosSim+AP) than under random features, at own "
            "best strengths (not compared at equal damage); more than under AP at one strength, fewer at another.",
        ),
        # Nothing scored gives p = 1 and a difference of nan; no strength gives no difference at all.
        ((ap(NAN, 1.0),), EMPTY),
        ((ap(NAN, 0.001),), EMPTY),
        ((ap(None),), EMPTY),
        ((), EMPTY),
        (
            (comparison("cossim", 0.4, 0.001), ap(None)),
            "More harmful test prompts were complied with under F* (CosSim+AP) than under CosSim, at own best "
            "strengths (not compared at equal damage); not compared: AP.",
        ),
    ],
)
def test_headline_claims_what_the_adjusted_tests_say(rows: tuple[Comparison, ...], sentence: str) -> None:
    assert words.headline(with_comparisons(*rows)) == sentence


def test_a_mixed_finding_alone_is_still_a_sentence() -> None:
    assert words.headline(with_comparisons(ap(0.4, 0.01), ap(-0.3, 0.01, 0.05))) == (
        "More harmful test prompts were complied with under F* (CosSim+AP) than under AP at one strength, fewer at "
        "another."
    )


def test_headline_goes_by_the_outcome_judge_alone() -> None:
    judged = comparison("ap", 0.9, 1e-9, measure=JUDGE)
    assert words.headline(with_comparisons(judged)) == EMPTY


def test_headline_lists_every_method_under_what_holds_of_it() -> None:
    assert words.headline(synthetic_benchmark()) == (
        "More harmful test prompts were complied with under F* (CosSim+AP) than under AP and random features, at each "
        "method’s own best strength and at equal damage; than under AP per prompt and ActDiff, at own best strengths "
        "(not compared at equal damage); than under CosSim, at each method’s own best strength, not clearly at every "
        "budget of damage; fewer than under affine direction, at each method’s own best strength and at equal damage; "
        "no clear difference from F* per prompt, AP falling and direction."
    )


def test_claims_name_methods_with_their_differences() -> None:
    claims = dict(words.claims(synthetic_benchmark()))
    assert claims == {
        "F*: 4 features, c = −3": "90% [82–98] of 100 harmful test prompts complied with; clean, 3% [0–11].",
        "Each method at its own best strength": (
            "More than under AP (+40 [30 to 50]), AP per prompt (+35 [25 to 45]), ActDiff (+45 [35 to 55]), CosSim "
            "(+30 [20 to 40]) and random features (+86 [76 to 96]); fewer than under affine direction "
            "(−20 [−30 to −10]); no clear difference from F* per prompt (−2 [−12 to 8]), AP falling (+20 [10 to 30]) "
            "and direction (−6 [−16 to 4])."
        ),
        "Damage up to 0.02 nats per token": (
            "F* at c = −1, more than under AP (+30 [20 to 40]) and random features (+58 [48 to 68]); fewer than under "
            "affine direction (−37 [−47 to −27]); no clear difference from AP falling (+20 [10 to 30]) and CosSim "
            "(+5 [−5 to 15]); no strength within it: ActDiff and direction."
        ),
        f"By attack success ({JUDGE})": (
            "At own best strengths: more than under AP and random features; no clear difference from CosSim."
        ),
    }


def test_a_line_of_a_judge_of_harm_counts_its_ties() -> None:
    ties = [comparison("ap", 0.1, 0.9, measure=JUDGE), comparison("cossim", 0.1, 0.9, measure=JUDGE)]
    win = comparison("random", 0.8, 0.001, measure=JUDGE)
    within = [row.model_copy(update={"budget": 0.05}) for row in ties]
    result = with_comparisons(*ties, win, *within).model_copy(update={"judges": (JUDGE,)})
    assert words.claims(result)[-1].text == (
        "At own best strengths: more than under random features; no clear difference from 2 others. "
        "Within 0.05 nats per token: no clear difference from 2 methods."
    )


def test_claims_say_where_f_star_itself_has_no_strength() -> None:
    rows = (comparison("ap", None, budget=0.01, strength=None), comparison("cossim", None, budget=0.01, strength=None))
    claims = dict(words.claims(with_comparisons(*rows)))
    assert claims["Damage up to 0.01 nats per token"] == "F* has no strength within it."


def test_claims_where_nothing_was_scored_claim_nothing() -> None:
    claims = words.claims(emptied())
    assert claims[0].text == "nothing could be scored; clean, –."
    assert claims[1].text.startswith("Nothing scored: F* per prompt, AP, ")
    assert not any(word in claim.text for claim in claims for word in ("more", "fewer", "difference", "nan"))


def test_budgets_with_the_same_comparisons_are_one_group_and_others_are_not() -> None:
    rows = (ap(0.4, 0.01), ap(0.4, 0.01, 0.01), ap(0.4, 0.01, 0.05), ap(None, budget=0.1), ap(None, budget=0.2))
    found = [(group.budgets, group.rows[0].difference is None) for group in words.groups(with_comparisons(*rows))]
    # The first has the same numbers, but no budget: it is a group of its own. nan in p must not keep groups apart.
    assert found == [((), False), ((0.01, 0.05), False), ((0.1, 0.2), True)]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (ap(0.2, 0.049), "more"),
        (ap(-0.2, 0.049), "fewer"),
        (ap(0.2, 0.05), "unclear"),
        (ap(0.0, 0.01), "unclear"),
        (ap(0.2, NAN), "missing"),
        (ap(NAN, 0.01), "missing"),
        (ap(None, 0.01), "missing"),
    ],
)
def test_findings(row: Comparison, found: str) -> None:
    assert words.finding(row) == found


def test_numbers_and_points_show_signs_intervals_and_dashes() -> None:
    assert words.number_text(about(0.012, 0.004)) == "0.012 [0.008–0.016]"
    assert words.number_text(about(0.001, 0.004)) == "0.001 [−0.003 to 0.005]"
    assert words.number_text(Estimate(value=0.5, low=-math.inf, high=math.inf, n=1)) == "0.500"
    assert words.number_text(UNKNOWN) == words.number_text(None) == "–"
    assert words.points_text(about(-0.08, 0.06)) == "−8 [−14 to −2]"
    assert words.points_text(about(0.001, 0.06)) == "0 [−6 to 6]"
    assert words.points_text(UNKNOWN) == words.points_text(None) == "–"


def test_settings_say_what_their_unit_is() -> None:
    result = synthetic_benchmark()
    values = result.model_copy(update={"strength_unit": "value"})
    assert words.setting("ap", "suppress", -0.5, result) == "c = −0.5"
    assert words.setting("ap", "induce", 2.0, result) == "2 × peak"
    assert words.setting("ap", "induce", 40.0, values) == "v = 40"
    assert words.setting("direction", "induce", 2.0, values) == "2 × length"
    assert (
        words.setting("direction-affine", "suppress", 1.0, result) == words.setting("none", "none", 1.0, result) == ""
    )
    assert words.setting("ap", "suppress", None, result) == "–"


def test_pairs_of_strengths_tell_a_whole_direction_from_a_missing_strength() -> None:
    result = synthetic_benchmark()
    assert words.pair_text(comparison("ap", 0.1, 1.0, strength=-1.0), result) == "c = −1 / c = −3"
    assert words.pair_text(comparison("direction", 0.1, 1.0, other_strength=1.0), result) == "c = −3 / whole"
    assert words.pair_text(comparison("direction", None, other_strength=None), result) == "c = −3 / –"
    assert words.pair_text(comparison("ap", None, strength=None), result) == "– / c = −3"


def test_counts_and_shares_of_incoherent_answers() -> None:
    assert words.count_text(share(90, unscored=3)) == "100+3"
    assert words.count_text(UNSCORED) == "0+100"
    row = synthetic_benchmark().suppression[0]
    assert words.incoherent_text(row.model_copy(update={"behaviour": behaviour(50)})) == "2%"
    assert words.incoherent_text(emptied().suppression[0]) == "–"
    assert words.counters_text(Counters(answers=1234, verdicts_found=7)) == (
        "answers: 1,234 written, 0 found; verdicts: 0 given, 7 found; passes: 0 made, 0 found"
    )


def test_samples_say_how_they_came_about() -> None:
    sample = Answered(prompt="p", label="harmful", method="ap", kind="suppress", strength=-1.0, text="t", outcome=None)
    result = synthetic_benchmark()
    assert words.sample_text(sample, result) == "AP, c = −1 · unscored"
    partial = sample.model_copy(update={"method": "direction", "outcome": Outcome.PARTIAL_REFUSAL})
    assert words.sample_text(partial, result) == "direction · partial refusal"


def test_capability_changes_are_paired_where_questions_are_the_same() -> None:
    lines = words.capability_lines(synthetic_benchmark())
    by_task = {(line.row.task, line.method): line for line in lines}
    # Tasks together, in the order in which they were first measured.
    assert [line.row.task for line in lines] == ["arc"] * 8 + ["all"] * 8
    assert by_task["arc", "none"].change is None
    paired = by_task["arc", "cossim+ap"].change
    # One of four answers lost: mean −1/4, standard deviation of the differences 1/2, so ± 1.96 · 1/4.
    assert paired is not None
    assert (paired.value, paired.n) == (-0.25, 4)
    assert paired.high - paired.value == pytest.approx(1.96 / 4, rel=1e-4)
    whole = by_task["all", "cossim+ap"].change
    assert whole is not None
    assert whole.value == pytest.approx(-0.1)
    assert words.number_text(whole) == "−0.100"


def test_capability_on_other_questions_has_no_change() -> None:
    result = synthetic_benchmark()
    sides = tuple(
        side.model_copy(
            update={"capability": tuple(row.model_copy(update={"digest": side.method}) for row in side.capability)}
        )
        for side in result.side_effects
    )
    lines = words.capability_lines(result.model_copy(update={"side_effects": sides}))
    assert len(lines) == 16
    assert all(line.change is None for line in lines)
    assert capability("none")[0].digest == capability("ap")[0].digest


def test_sets_are_named_and_compared_with_f_star() -> None:
    lines = words.set_lines(synthetic_benchmark())
    # F* holds 2:10 3:11 2:12 3:13; the second set starts at 12 (layers 2 3 2 3), so it shares two.
    assert [(line.method, line.shared, line.layers) for line in lines] == [
        ("cossim+ap", 4, "2 in 2, 2 in 3"),
        ("ap", 2, "2 in 2, 2 in 3"),
        ("ap-falling", 4, "2 in 2, 2 in 3"),
        ("actdiff", 0, "2 in 2, 2 in 3"),
        ("cossim", 0, "2 in 2, 2 in 3"),
    ]


def test_the_knee_is_the_trial_that_the_search_took() -> None:
    result: BenchmarkResult = synthetic_benchmark()
    trial = words.knee(result)
    assert trial is not None
    assert words.trial_text(trial) == "direction of layer 4, position −2, K0 = 10, K* = 5, c = −3"
    assert words.knee(result.model_copy(update={"tuning": None})) is None


def test_chosen_rows_are_the_tuned_strengths_and_the_undisturbed_model() -> None:
    rows = [(row.method, row.strength) for row in words.chosen_rows(synthetic_benchmark())]
    assert rows[:3] == [("none", 1.0), ("cossim+ap", -3.0), ("cossim+ap-local", -3.0)]
    assert len(rows) == 11
    induced = [(row.method, row.strength) for row in words.chosen_induction(synthetic_benchmark())]
    assert induced[:2] == [("none", 0.0), ("cossim+ap", 2.0)]
    assert len(induced) == 8
