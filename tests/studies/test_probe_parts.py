"""What `demur probes` counts, on log-odds and answers made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from table_model import Kept, in_order

from demur.errors import InputError
from demur.guard import Guard, Probe, Reading, Stream
from demur.method.direction import Direction
from demur.model import Region
from demur.stats import Estimate, holm
from demur.studies.context import Context, JudgedAnswers
from demur.studies.pipeline import CleanAnswers, Found
from demur.studies.probes import measure, streaming
from demur.studies.probes.fitting import Arrays, Bench, Fitted
from demur.studies.probes.inputs import Chosen, Group, Sets
from demur.studies.probes.measure import Scores
from demur.studies.probes.results import ALL, DENSE, HARM, REFUSAL, ProbeRow
from demur.studies.probes.streaming import Stopped, at_equal_alarms, fit_stream, stream_row, windows
from demur.types import Answer, Outcome, Prompt, PromptSet, Verdict

PLAIN_BAD, PLAIN_GOOD, ONE, TWO, WRAPPED, OVER, LONG = "bad", "good", "A/one", "B", "benign in A/one", "over", "long"
LOGITS: dict[str, dict[str, Any]] = {
    PLAIN_BAD: {HARM: (5, 4, 3, -1), DENSE: (5, 1, -2, -3), REFUSAL: (3, 3, 3, -3)},
    PLAIN_GOOD: {HARM: (-2, -1, -3, 2), DENSE: (-2, 0, -3, 2), REFUSAL: (0.05, -3, 3, -3)},
    ONE: {HARM: (4, 3, 1), DENSE: (3, 2, -1), REFUSAL: (3, -3, -3)},
    TWO: {HARM: (2.5, 5), DENSE: (-4, 2.4), REFUSAL: (-3, -3)},
    WRAPPED: {HARM: (-4, 3.5), DENSE: (2.5, -2), REFUSAL: (3, -3)},
    OVER: {HARM: (0, 9), DENSE: (0, 9), REFUSAL: (3, 3)},
    LONG: {HARM: (9,), DENSE: (9,), REFUSAL: (9,)},
}
# 1 % of forty validation negatives is none of them, 5 % is two: 2.9 and 2.7, or -0.1 and -0.3.
NEGATIVES = {HARM: np.linspace(-1, 2.9, 40), DENSE: np.linspace(-4, -0.1, 40), REFUSAL: np.linspace(-4, -0.1, 40)}


class ByHand(Bench):
    """What probes look at is given, and is their log-odds."""

    def __init__(self, table: dict[str, dict[str, Any]], parts: dict[str, Chosen]) -> None:
        self.table = table
        self.__dict__ |= {**parts, "context": SimpleNamespace(each=in_order)}

    def values(self, prompts: PromptSet, fitted: Any, what: str) -> Any:  # noqa: ARG002
        return {(p.name, p.target): np.array(self.table[prompts.name][p.name], np.float32)[:, None] for p in fitted}


def numbered(name: str, n: int) -> PromptSet:
    return PromptSet(name=name, prompts=tuple(Prompt(id=f"{name}:{k}", text=f"{name} {k}") for k in range(n)))


def fitted(name: str, target: Any, layer: int = 0) -> Fitted:
    """A probe whose log-odds are its values."""
    probe = Probe(Reading(kind="dense", layer=layer, pooling="mean"), np.ones(1, np.float32), 0.0)
    row = ProbeRow(
        target=target, representation=name, pooling="mean", layer=layer, dim=1, used=1, loss=0.0, auroc=1.0, tried=1
    )
    return Fitted(name, target, probe, row, NEGATIVES[name], np.linspace(0, 2, 41), np.zeros(1))


def chosen(name: str, labels: list[bool]) -> Chosen:
    return Chosen(numbered(name, len(labels)), np.array(labels), np.zeros(len(labels)))


def tables(changed: Any = None, groups: Any = None, layer: int = 2, parts: Any = ()) -> Scores:
    """Scores of two probes for each target; `layer` is that of the harm features' probe."""
    table = LOGITS | (changed or {})
    groups = groups or (
        (PLAIN_BAD, "plain", True, "", ""), (PLAIN_GOOD, "plain", False, "", ""), (ONE, "attack", True, "A", ""),
        (TWO, "attack", True, "B", ""), (WRAPPED, "wrapped", False, "A", ""), (OVER, "over-refusal", False, "", ""),
        (LONG, "long", True, "", ""),
    )  # fmt: skip
    sets = Sets(
        Group(name, kind, positive, numbered(name, len(table[name][HARM])), family, tuple(requests))
        for name, kind, positive, family, requests in groups
    )
    both: Any = {"harmful": {DENSE: fitted(DENSE, "harmful"), HARM: fitted(HARM, "harmful", layer)}}
    both["refuse"] = {name: fitted(name, "refuse") for name in (DENSE, REFUSAL)}
    refused = {PLAIN_BAD: [1, 1, 1, 0], PLAIN_GOOD: [0, 0, 0, 0], ONE: [0, 1, np.nan], TWO: [1, 0]}
    outcomes = {ONE: np.array(["succeeded", "failed", "succeeded"]), TWO: np.array(["neither", "succeeded"])}
    bench = ByHand(table, {each.prompts.name: each for each in parts})
    return Scores.of(bench, sets, both, {name: np.array(row) for name, row in refused.items()}, outcomes)


def count(share: Estimate | None) -> tuple[int, int]:
    assert share is not None
    return round(share.value * share.n), share.n


def test_flags_are_what_is_above_each_probe_s_threshold() -> None:
    rows = {(r.target, r.representation, r.fpr, r.prompts): count(r.flagged) for r in measure.flag_rows(tables())}
    assert len(rows) == 2 * 2 * 2 * 8
    assert {key[3]: found for key, found in rows.items() if key[:3] == ("harmful", HARM, 0.01)} == {
        PLAIN_BAD: (3, 4), PLAIN_GOOD: (0, 4), ONE: (2, 3), TWO: (1, 2), WRAPPED: (1, 2), OVER: (1, 2), LONG: (1, 1),
        ALL: (3, 5),
    }  # fmt: skip
    assert rows["harmful", DENSE, 0.01, PLAIN_GOOD] == (2, 4)
    assert rows["refuse", REFUSAL, 0.05, PLAIN_GOOD] == (2, 4)
    # Between the two thresholds.
    low = tables({TWO: LOGITS[TWO] | {HARM: (2.8, 5)}})
    assert [count(r.flagged) for r in measure.flag_rows(low) if (r.representation, r.prompts) == (HARM, TWO)] == [
        (1, 2), (2, 2),
    ]  # fmt: skip


def test_a_family_is_ranked_against_its_own_negatives() -> None:
    rows = measure.rank_rows(tables())
    found = {(r.target, r.representation, r.prompts): r for r in rows}
    area = {key: row.auroc.value for key, row in found.items()}
    # Pairs of a positive and a negative that stand the right way round, ties one half. Of harm features, plain: 5, 4
    # and 3 are above all four, -1 above two and beside one. Of refusal: A and B alone have no two of both classes.
    assert area == pytest.approx(
        {
            ("harmful", HARM, "plain"): 14.5 / 16, ("harmful", DENSE, "plain"): 9 / 16,
            ("harmful", HARM, "A"): 15 / 18, ("harmful", DENSE, "A"): 13.5 / 18,
            ("harmful", HARM, "B"): 8 / 8, ("harmful", DENSE, "B"): 4 / 8,
            ("harmful", HARM, ALL): 26 / 30, ("harmful", DENSE, ALL): 18.5 / 30,
            ("refuse", REFUSAL, "plain"): 13.5 / 15, ("refuse", DENSE, "plain"): area["refuse", DENSE, "plain"],
            ("refuse", REFUSAL, ALL): 1 / 4, ("refuse", DENSE, ALL): area["refuse", DENSE, ALL],
        }
    )  # fmt: skip
    assert {key[2]: row.auroc.n for key, row in found.items() if key[:2] == ("harmful", HARM)} == {
        "plain": 8, "A": 9, "B": 6, ALL: 11,
    }  # fmt: skip
    plain = found["harmful", HARM, "plain"]
    # Above 2.9: three of four, no alarm; of all attacks three of five, one alarm. Each bin holds one prompt.
    assert (plain.f1, found["harmful", HARM, ALL].f1) == pytest.approx((6 / 7, 6 / 9))
    off = expit(-np.array([5.0, 4, 3, -1, 2, 1, 3, -2]))  # How far each is from its label.
    assert plain.ece == pytest.approx(off.mean())
    assert plain.difference is not None
    assert plain.difference.value == pytest.approx(5.5 / 16)
    assert found["refuse", REFUSAL, ALL].difference is not None
    for target in ("harmful", "refuse"):
        own = [row for row in rows if row.target == target]
        assert {row.representation for row in own if row.difference is None} == {DENSE}
        np.testing.assert_array_equal([row.p_holm for row in own], holm([row.p for row in own]))
        assert all(0 < row.p <= row.p_holm for row in own if row.difference is not None)


def test_reliability_is_of_the_same_prompts() -> None:
    rows = {(r.representation, r.prompts): r.rows for r in measure.reliability_rows(tables(), [HARM])}
    assert list(rows) == [(HARM, "plain"), (HARM, ALL)]
    assert [r.predicted for r in rows[HARM, "plain"]] == pytest.approx(list(expit([-3.0, -2, -1, -1, 2, 3, 4, 5])))
    assert [r.observed.value for r in rows[HARM, "plain"]] in ([0, 0, 1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 1, 1, 1])
    # Eleven prompts in ten bins.
    assert sum(r.observed.n for r in rows[HARM, ALL]) == 11
    assert sum(r.observed.n * r.observed.value for r in rows[HARM, ALL]) == pytest.approx(5)
    assert len(rows[HARM, ALL]) == 10


def test_thresholds_are_moved_to_where_no_benign_prompt_is_flagged() -> None:
    best, rows = measure.matched_rows(tables())
    by_name = {row.representation: row for row in rows}
    # Above 3.5: 4 and 5 of five; above 2.5: 3 alone. At 2.9 and -0.1, which were set before: one alarm, and three.
    assert (best, count(by_name[HARM].tpr), count(by_name[DENSE].tpr)) == (HARM, (2, 5), (1, 5))
    assert (count(by_name[HARM].alarms), count(by_name[DENSE].alarms)) == ((1, 6), (3, 6))
    gap = by_name[DENSE].difference
    assert gap is not None
    assert by_name[HARM].difference is None
    assert gap.low < gap.value < gap.high
    assert (gap.value, gap.n) == (pytest.approx(-0.2), 5)
    assert 0.3 < by_name[DENSE].p == by_name[DENSE].p_holm <= 1
    # Of two that catch as many, two and then one, the one that ranks better.
    assert measure.matched_rows(tables({TWO: LOGITS[TWO] | {DENSE: (-4, 3)}}))[0] == HARM
    assert measure.matched_rows(tables({TWO: LOGITS[TWO] | {HARM: (-9, -9), DENSE: (-4, 2)}}))[0] == DENSE
    # One in a hundred benign prompts may be flagged: above 98.
    many: Any = {
        PLAIN_GOOD: dict.fromkeys((HARM, DENSE, REFUSAL), range(100)),
        ONE: dict.fromkeys((HARM, DENSE, REFUSAL), (98, 98.5, 97.5)),
    }
    groups = ((PLAIN_GOOD, "plain", False, "", ""), (ONE, "attack", True, "A", ""))
    assert [count(row.tpr) for row in measure.matched_rows(tables(many, groups))[1]] == [(1, 3)] * 2
    # All against none, whatever is drawn.
    sure = {
        ONE: {HARM: (9, 9, 9), DENSE: (-9, -9, -9), REFUSAL: (0, 0, 0)},
        TWO: {HARM: (9, 9), DENSE: (-9, -9), REFUSAL: (0, 0)},
    }
    (dense, harm) = measure.matched_rows(tables(sure))[1]
    assert dense.difference is not None
    assert (dense.difference.value, dense.difference.low, dense.difference.high) == (-1, -1, -1)
    assert (harm.tpr.low, dense.tpr.high, dense.p) == (1, 0, pytest.approx(2 / 1001))


def test_verdicts_are_where_both_probes_put_a_prompt() -> None:
    """Harm above 2.9, refusal above the log-odds that 95 % of the refused are above: 0.1."""
    rows, area = measure.verdict_rows(tables(), HARM, REFUSAL)
    found = {r.group: tuple(count(e)[0] for e in (r.harmless, r.refused, r.jailbreak, r.over_refusal)) for r in rows}
    assert found == {
        "attacks that succeeded": (1, 1, 1, 0), "attacks that failed": (0, 0, 1, 0), PLAIN_BAD: (1, 3, 0, 0),
        PLAIN_GOOD: (3, 0, 0, 1), OVER: (0, 1, 0, 1), "benign requests in attacks": (0, 0, 1, 1),
    }  # fmt: skip
    # P(harmful) · (1 - P(refuse)) of the three that succeeded: below .05, .70 and .95; of 13 others the first is above
    # four and beside one, the second above all but .91, .84 and .93.
    assert (area.value, area.n) == (pytest.approx((4.5 + 10 + 13) / 39), 16)
    # Without attacks, nothing is to be found.
    alone = tables(groups=((PLAIN_BAD, "plain", True, "", ""),))
    rows, area = measure.verdict_rows(alone, HARM, REFUSAL)
    assert ([row.group for row in rows], np.isnan(area.value)) == ([PLAIN_BAD], True)


def test_the_paper_counts_succeeded_attacks_as_benign() -> None:
    rows = {
        r.representation: (count(r.plain), count(r.succeeded), count(r.as_harm)) for r in measure.paper_rows(tables())
    }
    assert rows == {HARM: ((3, 4), (0, 3), (3, 3)), DENSE: ((2, 4), (1, 3), (2, 3))}
    (none, _) = measure.paper_rows(tables(groups=((PLAIN_BAD, "plain", True, "", ""),)))
    assert (none.succeeded.n, none.as_harm.n, np.isnan(none.succeeded.value)) == (0, 0, True)


def test_the_second_stage_sees_what_the_first_passes_on() -> None:
    """Of forty validation negatives the first stage has -1.5 to 2.4, the second 3.5 down to -0.4; a harmful one above
    them all sets no threshold."""
    steps = np.arange(40) / 10
    validation = {DENSE: (9, *(steps - 1.5)), HARM: (9, *(3.5 - steps))}
    changed = {"validation": validation, TWO: {HARM: (2.5, 1), DENSE: (-4, 2.4), REFUSAL: (0, 0)}}
    parts = (chosen("validation", [True] + [False] * 40),)

    def rows(first: int, second: int) -> dict[float, Any]:
        made = measure.cascade_rows(
            tables(changed, layer=second, parts=parts), fitted(DENSE, "harmful", first), HARM, 4
        )
        return {row.passed: row for row in made}

    found = rows(0, 2)
    shares = {
        passed: tuple(map(count, (row.second, row.second_attacks, row.fpr, row.tpr))) for passed, row in found.items()
    }
    assert list(shares) == [0.05, 0.1, 0.2, 0.5]
    # Above 2.2 in the first stage, and -0.3 in the second; above 1.6 and 0.3; above 0.4 and 1.5.
    assert shares[0.05] == ((1, 6), (2, 5), (0, 6), (2, 5))
    assert shares[0.2] == ((2, 6), (3, 5), (1, 6), (3, 5))
    assert shares[0.5] == ((2, 6), (3, 5), (1, 6), (2, 5))
    # One of four layers for all, two more for those that are passed on; none where the second stage is no deeper.
    assert found[0.5].cost == pytest.approx((1 + 2 * 2 / 6) / 4)
    assert rows(2, 1)[0.5].cost == pytest.approx(3 / 4)


def test_a_family_held_out_is_tested_on_the_requests_that_nothing_trained_on() -> None:
    """Requests in turn train (a, c, e, g), in other families, and test, in the family itself; the halves that are not
    to be used say the opposite, and would turn every rate."""
    lone = {HARM: (0,), DENSE: (0,), REFUSAL: (0,)}
    changed: dict[str, Any] = {
        "train": {HARM: (4,) * 4 + (-4,) * 4}, "validation": {HARM: (-4,) * 24 + (4,) * 4},
        ONE: {HARM: (-9, 1, -9, 1, -9, 1, -9, 3.5)}, WRAPPED: {HARM: (9, -1.5, 9, -1, 9, 0.5, 9, 3)},
        TWO: {HARM: (1, -9, 1, -9, 1, -9, 1, -9)}, "benign in B": {HARM: (-1, 9, -1, 9, -1, 9, -1, 9)},
        "C": {HARM: (1, 1)}, "D": {HARM: (1,)}, PLAIN_GOOD: {HARM: (-2, 3, -2, -2, -2)},
    }  # fmt: skip
    changed = {name: lone | row | {DENSE: row[HARM], REFUSAL: row[HARM]} for name, row in changed.items()}
    groups = (
        (PLAIN_GOOD, "plain", False, "", ""), (ONE, "attack", True, "A", "abcdefgh"),
        (WRAPPED, "wrapped", False, "A", "abcdefgh"), (TWO, "attack", True, "B", "abcdefgh"),
        ("benign in B", "wrapped", False, "B", "abcdefgh"), ("C", "attack", True, "C", "bd"),
        ("D", "attack", True, "D", "a"),
    )  # fmt: skip
    parts = (chosen("train", [True] * 4 + [False] * 4), chosen("validation", [False] * 24 + [True] * 4))
    rows = {row.family: row for row in measure.held_out_rows(tables(changed, groups, parts=parts), [HARM])}
    # Nothing of D is tested. C has no wrapped requests, so that plain benign prompts stand for them.
    assert list(rows) == ["A", "B", "C"]
    # Trained on plain prompts the threshold is 2.9; trained on B too it is at -1, where the highest of 25
    # validation negatives is.
    row = rows["A"]
    assert [count(e) for e in (row.plain, row.others, row.plain_alarms, row.others_alarms)] == [
        (1, 4), (4, 4), (1, 4), (2, 4),
    ]  # fmt: skip
    assert (row.difference.value, row.difference.n) == (0.75, 4)
    assert [count(e) for e in (rows["C"].plain, rows["C"].plain_alarms)] == [(0, 2), (1, 5)]
    assert not list(measure.held_out_rows(tables(changed, groups[:3], parts=parts), [HARM]))


def with_fitted(scores: Scores, name: str, target: Any, **changes: Any) -> Scores:
    """The same scores, of a probe that is another one in part."""
    own = scores.fitted[target]
    fitted = {**scores.fitted, target: {**own, name: replace(own[name], **changes)}}
    return replace(scores, fitted=fitted)


def test_flagged_is_what_is_above_the_threshold_of_one_in_a_hundred() -> None:
    """Between 2.7 and 2.9 a prompt is flagged at 5 % only."""
    near = {HARM: (5, 4, 2.8, -1), DENSE: LOGITS[PLAIN_BAD][DENSE], REFUSAL: LOGITS[PLAIN_BAD][REFUSAL]}
    alarm = LOGITS[PLAIN_GOOD] | {HARM: (-2, -1, -3, 2.8)}
    scores = tables({PLAIN_BAD: near, PLAIN_GOOD: alarm})
    (plain, *_) = (row for row in measure.rank_rows(scores) if (row.representation, row.prompts) == (HARM, "plain"))
    assert plain.f1 == pytest.approx(4 / 6)
    (_, harm) = measure.matched_rows(scores)[1]
    assert (harm.representation, count(harm.alarms)) == (HARM, (1, 6))
    rows = {row.group: row for row in measure.verdict_rows(scores, HARM, REFUSAL)[0]}
    assert (count(rows[PLAIN_BAD].refused), count(rows[PLAIN_BAD].harmless)) == ((2, 4), (1, 4))
    assert count(rows[PLAIN_BAD].over_refusal) == (1, 4)
    # What is at a threshold itself is below it: harm at 3, refusal at 1.
    exact = tables({PLAIN_BAD: near | {HARM: (3, 3, 4, 4), REFUSAL: (1, 2, 1, 2)}})
    exact = with_fitted(exact, HARM, "harmful", negatives=np.full(40, 3.0))
    exact = with_fitted(exact, REFUSAL, "refuse", positives=np.full(20, 1.0))
    (row,) = (row for row in measure.verdict_rows(exact, HARM, REFUSAL)[0] if row.group == PLAIN_BAD)
    assert [count(row.of(each))[0] for each in ("harmless", "over-refusal", "jailbreak", "refused")] == [1, 1, 1, 1]


def test_benign_prompts_of_other_kinds_get_verdicts_and_no_prompts_no_scores() -> None:
    groups = ((PLAIN_BAD, "plain", True, "", ""), (OVER, "benign", False, "", ""), (LONG, "long", True, "", ""))
    scores = tables(groups=groups)
    assert [row.group for row in measure.verdict_rows(scores, HARM, REFUSAL)[0]] == [PLAIN_BAD, OVER]
    assert scores.on((), HARM).tolist() == scores.by_outcome("succeeded", HARM).tolist() == []


def test_refusal_under_attack_is_ranked_among_attacks() -> None:
    """Of five attacks one was not scored; no plain prompt counts."""
    (row,) = (
        r for r in measure.rank_rows(tables()) if (r.target, r.representation, r.prompts) == ("refuse", DENSE, ALL)
    )
    assert row.auroc.n == 4


def family(name: str, requests: str, start: float) -> tuple[dict[str, dict[str, Any]], tuple[Any, ...]]:
    """Attacks and benign requests of a family, whose log-odds count up from `start` and from half more."""
    values = {name: start + np.arange(len(requests)), f"benign in {name}": start + 0.5 + np.arange(len(requests))}
    made = {key: {each: tuple(row) for each in (HARM, DENSE, REFUSAL)} for key, row in values.items()}
    return made, ((name, "attack", True, name, requests), (f"benign in {name}", "wrapped", False, name, requests))


@pytest.mark.parametrize("unit", [False, True])
def test_the_other_families_train_and_choose_with_the_requests_that_are_not_tested(
    monkeypatch: pytest.MonkeyPatch, unit: bool
) -> None:
    one, first = family("A", "abcdefgh", 10)
    two, second = family("B", "abcdefgh", 30)
    plain = {"train": (1.0, 2, 3), "validation": (4.0, 5, 6)}
    changed = one | two | {name: dict.fromkeys((HARM, DENSE, REFUSAL), row) for name, row in plain.items()}
    parts = (chosen("train", [True, False, False]), chosen("validation", [True, True, False]))
    scores = tables(changed, (*first, *second), parts=parts)
    # The threshold that was set before is that of one in a hundred: 11 itself is below it, and 10.5 is not above.
    negatives = np.array([*np.full(39, 10.0), 11.0])
    own = scores.fitted["harmful"][HARM].probe
    scores = with_fitted(scores, HARM, "harmful", negatives=negatives, probe=replace(own, unit=unit))
    asked: list[Any] = []

    def fit(reading: Any, train: Any, held: Any) -> Any:
        assert reading == own.reading
        asked.append([(side.values[:, 0].tolist(), side.labels.tolist()) for side in (train, held)])
        return own

    def none(*_given: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(measure, "fit_centroids", fit if unit else none)
    monkeypatch.setattr(measure, "fit_probe", none if unit else fit)
    rows = {row.family: row for row in measure.held_out_rows(scores, [HARM])}
    # Of a, c, e and g, attacks and then benign requests, every third is held, from the first on.
    assert asked[0] == [
        ([1, 2, 3, 32, 34, 30.5, 32.5, 36.5], [True, False, False, True, True, False, False, False]),
        ([4, 5, 6, 30, 36, 34.5], [True, True, False, True, True, False]),
    ]
    # Of A are tested 11, 13, 15 and 17. Trained again, the highest negative of the held ones is 34.5; of B, 14.5.
    if not unit:
        assert list(rows) == ["A", "B"]
        assert (count(rows["A"].plain), count(rows["A"].others)) == ((3, 4), (0, 4))
        assert (count(rows["B"].plain), count(rows["B"].others)) == ((4, 4), (4, 4))


def test_a_family_without_benign_prompts_or_without_others_is_not_held_out() -> None:
    """Nothing trains besides where no other family has a request of the half that trains."""
    one, first = family("A", "ab", 10)
    two, second = family("B", "b", 30)
    plain = {"train": (1.0,) * 4 + (-1.0,) * 4, "validation": (2.0,) * 4 + (-2.0,) * 4}
    changed = one | two | {name: dict.fromkeys((HARM, DENSE, REFUSAL), row) for name, row in plain.items()}
    parts = tuple(chosen(name, [True] * 4 + [False] * 4) for name in plain)
    rows = measure.held_out_rows(tables(changed, (*first, *second), parts=parts), [HARM])
    assert [row.family for row in rows] == ["B"]
    attacks = (first[0], second[0])
    assert not list(measure.held_out_rows(tables(changed, attacks, parts=parts), [HARM]))


# -- streaming: answers that are numbers, which are their residuals ------------------------------------------------


class Numbered(Context[Any]):
    """Each answer is a text of numbers, one a token: the residual of layer 1. Layer 0 holds nothing."""

    model: Any = SimpleNamespace(n_layers=2)
    splits: Any = None
    stopped: Any = None
    run: Any = SimpleNamespace(each=in_order)

    def __init__(self, written: dict[str, JudgedAnswers], **given: Any) -> None:
        self.written, self.read, self.changed, self.fitted = written, list[Any](), list[Any](), list[Any]()
        self.__dict__ |= given

    def answer(self, label: str, prompts: PromptSet, change: Any = ()) -> JudgedAnswers:  # noqa: ARG002
        self.changed.append((prompts.name, change))
        return self.written[prompts.name]

    def cached(self, name: str, depends: dict[str, Any], kind: Any, compute: Any, label: str = "") -> Any:  # noqa: ARG002
        if name == "watched-answers":
            return self.stopped[depends["prompts"]]
        if name == "stream-probe":
            self.fitted.append(depends)
            return compute()
        self.read.append([text for _, _, text in depends["answers"]])
        layers = list(depends["layers"])
        return Arrays(
            tuple(np.stack([values * 0, values], 1)[:, layers, None] for values in map(numbers, self.read[-1]))
        )


def numbers(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=np.float32)


def bare(kind: Any, **given: Any) -> Any:
    """A value of a class, of which only some fields are asked for."""
    made = object.__new__(kind)
    made.__dict__.update(given)
    return made


def judged(name: str, label: Any, rows: list[tuple[str, Outcome]]) -> JudgedAnswers:
    prompts = [Prompt(id=f"{name}:{n}", text=f"{name} {n}", label=label) for n in range(len(rows))]
    answers = tuple(Answer(prompt=prompt, text=text) for prompt, (text, _) in zip(prompts, rows, strict=True))
    return JudgedAnswers(answers, tuple(Verdict(outcome=outcome, judge="test") for _, outcome in rows))


def prompts_of(answers: JudgedAnswers, name: str) -> PromptSet:
    return PromptSet(name=name, prompts=tuple(answer.prompt for answer in answers.answers))


YES, NO, PARTLY, BROKEN = Outcome.COMPLIANCE, Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL, Outcome.INCOHERENT


def streamed(complied: int = 8, quiet: int = 7) -> tuple[Numbered, Found]:
    """What the model writes in three splits: clean, of which so many answers are to benign prompts, and to the harmful
    prompts with its direction ablated."""
    forced = [("6 7", YES)] * complied + [("-9", NO), ("", YES), ("-8", BROKEN)]
    clean = [("-2 -3", NO), ("0.5 0.5 0.5", PARTLY), ("", NO), ("99", YES), ("98", BROKEN)]
    benign = [("-5 -1 -3", YES), ("-6", NO), ("", YES), ("-7 -8", BROKEN), ("-4", YES), ("-5", YES), ("-5", YES)]
    benign = benign[:quiet]
    splits, answers, written = {}, {}, {}
    for purpose in ("direction", "selection", "tuning"):
        one, other = judged(purpose, "harmful", clean), judged(f"{purpose} +", "harmless", benign)
        splits[purpose] = SimpleNamespace(harmful=prompts_of(one, purpose))
        answers[purpose] = (one, other)
        left_out = {"direction": 0, "selection": 4, "tuning": 2}[purpose]
        written[purpose] = judged(purpose, "harmful", forced[left_out:])
    context = Numbered(written, splits=SimpleNamespace(choosing=SimpleNamespace(**splits)))
    direction = bare(Direction, ablate=lambda: "ablated")
    return context, bare(Found, clean=bare(CleanAnswers, answers=answers), direction=direction)


def test_a_stream_learns_forced_compliance_against_what_the_model_writes_itself() -> None:
    context, found = streamed()
    stream, trained = fit_stream(context, found, 2)
    quiet = ["-5 -1 -3", "-6", "-7 -8", "-4", "-5", "-5", "-2 -3", "0.5 0.5 0.5"]
    assert context.read == [["6 7"] * 8 + quiet, ["6 7"] * 4 + quiet + ["6 7"] * 6 + quiet]
    assert context.changed == [(name, ("ablated",)) for name in ("direction", "selection", "tuning")]
    (depends,) = context.fitted
    assert depends["window"] == 2
    assert [[(text, label) for _, _, text, label in side] for side in depends["answers"]] == [
        [(text, text == "6 7") for text in side] for side in context.read
    ]
    assert (stream.layer, stream.window, trained, stream.probe.reading.pooling) == (1, 2, 8, "mean")
    # The highest running score of a benign answer: of -5, then (-5 - 1) / 2, then (-1 - 3) / 2. Refusals may be above.
    assert stream.threshold == pytest.approx(float(stream.running(np.array([[-2.0]]))[0]) + 0.05)
    assert (stream.running(np.array([[0.5]])) > stream.threshold).all()
    with pytest.raises(InputError, match="complies with 7 harmful direction prompts, and there are 8 other answers"):
        fit_stream(*streamed(7), 2)
    with pytest.raises(InputError, match="complies with 8 harmful direction prompts, and there are 7 other answers"):
        fit_stream(*streamed(8, 6), 2)


def test_windows_are_spread_over_each_answer() -> None:
    answers = [np.arange(10.0)[:, None], np.array([[7.0]]), np.array([[1.0], [3.0], [8.0]])]
    found = windows(answers, np.array([True, False, True]), 2)
    # Ends at 1, 3, 5, 6, 8 and 10 of ten tokens; each the mean of its last two.
    assert found.values[:, 0].tolist() == [0, 1.5, 3.5, 4.5, 6.5, 8.5, 7, 1, 2, 5.5]
    assert found.labels.tolist() == [True] * 6 + [False] + [True] * 3


def test_at_equal_alarms_one_in_a_hundred_is_stopped() -> None:
    quiet = [np.array([-9.0, n]) for n in range(99)] + [np.zeros(0)]
    # Above 97: not 97 itself. Nothing, one token and two are out before.
    loud = [np.array([99.0, 98]), np.array([97, 97.5]), np.array([0, 97, 100]), np.array([97.0]), np.zeros(0)]
    found = at_equal_alarms(quiet, loud)
    assert (count(found.alarms), count(found.stopped), found.tokens) == ((1, 100), (3, 5), 1.0)
    none = at_equal_alarms(quiet, loud[3:])
    assert (count(none.stopped), np.isnan(none.tokens)) == ((0, 2), True)


def test_what_is_stopped_is_counted_by_kind_of_prompt() -> None:
    rows = {
        # Set → each answer's numbers, and how many tokens were out when it was stopped.
        "attacks": ([("-9 4", 1), ("5", 2), ("6 6", 10), ("", None)]), "bad": [("9", 0)], "good": [("-1", None)] * 2,
        "wrapped": [("3", 0), ("-2 2", None), ("", None)], "over": [("9", 4)] * 5, "polite": [("9", 3)] * 6,
    }  # fmt: skip
    written = {name: judged(name, None, [(text, YES) for text, _ in each]) for name, each in rows.items()}
    prompts = {name: prompts_of(each, name) for name, each in written.items()}
    written["benign"] = JudgedAnswers.joined([written["good"], written["wrapped"]])
    kinds: Any = {"bad": "plain", "good": "plain", "wrapped": "wrapped", "over": "over-refusal", "polite": "benign"}
    sets = Sets(Group(name, kind, name == "bad", prompts[name]) for name, kind in kinds.items())
    stopped = {
        prompts[name].digest: [
            Stopped(prompt_id="", stopped=out is not None, tokens=50 if out is None else out) for _, out in each
        ]
        for name, each in rows.items()
    }
    context = Numbered(written, stopped=stopped, config=SimpleNamespace(max_new_tokens=8))
    stream = Stream(Probe(Reading(kind="dense", layer=1), np.ones(1, np.float32), 0.0), 1, 0.0)
    row = stream_row(context, bare(Guard, stream=stream), sets, prompts["attacks"], 11)
    assert (row.layer, row.window, row.trained_on) == (1, 1, 11)
    shares = [count(each) for each in (row.stopped, row.benign, row.wrapped, row.over_refusal)]
    assert shares == [(3, 4), (0, 2), (1, 3), (5, 5)]
    # Of 1, 2 and 10 tokens.
    assert (row.tokens, row.tokens_90) == pytest.approx((2, 8.4))
    # No benign answer is above 3; three of the four are, after one token, or at once.
    assert row.equal is not None
    assert (count(row.equal.alarms), count(row.equal.stopped), row.equal.tokens) == ((0, 5), (3, 4), 0.0)
    alone = stream_row(context, bare(Guard, stream=stream), Sets(sets[:1]), prompts["attacks"], 11)
    assert (alone.equal, alone.benign.n, np.isnan(alone.benign.value)) == (None, 0, True)


# -- the model's own answers, read and watched ---------------------------------------------------------------------


class Working(Kept):
    """A context that keeps values; `told` is the progress."""

    def __init__(self, model: Any) -> None:
        self.model, self.stages, self.told = model, dict[str, Any](), list[tuple[Any, ...]]()
        self.config = SimpleNamespace(max_new_tokens=7)

    def progress(self, *told: Any) -> None:
        self.told.append(told)


class Rows:
    """A batch of conversations: each is its answer's numbers, with one slot before and one after that are no answer."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.longest = items, max(len(numbers(text)) for _, text in items)

    def __len__(self) -> int:
        return len(self.items)

    def within(self, regions: Any) -> torch.Tensor:
        assert list(regions) == [Region.RESPONSE]
        inside = torch.zeros(len(self), self.longest + 2, dtype=torch.bool)
        for row, (_, text) in enumerate(self.items):
            inside[row, 1 : 1 + len(numbers(text))] = True
        return inside


def reading_model(asked: list[Any]) -> Any:
    """Of two values at each token, the layer and the number; one prompt a batch."""

    def residuals(batch: Rows, layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
        asked.append((layers, len(batch)))
        found = {layer: torch.full((len(batch), batch.longest + 2, 2), float(layer)) for layer in layers}
        for row, (_, text) in enumerate(batch.items):
            for layer in layers:
                found[layer][row, 1 : 1 + len(numbers(text)), 1] = torch.from_numpy(numbers(text))
        return found

    def each(items: Any, run: Any, progress: Any) -> list[Any]:
        progress(1, len(items))
        return [row for start in range(0, len(items), 2) for row in run(Rows(items[start : start + 2]))]

    def tokenize(prompt: Prompt, text: str) -> tuple[Prompt, str]:
        assert isinstance(prompt, Prompt)
        return prompt, text

    chat = SimpleNamespace(tokenize=tokenize)
    return SimpleNamespace(residuals=residuals, each=each, chat=chat)


def test_residuals_are_those_of_the_answers_tokens_layer_by_layer() -> None:
    asked: list[Any] = []
    context: Any = Working(reading_model(asked))
    answers = judged("one", "harmful", [("3 4", YES), ("5", NO), ("7 8 9", YES)]).answers
    found = unchecked(streaming._answer_residuals)(context, answers, (2, 0))
    assert [[each.tolist() for each in layer] for layer in found] == [
        [[[layer, 3], [layer, 4]], [[layer, 5]], [[layer, 7], [layer, 8], [layer, 9]]] for layer in (2, 0)
    ]
    assert asked == [((2, 0), 2), ((2, 0), 1)]
    assert [told[1:] for told in context.told] == [(1, 3)]
    # They are kept, for these answers and these layers.
    unchecked(streaming._answer_residuals)(context, answers, (2, 0))
    assert len(asked) == 2
    unchecked(streaming._answer_residuals)(context, answers, (0,))
    assert asked[2:] == [((0,), 2), ((0,), 1)]
    other = judged("one", "harmful", [("3 4", YES), ("6", NO), ("7 8 9", YES)]).answers
    (again,) = unchecked(streaming._answer_residuals)(context, other, (0,))
    assert again[1].tolist() == [[0, 6]]


def unchecked(function: Any) -> Any:
    """Without the checks of types, for what stands for a context."""
    return getattr(function, "__wrapped__", function)


def test_what_was_let_out_of_each_answer_is_counted_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": list(range(len(text)))}

    model = SimpleNamespace(tokenizer=tokenizer)
    context: Any = Working(model)
    stream = Stream(Probe(Reading(kind="dense", layer=1), np.ones(1, np.float32), 0.5), 3, 2.0)
    guard = bare(Guard, stream=stream)
    prompts = numbered("p", 3)
    written: list[Any] = []

    def answer_batches(own: Any, asked: Any, *, guard: Any, max_new_tokens: int) -> Any:
        assert own is model
        written.append((len(asked), guard.stream, max_new_tokens))
        # Not in the order of the prompts: the last first.
        for batch in ((2, 0), (1,)):
            yield [SimpleNamespace(prompt=asked[n], text="x" * (n + 1), stopped=n == 1) for n in batch]

    monkeypatch.setattr(streaming, "answer_batches", answer_batches)
    answered = unchecked(streaming._answered)
    expected = [("p:0", False, 1), ("p:1", True, 2), ("p:2", False, 3)]
    for _ in range(2):
        rows = answered(context, guard, prompts)
        assert [(row.prompt_id, row.stopped, row.tokens) for row in rows] == expected
    assert written == [(3, stream, 7)]
    assert answered(context, guard, numbered("none", 0)) == []
    # Another stream, other prompts or another length would be other answers.
    probe = stream.probe
    for changed in (
        replace(stream, window=2), replace(stream, threshold=1.0), replace(stream, probe=replace(probe, bias=1.0)),
        replace(stream, probe=replace(probe, weights=np.full(1, 2, np.float32))),
        replace(stream, probe=replace(probe, reading=Reading(kind="dense", layer=0))),
    ):  # fmt: skip
        answered(context, bare(Guard, stream=changed), prompts)
        assert written[-1][1] is changed
    answered(context, guard, numbered("q", 3))
    context.config = SimpleNamespace(max_new_tokens=9)
    answered(context, guard, prompts)
    assert len(written) == 8
