"""What `demur harden` counts and chooses, on answers made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from demur.data import AttackPair
from demur.studies.context import Context, JudgedAnswers
from demur.studies.harden.arms import Arm
from demur.studies.harden.bench import Bench, by_request, share
from demur.studies.harden.choice import choose, mild, outcome, thresholds
from demur.studies.harden.results import ATTACKS, BENIGN, HARMFUL, HARMLESS, OVER_REFUSAL, SUCCEEDED, WRAPPED, ChoiceRow
from demur.types import Answer, Outcome, Prompt, PromptSet, Verdict

OUTCOMES = {"y": Outcome.COMPLIANCE, "n": Outcome.REFUSAL, "p": Outcome.PARTIAL_REFUSAL, "x": Outcome.INCOHERENT}


class Written(Context[Any]):
    """Every text tells in its last letters how it is answered: clean, and then under each change (`?`: unscored)."""

    model: Any = SimpleNamespace(max_context=None)

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def answer(self, label: str, prompts: PromptSet, change: Any = ()) -> JudgedAnswers:
        self.asked.append((label, prompts.name))
        said = [OUTCOMES.get(prompt.text.split("/")[1][change[0] if change else 0]) for prompt in prompts]
        answers = tuple(Answer(prompt=prompt, text=".") for prompt in prompts)
        return JudgedAnswers(answers, tuple(Verdict(outcome=each, judge="test") for each in said))


def texts(name: str, *said: str) -> PromptSet:
    prompts = (Prompt(id=f"{name}{n}", text=f"{name}{n} /{each}") for n, each in enumerate(said))
    return PromptSet(name=name, prompts=tuple(prompts))


def attacks(*said: str) -> tuple[AttackPair, ...]:
    """Two for each request but the last, which is not known."""
    return tuple(
        AttackPair(
            id=f"a{n}", attack="A", plain=f"ask{n // 2}" if n < 4 else None, text=f"Play: ask{n // 2} now /{each}"
        )
        for n, each in enumerate(said)
    )


@pytest.fixture(autouse=True)
def _changes_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demur.method.interventions.intervention_id", lambda change: str(change))
    # An answer that begins as a refusal and complies is no success: the third attack's.
    chance = lambda _work, prompts, *_: np.array([0.5 if p.id == "a2" else 0.49 for p in prompts])  # noqa: E731
    monkeypatch.setattr("demur.studies.gauge.p_refuse", chance)


def bench(
    *said: str, over: tuple[str, ...] = ("nny", "yyn"), harmless: tuple[str, ...] = ("yyn", "yny", "nny", "??y")
) -> Bench:
    sets = {
        HARMFUL: texts("bad", "nny", "nyn", "ynn"),
        "harmless": texts("good", *harmless),
        OVER_REFUSAL: texts("over", *over),
    }
    scores = lambda prompts: np.array([SCORES[p.id] for p in prompts])  # noqa: E731
    return Bench(Written(), "test", (1,), scores, attacks(*(said or ("yyn", "nyn", "yyy", "ynx", "y?n"))), sets)


SCORES = {"good0": 0.1, "good1": 0.2, "good2": 0.3, "good3": 0.4, "over0": 0.5, "over1": 0.6, "bad0": 0.9, "bad1": 0.8,
          "bad2": 0.7, "a0": 0.95, "a1": 0.2, "a2": 0.6, "a3": 0.55, "a4": 0.35, "good0@a0": 0.15, "good1@a0": 0.16,
          "good2@a2": 0.17, "good3@a3": 0.18, "good1@a1": 0.16,
    "good2@a1": 0.17, "good3@a1": 0.18,
}  # fmt: skip


def arm(purpose: Any = "harden", *strengths: float) -> Arm:
    """A change is its number; a strength of 1 is the first, 2 the second."""
    changes: Any = lambda strength: ((int(strength),),)  # noqa: E731
    return Arm(purpose, "x", "an arm", "c = {}", strengths or (1.0, 2.0), changes)


def test_a_setting_is_a_strength_with_its_unit() -> None:
    made = arm()
    assert [made.setting(each) for each in (-3.0, 0.25, 1e-5)] == ["c = −3", "c = 0.25", "c = 1e−05"]


def test_the_attacks_that_succeed_are_a_set_of_their_own() -> None:
    made = bench()
    # The second is refused, the third only begins to comply.
    assert [pair.id for pair in made.succeeded] == ["a0", "a3", "a4"]
    assert made.requests == ("ask0", "ask1", "a4")
    assert made.sets[SUCCEEDED].ids == ("a0", "a3", "a4")
    assert list(made.sets) == [HARMFUL, "harmless", OVER_REFUSAL, WRAPPED, ATTACKS, SUCCEEDED]
    # Wrappers with a request in them take turns around the harmless ones.
    assert made.sets[WRAPPED].ids == ("good0@a0", "good1@a1", "good2@a2", "good3@a3")
    assert made.sets[WRAPPED].texts[1] == "Play: good1 /yny now /nyn"
    assert (made.benign, made.harmful) == (BENIGN, (HARMFUL, ATTACKS))
    np.testing.assert_array_equal(made.clean(HARMLESS).refused, [[0, 0, 1, np.nan]])
    np.testing.assert_array_equal(made.clean(HARMLESS).complied, [[1, 1, 0, np.nan]])
    np.testing.assert_array_equal(made.clean(ATTACKS).complied, [[1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(made.under(arm(), 2.0, SUCCEEDED).refused, [[1, 0, 1]])
    np.testing.assert_array_equal(made.under(arm(), 1.0, SUCCEEDED).complied, [[1, 0, np.nan]])
    before = len(made.context.asked)  # pyright: ignore[reportAttributeAccessIssue]
    made.under(arm(), 1.0, SUCCEEDED)
    assert len(made.context.asked) == before, "nothing is asked twice"  # pyright: ignore[reportAttributeAccessIssue]
    assert made.context.asked[-1] == ("test: an arm, c = 1, succeeded attacks", SUCCEEDED)  # pyright: ignore[reportAttributeAccessIssue]


def test_where_no_attack_succeeds_there_is_nothing_to_cut() -> None:
    made = bench("nyn", "nyn", over=())
    assert (made.succeeded, made.requests, len(made.sets[SUCCEEDED])) == ((), (), 0)
    assert made.clean(SUCCEEDED).refused.shape == made.clean(SUCCEEDED).complied.shape == (1, 0)
    assert made.benign == (HARMLESS, WRAPPED)
    assert outcome(made, arm(), 1.0, "always", None)[0] == 0.0
    assert np.isnan(share(made.clean(SUCCEEDED).refused).value)
    # Then all harmful prompts say where a threshold may be: of five none, or two, are below.
    assert thresholds(made) == pytest.approx((0.18, 0.2, 0.3, 0.4, 0.8))


@pytest.mark.parametrize(
    ("gating", "threshold", "harden"),
    [
        ("always", None, {HARMLESS: [True] * 4, HARMFUL: [True] * 3}),
        ("always", 0.3, {HARMLESS: [True] * 4, HARMFUL: [True] * 3}),
        ("labels", 0.3, {HARMLESS: [False] * 4, HARMFUL: [True] * 3}),
        ("probe", None, {HARMLESS: [False] * 4, HARMFUL: [True] * 3}),
        ("probe", 0.3, {HARMLESS: [False, False, True, True], HARMFUL: [True] * 3}),
        ("probe", 0.75, {HARMLESS: [False] * 4, HARMFUL: [True, True, False]}),
    ],
)
def test_hardening_acts_on_what_is_judged_harmful_and_repair_on_the_rest(
    gating: Any, threshold: Any, harden: Any
) -> None:
    made = bench()
    for name, fires in harden.items():
        assert made.fires(arm(), gating, name, threshold).tolist() == fires
        other = [True] * len(fires) if gating == "always" else [not each for each in fires]
        assert made.fires(arm("repair"), gating, name, threshold).tolist() == other


def test_gain_and_loss_are_shares_of_scored_answers_on_the_worst_set() -> None:
    made = bench()
    # Of three succeeded attacks one is refused at strength 1, and one is unscored; two at 2. Of two harmless prompts
    # that are answered one is lost at 1 and one at 2; of the over-refusal prompts one, at 2 alone.
    assert outcome(made, arm(), 1.0, "labels", None) == (0.5, 0.0)
    gain, loss = outcome(made, arm(), 2.0, "always", None)
    assert (gain, loss) == (pytest.approx(2 / 3), 1.0)
    assert outcome(made, arm(), 1.0, "always", None)[1] == 0.5
    # Repair: refused benign prompts that are answered, at 2 one harmless one and one over-refusal one of those and a
    # wrapped one; what is lost are refusals of harmful prompts, one of two put plainly.
    assert outcome(made, arm("repair"), 2.0, "labels", None)[1] == 0.0
    assert outcome(made, arm("repair"), 1.0, "always", None)[1] == 1.0
    assert outcome(made, arm("repair"), 2.0, "always", None)[1] == 0.5
    unscored = bench(harmless=("yy?", "yn?", "yy?", "yyy"), over=())
    assert outcome(unscored, arm(), 2.0, "always", None)[1] == 0.0


def test_of_settings_within_the_budget_and_a_standard_error_the_mildest_is_taken() -> None:
    rows = choose(bench(), arm(), 0.1)
    assert {gating: row.allowed for gating, row in rows.items()} == {"always": False, "probe": True, "labels": True}
    # Two of three attacks at 2 are no more than one of two at 1, by a standard error of few.
    assert (rows["labels"].strength, rows["labels"].gain, rows["labels"].threshold) == (1.0, 0.5, None)
    # Always costs too much at either: the least of it is taken.
    assert (rows["always"].strength, rows["always"].loss) == (1.0, 0.5)
    assert rows["probe"].threshold in thresholds(bench())
    dear = choose(bench(), arm(), 0.6)
    assert (dear["always"].allowed, dear["always"].strength) == (True, 1.0)


def test_the_standard_error_is_of_requests_when_hardening_and_of_refused_benign_prompts_when_repairing() -> None:
    # Ten attacks on one request, of which strength 1 stops eight and 2 all; the same shares of 40 harmless prompts, all
    # refused, are answered.
    said = [*["ynn"] * 8, *["yyn"] * 2]
    pairs = tuple(
        AttackPair(id=f"b{n}", attack="A", plain="ask", text=f"Play: ask now /{each}") for n, each in enumerate(said)
    )
    sets = {
        HARMFUL: texts("bad", "nnn"),
        "harmless": texts("good", *["nyy"] * 32, *["nny"] * 8),
        OVER_REFUSAL: texts("o"),
    }
    made = Bench(Written(), "test", (1,), lambda prompts: np.full(len(prompts), 0.5), pairs, sets)
    chosen = {purpose: choose(made, arm(purpose), 1.0)["always"] for purpose in ("harden", "repair")}
    # Of one request 0.8 is as good as 1; of 80 prompts it is not.
    assert (chosen["harden"].strength, chosen["harden"].gain) == (1.0, 0.8)
    assert (chosen["repair"].strength, chosen["repair"].gain) == (2.0, 1.0)


@pytest.mark.parametrize(("n", "strength"), [(8, 2.0), (7, 1.0)])
def test_all_but_one_of_a_few_is_within_a_standard_error_of_all(n: int, strength: float) -> None:
    # Of all of n requests: p = (n + 1) / (n + 2), and sqrt(p (1 - p) / (n + 2)) is 0.095 for 8 and 0.105 for 7. One
    # attack of ten is 0.1.
    pairs = tuple(
        AttackPair(
            id=f"c{k}", attack="A", plain=f"ask{k % n}", text=f"Play: ask{k % n} now /{'yyn' if k == 0 else 'ynn'}"
        )
        for k in range(10)
    )
    sets = {HARMFUL: texts("bad", "nnn"), "harmless": texts("good", "yyy"), OVER_REFUSAL: texts("o")}
    made = Bench(Written(), "test", (1,), lambda prompts: np.full(len(prompts), 0.5), pairs, sets)
    assert len(set(made.requests)) == n
    row = choose(made, arm(), 1.0)["always"]
    assert (row.strength, row.gain) == (strength, pytest.approx(1.0 if strength == 2 else 0.9))


def test_mild_is_a_small_strength_on_few_prompts() -> None:
    def row(purpose: Any, strength: float, threshold: float | None) -> ChoiceRow:
        given: dict[str, Any] = {"arm": "x", "gating": "probe", "gain": 0, "loss": 0, "allowed": True}
        return ChoiceRow(purpose=purpose, strength=strength, threshold=threshold, **given)

    assert mild(row("harden", 1.5, 0.2)) == (-1.5, 0.2)
    assert mild(row("repair", -1.0, 0.2)) == (-2.0, -0.2)
    assert mild(row("repair", 3.0, None)) == (-2.0, 0.0)


def test_thresholds_are_just_above_benign_prompts_or_at_attacks() -> None:
    found = thresholds(bench())
    # Of ten benign prompts none, one or four are above; of three attacks none or one are below.
    assert found == (np.nextafter(0.2, 1), 0.35, np.nextafter(0.5, 1), 0.55, np.nextafter(0.6, 1))


def test_sums_over_the_attacks_on_each_request() -> None:
    found = by_request(np.array([[1.0, 1], [2, 1], [4, 1]]), ["b", "a", "b"])
    assert found.tolist() == [[5, 2], [2, 1]]
