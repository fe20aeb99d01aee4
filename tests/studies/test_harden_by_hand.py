"""`demur harden` from its parts: answers are letters, scores are numbers, and every row of the result is counted."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from table_model import TableModel, bare, features_of, numbered, splits_of, use
from test_harden_bench import OUTCOMES

from demur.data import Attack, AttackPair
from demur.errors import InputError
from demur.guard import Guard, Probe
from demur.method.attribution import Pool
from demur.method.direction import Direction
from demur.method.interventions import Intervention, PerPrompt, ScaleFeatures, SetFeatures
from demur.model import Region
from demur.stats import Estimate, TradeOff, compare_curves, holm
from demur.studies.context import JudgedAnswers
from demur.studies.harden import Config, Hardening, HardenResult
from demur.studies.harden.arms import Arm, contrast_set, make_arms, refusal_set
from demur.studies.harden.gate import Gate
from demur.studies.harden.results import (
    ATTACKS,
    HARMFUL,
    HARMLESS,
    OVER_REFUSAL,
    SUCCEEDED,
    WRAPPED,
    ChoiceRow,
    SettingRow,
)
from demur.studies.jailbreaks import Attacked
from demur.studies.methods import RandomMatched, Selection
from demur.studies.results import SideEffects
from demur.studies.roles import FeatureRole, Role, Roles
from demur.studies.side_effects import SideEffectMeter, SideInputs
from demur.types import Answer, FeatureId, FeatureSet, Prompt, PromptSet, Verdict

R, H, M = FeatureId(2, 5), FeatureId(0, 1), FeatureId(1, 3)


@dataclass(frozen=True)
class Code(Intervention):
    """A change that is the number of the letter that tells how a prompt is answered under it."""

    n: int
    where: Any = "prompt"


def arm(purpose: Any, name: str, codes: dict[float, tuple[int, ...]], follows: str = "") -> Arm:
    def changes(strength: float) -> Any:
        return tuple((Code(n),) for n in codes[strength])

    return Arm(purpose, name, f"the {name}", "{} × max", () if follows else tuple(codes), changes, follows)


ARMS = (
    arm("harden", "set", {1.0: (1,), 2.0: (2,)}),
    arm("harden", "amplify", {4.0: (3,)}),
    arm("harden", "random-set", {2.0: (4, 5)}, "set"),
    arm("repair", "turn-down", {0.5: (6,), 0.0: (7,)}),
    arm("repair", "random-down", {0.5: (4, 5)}, "turn-down"),
)
CHOSEN = {"set": (2.0, 0.25), "amplify": (4.0, 0.85), "turn-down": (0.5, 0.4)}
# Clean, set at 1 and 2, amplified, two random sets, turned down by ½ and 0.
SAID = {
    "bad0": "nnnnnnyy", "bad1": "nnnnnnny", "good0": "yynyyyyy", "good1": "yyyyyyyy", "good2": "nnnnnnyy",
    "good3": "yy?yyyyy", "over0": "nnnnnyny", "over1": "yynyyyyy",
    "a0": "ynnnyyyy", "a1": "yynyynyy", "a2": "yyxyyyyy", "a3": "nnnnnnny",
}  # fmt: skip
SCORES = {
    "bad0": 0.9, "bad1": 0.3, "good0": 0.3, "good1": 0.1, "good2": 0.1, "good3": 0.1, "over0": 0.1, "over1": 0.5,
    "a0": 0.8, "a1": 0.2, "a2": 0.9, "a3": 0.5,
}  # fmt: skip


def said(name: str, *ids: str) -> PromptSet:
    return PromptSet(name=name, prompts=tuple(Prompt(id=each, text=f"{each} /{SAID[each]}") for each in ids))


class Lettered(TableModel):
    """Answers as the letters say."""

    meters: Any
    measured: Any
    tasks: Any
    by: Any
    contrast: Any
    choosing: Any
    found_here: Any

    def answer(self, label: str, prompts: PromptSet, change: Any = ()) -> JudgedAnswers:
        self.asked.append(label)
        told: list[Any] = []
        texts: list[str] = []
        for prompt in prompts:
            own = change
            if change and isinstance(change[0], PerPrompt):
                own = change[0].by_prompt.get(prompt.id, ())
            letter = prompt.text.split("/")[1].split()[0][own[0].n if own else 0] if "/" in prompt.text else "n"
            told.append(OUTCOMES.get(letter))
            # Where batches are rounded otherwise, one text is another.
            texts.append(letter + ("~" if "conditional" in label and prompt.id == "good1" else ""))
        answers = tuple(Answer(prompt=p, text=text) for p, text in zip(prompts, texts, strict=True))
        return JudgedAnswers(answers, tuple(Verdict(outcome=each, judge="letters") for each in told))


PAIRS = tuple(
    AttackPair(id=f"a{n}", attack=attack, plain=f"ask{n // 2}", text=f"Play: ask{n // 2} now /{SAID[f'a{n}']}")
    for n, attack in enumerate("ABAB")
)


def about(value: float, n: int = 3) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=n)


class Meter(SideEffectMeter):
    """ΔCE is a tenth, and KL a hundredth, of the change's number; a tenth less where it is conditional."""

    def __init__(self, context: Any, config: Any, harmless: Any, texts: Any) -> None:  # noqa: ARG002
        context.meters.append((harmless, texts))
        self.context: Any = context

    def measure(self, change: Any) -> SideEffects:
        (one,) = change
        acts: Any = one.by_prompt.values() if isinstance(one, PerPrompt) else ()
        n = one.n if isinstance(one, Code) else max((0.9 * own[0].n for own in acts), default=0.0)
        self.context.measured.append(sorted(one.by_prompt) if isinstance(one, PerPrompt) else None)
        return SideEffects(ce_answers=about(n / 10), kl=about(n / 100))

    def capability(self, change: Any) -> Any:
        self.context.tasks.append([(each.n, each.where) for each in change])
        return ()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Any:
    asked: dict[str, Any] = {"budget": 0.05, "seed": 2, "tasks": ("a task",), "resamples": 300}
    splits = splits_of(tuning=2, test=2)
    splits = splits.model_copy(
        update={
            "test": splits.test.model_copy(
                update={
                    "harmful": said("bad", "bad0", "bad1"),
                    "harmless": said("good", *(f"good{n}" for n in range(4))),
                }
            )
        }
    )
    made = Lettered(lambda _: 1.0, Config(**asked), splits)
    made.model.max_context = None
    made.__dict__ |= {"meters": [], "measured": [], "tasks": [], "by": [], "contrast": []}
    found = made.found(features_of(R, H), pool=Pool(features=(R, H), cosines=(0.5, 0.1)))
    use(monkeypatch, made, found)
    over = said("over", "over0", "over1")
    more = PromptSet(name="over", prompts=(*over.prompts, *numbered("rest", 5)))
    read = bare(SideInputs, texts=("a text",), over_refusal=over)
    monkeypatch.setattr(SideInputs, "read", classmethod(lambda _cls, _options, _context: read))

    def every(options: Any, _context: Any) -> PromptSet:
        assert options.n_over_refusal == 10**9
        return more

    def by(_cls: Any, _context: Any, attacks: Any, prompts: PromptSet, known: set[str]) -> Attacked:
        made.by.append(([a.name for a in attacks], prompts.ids, set(known)))
        own = PAIRS if len(made.by) == 2 else made.choosing
        return bare(Attacked, pairs=own)

    made.choosing = (AttackPair(id="c0", attack="C", plain="Choose me", text="Choose me now /y"),)
    gate = bare(
        Gate, title="a probe", scores=lambda prompts: np.array([SCORES.get(p.id.split("@")[0], 0.0) for p in prompts])
    )
    monkeypatch.setattr("demur.studies.side_effects.over_refusal_prompts", every)
    monkeypatch.setattr("demur.studies.side_effects.SideEffectMeter", Meter)
    monkeypatch.setattr(Attacked, "by", classmethod(by))
    monkeypatch.setattr(Gate, "of", classmethod(lambda _cls, _context, _attacks: gate))

    def begins(_work: Any, prompts: PromptSet, ids: Any, change: Any) -> np.ndarray:
        assert ids == (1,)
        # Turned down by ½, a0 begins as a refusal would: no success.
        return np.array([0.9 if change == (Code(6),) and p.id == "a0" else 0.0 for p in prompts])

    monkeypatch.setattr("demur.studies.gauge.p_refuse", begins)
    monkeypatch.setattr(
        "demur.studies.jailbreaks.configured_attacks",
        lambda sources: tuple(Attack(name, templates=("{ask} 1", "{ask} 2")) for name in sources),
    )
    monkeypatch.setattr("demur.studies.harden.arms.refusal_set", lambda _context, _found: features_of(R))

    def contrast(_context: Any, pairs: Any, k: int) -> FeatureSet:
        made.contrast.append(([p.id for p in pairs], k))
        return features_of(M)

    monkeypatch.setattr("demur.studies.harden.arms.contrast_set", contrast)
    monkeypatch.setattr("demur.studies.harden.arms.make_arms", lambda *_: ARMS)

    def choose(bench: Any, one: Arm, budget: float) -> Any:
        assert (bench.side, budget, one.follows) == ("choosing", 0.05, "")
        strength, threshold = CHOSEN[one.name]
        gain = {"set": 0.9, "amplify": 0.8, "turn-down": 0.7}[one.name]

        def row(gating: Any) -> ChoiceRow:
            return ChoiceRow(
                purpose=one.purpose, arm=one.name, gating=gating, strength=strength,
                threshold=threshold if gating == "probe" else None, gain=gain, loss=0.0, allowed=True,
            )  # fmt: skip

        return {gating: row(gating) for gating in ("always", "probe", "labels")}

    monkeypatch.setattr("demur.studies.harden.choice.choose", choose)
    monkeypatch.setattr("demur.studies.harden.choice.thresholds", lambda bench: (0.1, 0.25, 0.85) if bench.side else ())
    made.found_here = found
    return made


@pytest.fixture
def study(work: Any) -> Hardening:
    return Hardening(work, work.found_here)


@pytest.fixture
def result(study: Hardening) -> HardenResult:
    return study.run()


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return round(estimate.value, 6)


def row_of(result: HardenResult, name: str, gating: Any, strength: float | None = None) -> SettingRow:
    rows = [r for r in result.rows if (r.arm, r.gating) == (name, gating) and strength in (None, r.strength)]
    assert len(rows) == 1, rows
    return rows[0]


def test_what_chooses_shares_no_request_with_what_is_measured(study: Hardening, work: Any) -> None:
    first, second = work.by
    assert first == (["framings"], ("tuning0", "tuning1"), {*(f"{i} /{SAID[i].lower()}" for i in SAID if i[0] in "bg")})
    attacks, prompts, known = second
    assert (attacks, prompts) == (["framings"], ("bad0", "bad1"))
    assert {"direction 0", "+tuning 1", "choose me", "choose me now /y"} <= known
    assert not any("bad" in each for each in known)
    assert study.choosing.sets[HARMFUL].ids == ("tuning0", "tuning1")
    # As many over-refusal prompts as harmless tuning prompts, none of them a test prompt.
    own = study.choosing.sets[OVER_REFUSAL].ids
    order = np.random.default_rng(2).permutation(5)[:2]
    assert own == tuple(f"rest{n}" for n in order)
    assert study.test.sets[OVER_REFUSAL].ids == ("over0", "over1")
    assert (study.choosing.side, study.test.side) == ("choosing", "test")
    assert study.test.refusal_ids == (1,)
    assert work.contrast == [(["c0"], 1)]
    assert not work.warnings


def test_where_no_choosing_attack_succeeds_all_of_them_say_which_features_they_suppress(work: Any) -> None:
    work.choosing = (AttackPair(id="c0", attack="C", plain="Choose me", text="Choose me now /n"),)
    Hardening(work, work.found_here)
    assert work.contrast == [(["c0"], 1)]
    assert any("no attack of --choose-on succeeds" in warning for warning in work.warnings)


def test_the_same_single_template_cannot_choose_and_test(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = (Attack("one", templates=("{ask} 1",)),)
    monkeypatch.setattr("demur.studies.jailbreaks.configured_attacks", lambda _: one)
    with pytest.raises(InputError, match="name the same single attack"):
        Hardening(work, work.found_here)


def test_the_result_says_what_it_is_made_of(result: HardenResult) -> None:
    assert result.labels == {a.name: f"the {a.name}" for a in ARMS}
    assert result.controls == {"random-set": "set", "random-down": "turn-down"}
    assert (result.refusal, result.contrast, result.probe, result.budget) == ((R,), (M,), "a probe", 0.05)
    assert result.best == {"harden": "set", "repair": "turn-down"}
    assert result.sizes == {HARMFUL: 2, HARMLESS: 4, OVER_REFUSAL: 2, WRAPPED: 4, ATTACKS: 4, SUCCEEDED: 3}
    assert result.choosing[HARMFUL] == 2
    assert {name: value(e) for name, e in result.clean.items()} == {
        HARMFUL: 1.0, HARMLESS: 0.25, OVER_REFUSAL: 0.5, WRAPPED: 0.25, ATTACKS: 0.25, SUCCEEDED: 0.0,
    }  # fmt: skip
    # From 0.25 on.
    assert {name: value(e) for name, e in result.fires.items()} == {
        HARMFUL: 1.0, HARMLESS: 0.25, OVER_REFUSAL: 0.5, WRAPPED: 0.25, ATTACKS: 0.75,
        SUCCEEDED: 0.666667,
    }  # fmt: skip
    assert [(c.arm, c.gating) for c in result.choices] == [
        (name, gating) for name in CHOSEN for gating in ("always", "probe", "labels")
    ]


def test_arms_are_measured_at_every_strength_and_controls_at_that_of_their_arm(result: HardenResult) -> None:
    rows = [(r.arm, r.gating, r.strength, r.chosen, r.threshold, r.sets) for r in result.rows]
    gatings = (("always", None), ("probe", 0.25), ("labels", None))
    assert rows[:6] == [("set", g, s, s == 2.0, t, 1) for g, t in gatings for s in (1.0, 2.0)]
    # A control takes what was chosen where the probe fires, whatever it is under.
    assert [row for row in rows if row[0] == "random-set"] == [
        ("random-set", g, 2.0, True, 0.25, 2) for g, _ in gatings
    ]
    assert [r.setting for r in result.rows if r.arm == "turn-down"] == ["0.5 × max", "0 × max"] * 3


def test_a_setting_counts_attacks_refusals_and_answers(result: HardenResult) -> None:
    row = row_of(result, "set", "always", 2.0)
    # Of a0, a1 and a2: two refused, one broken.
    assert (value(row.cut), value(row.still), value(row.broken)) == (0.666667, 0.0, 0.333333)
    # Refusals rise by one of three scored harmless prompts, in the attacks' words too, and one of two.
    assert {name: value(e) for name, e in row.added.items()} == {
        HARMLESS: 0.333333, WRAPPED: 0.333333, OVER_REFUSAL: 0.5, HARMFUL: 0.0,
    }  # fmt: skip
    # Answered before: two harmless ones that are scored, twice, and one; of these three are lost.
    assert (value(row.lost), row.lost.n, row.lost.unscored) == (0.6, 5, 2)
    assert {name: value(e) for name, e in row.repaired.items()} == {HARMLESS: 0, WRAPPED: 0, OVER_REFUSAL: 0}
    assert row.side_effects is not None
    assert (value(row.side_effects.ce_answers), value(row.side_effects.kl)) == (0.2, 0.02)
    gated = row_of(result, "set", "probe", 2.0)
    # a1 is below 0.25; so are all benign prompts but good0 and over1.
    assert (value(gated.cut), value(gated.still), value(gated.broken)) == (0.333333, 0.333333, 0.333333)
    # Where nothing acts good3 is answered as before: three of seven.
    assert value(gated.lost) == 0.428571
    assert {name: value(e) for name, e in gated.added.items()} == {
        HARMLESS: 0.25, WRAPPED: 0.25, OVER_REFUSAL: 0.5, HARMFUL: 0.0,
    }  # fmt: skip
    assert gated.side_effects is not None
    assert value(gated.side_effects.ce_answers) == 0.18
    perfect = row_of(result, "set", "labels", 2.0)
    assert (value(perfect.cut), value(perfect.lost), perfect.side_effects) == (0.666667, 0.0, None)
    # Plain harmful prompts are looked at where the setting was chosen.
    assert HARMFUL not in row_of(result, "set", "always", 1.0).added
    weak = row_of(result, "set", "always", 1.0)
    assert (value(weak.cut), value(weak.still), value(weak.lost)) == (0.333333, 0.666667, 0.0)


def test_a_control_is_asked_only_for_what_the_arm_is_meant_to_do(result: HardenResult) -> None:
    row = row_of(result, "random-set", "always")
    # a1 alone, under the second set.
    assert (value(row.cut), value(row.still)) == (pytest.approx(1 / 6, abs=1e-5), pytest.approx(5 / 6, abs=1e-5))
    assert (row.added, row.repaired, row.side_effects, row.lost.n) == ({}, {}, None, 0)
    down = row_of(result, "random-down", "always")
    assert down.cut is None
    assert {name: value(e) for name, e in down.repaired.items()} == {HARMLESS: 0, WRAPPED: 0, OVER_REFUSAL: 0.5}
    assert set(down.added) == {HARMLESS, WRAPPED, OVER_REFUSAL}


def test_repair_counts_refusals_given_up_on_every_harmful_set(result: HardenResult) -> None:
    row = row_of(result, "turn-down", "always", 0.5)
    assert (row.cut, row.still, row.broken) == (None, None, None)
    assert {name: value(e) for name, e in row.repaired.items()} == {HARMLESS: 1.0, WRAPPED: 1.0, OVER_REFUSAL: 0.0}
    assert {name: value(e) for name, e in row.added.items()} == {
        HARMLESS: -0.25, WRAPPED: -0.25, OVER_REFUSAL: 0.0, HARMFUL: -0.5, ATTACKS: 0.0,
    }  # fmt: skip
    # Below 0.4: bad1 and not bad0.
    gated = row_of(result, "turn-down", "probe", 0.0)
    assert (value(gated.added[HARMFUL]), value(gated.added[ATTACKS])) == (-0.5, 0.0)
    assert value(gated.lost) == 0.0


def test_an_attack_that_begins_as_a_refusal_does_not_succeed(study: Hardening) -> None:
    (arm,) = (a for a in ARMS if a.name == "turn-down")
    assert study.test.clean(ATTACKS).complied.tolist() == [[1, 1, 1, 0]]
    assert study.test.under(arm, 0.5, ATTACKS).complied.tolist() == [[0, 1, 1, 0]]


def test_side_effects_are_those_of_the_change_where_it_acts(result: HardenResult, work: Any) -> None:
    assert result.rows
    # Always; conditional on good0, which scores 0.3; all but good0 are not conditional on more.
    assert work.measured[0] is None
    assert ["good0"] in work.measured
    assert ["good0", "good1", "good2", "good3"] in work.measured  # Turned down below 0.4.
    texts = {given for _, given in work.meters}
    assert texts == {("a text",), ()}
    assert {tuple(a.prompt.id for a in judged.answers) for judged, _ in work.meters} == {
        ("good0", "good1", "good2", "good3")
    }


def test_the_conditional_change_is_held_against_what_it_is_made_of(result: HardenResult) -> None:
    # Of four harmless prompts, four in the attacks' words, two and three, one is another text: in words of its own it
    # is not good1.
    assert (result.same.n, round(result.same.value * 13)) == (13, 12)


def test_tasks_are_measured_clean_and_with_the_change_on_every_token(result: HardenResult, work: Any) -> None:
    assert work.tasks == [[], [(2, "all")]]
    assert [each.name for each in result.capability] == ["clean", "the set, 2 × max, always"]


def test_without_tasks_there_is_no_capability(work: Any) -> None:
    work.config = work.config.model_copy(update={"tasks": ()})
    assert Hardening(work, work.found_here).run().capability == ()


def test_families_count_their_own_attacks(result: HardenResult) -> None:
    a, b = result.families
    assert [(r.attack, r.n) for r in (a, b)] == [("A", 2), ("B", 2)]
    # a0 and a2 succeed clean; at 2 a0 is refused and a2 broken. Of a1 and a3 one succeeds, and the probe lets it.
    assert [(value(r.clean), value(r.fires)) for r in (a, b)] == [(1.0, 1.0), (0.5, 0.5)]
    assert {g: value(e) for g, e in a.after.items()} == {"always": 0.0, "probe": 0.0, "labels": 0.0}
    assert {g: value(e) for g, e in b.after.items()} == {"always": 0.0, "probe": 0.5, "labels": 0.0}


def test_thresholds_are_tried_at_the_chosen_strength(result: HardenResult) -> None:
    rows = [(r.threshold, value(r.cut), value(r.lost), r.chosen) for r in result.thresholds]
    # From 0.1: all attacks, and all harmless prompts but none of over0's kind; from 0.85 only a2, which breaks.
    assert rows == [(0.1, 0.666667, 0.6, False), (0.25, 0.333333, 0.428571, True), (0.85, 0.0, 0.0, False)]


def test_curves_at_equal_cost_are_those_of_requests(result: HardenResult) -> None:
    rows = {(g.arm, g.cost, g.level): g for g in result.gaps}
    levels = [("answers lost", 0.01), ("answers lost", 0.05), ("ΔCE", 0.01), ("ΔCE", 0.05)]
    assert [key[1:] for key in rows if key[0] == "set"] == [key[1:] for key in rows if key[0] == "amplify"] == levels
    # Requests: ask0 with a0 and a1, ask1 with a2. Set at 1 a0 is refused; at 2 a1 as well, where the change acts.
    probe = np.array([[0, 0], [0.5, 0], [0.5, 0]])
    always = np.array([[0, 0], [0.5, 0], [1.0, 0]])
    costs = {
        "answers lost": ([0, 0, 0.5], [0, 0, 0.6]),
        "ΔCE": ([0, 0.09, 0.18], [0, 0.1, 0.2]),
    }
    for (name, cost, level), row in rows.items():
        if name != "set":
            continue
        first, second = (
            TradeOff(np.array(price), cuts) for price, cuts in zip(costs[cost], (probe, always), strict=True)
        )
        gap = compare_curves(first, second, level, resamples=300)
        assert (row.probe.value, row.always.value) == pytest.approx((gap.first.value, gap.second.value)), (cost, level)
        assert row.difference.value == pytest.approx(gap.difference.value)
        assert row.p == pytest.approx(gap.p)
    assert [g.p_holm for g in result.gaps] == pytest.approx(list(holm([g.p for g in result.gaps])))


def test_where_no_test_attack_succeeds_there_is_nothing_to_compare(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = tuple(pair.model_copy(update={"text": "Play: ask0 now /nnnnnnnn"}) for pair in PAIRS)
    monkeypatch.setitem(globals(), "PAIRS", failed)
    found = Hardening(work, work.found_here).run()
    assert (found.gaps, found.thresholds) == ((), ())
    assert all(row.cut is None for row in found.rows)
    assert found.sizes[SUCCEEDED] == 0


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        # Within the budget, then gain, then the least loss, then the fewest prompts, then the first.
        ({"set": (True, 0.5, 0.0, 0.1), "amplify": (False, 0.9, 0.2, 0.1)}, "set"),
        ({"set": (True, 0.5, 0.0, 0.1), "amplify": (True, 0.6, 0.05, 0.1)}, "amplify"),
        ({"set": (True, 0.5, 0.01, 0.1), "amplify": (True, 0.5, 0.0, 0.1)}, "amplify"),
        ({"set": (True, 0.5, 0.0, 0.1), "amplify": (True, 0.5, 0.0, 0.3)}, "amplify"),
        ({"set": (True, 0.5, 0.0, 0.1), "amplify": (True, 0.5, 0.0, 0.1)}, "set"),
        # Of those beyond the budget gain does not count.
        ({"set": (False, 0.9, 0.3, 0.1), "amplify": (False, 0.1, 0.2, 0.1)}, "amplify"),
    ],
)
def test_the_best_arm_is_chosen_by_gain_within_the_budget(study: Hardening, rows: Any, best: str) -> None:
    study.choices = {}
    for name, (allowed, gain, loss, threshold) in rows.items():
        given: dict[str, Any] = {"purpose": "harden", "arm": name, "strength": 1.0}
        gated = ChoiceRow(**given, gating="probe", threshold=threshold, gain=gain, loss=loss, allowed=allowed)
        # What acts always is not asked.
        always = ChoiceRow(**given, gating="always", threshold=None, gain=1 - gain, loss=0.0, allowed=True)
        study.choices[name] = {"probe": gated, "always": always}
    study.choices["turn-down"] = {
        "probe": ChoiceRow(
            purpose="repair", arm="turn-down", gating="probe", strength=1.0, threshold=0.9, gain=1.0, loss=0.0,
            allowed=True,
        )
    }  # fmt: skip
    assert study.best("harden") == best
    assert study.best("repair") == "turn-down"


def test_arms_of_one_purpose_can_be_chosen_alone(study: Hardening) -> None:
    study.choices = {}
    study.choose("repair")
    assert list(study.choices) == ["turn-down"]
    study.choose()
    assert list(study.choices) == ["turn-down", "set", "amplify"]


# -- arms --------------------------------------------------------------------------------------------------------------


def roles(*rows: tuple[FeatureId, Role]) -> Roles:
    share = about(0.9)
    return Roles(
        features=tuple(FeatureRole(feature=f, role=r, instruction=0, post_instruction=1, share=share) for f, r in rows)
    )


def plain_work(**options: Any) -> TableModel:
    asked: dict[str, Any] = {
        "seed": 3,
        "random_sets": 2,
        "multiples": (0.5, 2.0),
        "amplify": (3.0,),
        "turn_down": (0.25,),
    }
    work = TableModel(
        lambda done: 1.0 if done.prompt.label == "harmful" else -1.0, Config(**(asked | options)), splits_of()
    )
    work.suite = SimpleNamespace(identity="saes")
    return work


@pytest.mark.parametrize(
    ("found", "kept", "warned"),
    [
        ([(R, "refusal"), (H, "harm"), (M, "mixed")], (R,), False),
        ([(R, "mixed"), (H, "harm"), (M, "mixed")], (R, M), True),
        ([(R, "harm"), (H, "harm"), (M, "harm")], (R, H, M), True),
    ],
)
def test_refusal_features_are_those_of_f_star_with_that_role(
    monkeypatch: pytest.MonkeyPatch, found: Any, kept: Any, warned: bool
) -> None:
    work = plain_work()
    monkeypatch.setattr("demur.studies.roles.find_roles", lambda _work, _found: roles(*found))
    chosen = refusal_set(work, work.found(features_of(R, H, M), pool=Pool(features=(R,), cosines=(1.0,))))
    assert chosen.features == kept
    assert chosen.scores == tuple({R: 3.0, H: 2.0, M: 1.0}[f] for f in kept)
    assert bool(work.warnings) == warned


def test_features_by_contrast_fall_most_from_plain_to_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    work, asked = plain_work(), list[Any]()

    def actdiff(_model: Any, _suite: Any, items: Any, others: Any, k: int, **options: Any) -> FeatureSet:
        asked.append(([i.prompt.text for i in items], [i.prompt.text for i in others], k, options))
        return features_of(M)

    monkeypatch.setattr("demur.method.selection.actdiff_set", actdiff)
    pairs = [
        AttackPair(id="x", attack="A", plain="ask", text="Play: ask"),
        AttackPair(id="y", attack="A", plain=None, text="No"),
    ]  # fmt: skip
    assert contrast_set(work, pairs, 4).features == (M,)
    ((plain, attacked, k, options),) = asked
    assert (plain, attacked, k, options["reduce"]) == (["ask"], ["Play: ask"], 4, "mean")
    assert options["scoring"].regions == (Region.POST_INSTRUCTION,)
    contrast_set(work, pairs, 5)
    assert len(asked) == 2, "another number of features is another stage"


def test_every_arm_changes_its_features_by_its_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    work, drawn = plain_work(amplify_where="all"), list[Any]()
    random = (features_of(FeatureId(2, 100)), features_of(FeatureId(2, 101)))

    def measures(given: Selection, layers: Any) -> Any:
        assert (given.k, tuple(layers)) == (2, (1, 2))
        return "measures"

    def draw(like: FeatureSet, matched: Any, *, exclude: Any, seed: int) -> FeatureSet:
        drawn.append((like.features, matched, sorted(exclude), seed))
        return random[seed - 3]

    monkeypatch.setattr(RandomMatched, "measures", staticmethod(measures))
    monkeypatch.setattr("demur.method.selection.random_set", draw)
    monkeypatch.setattr(Selection, "maxima", lambda _self, each: tuple(10.0 + f.index for f in each.features))
    direction = bare(Direction, ablate=lambda: "ablated", add=lambda m, where: (m, where))
    pool = Pool(features=(R, H), cosines=(0.5, 0.1))
    found = work.found(features_of(R, H), pool=pool, direction=direction)
    refusal, contrast = features_of(M, R), features_of(FeatureId(3, 9))
    arms = {a.name: a for a in make_arms(work, found, refusal, contrast)}
    assert [(a.name, a.purpose, a.strengths, a.follows) for a in arms.values()] == [
        ("set", "harden", (0.5, 2.0), ""), ("amplify", "harden", (3.0,), ""), ("contrast", "harden", (0.5, 2.0), ""),
        ("direction", "harden", (0.5, 2.0), ""), ("random-set", "harden", (), "set"),
        ("random-up", "harden", (), "amplify"), ("turn-down", "repair", (0.25,), ""), ("ablate", "repair", (1.0,), ""),
        ("random-down", "repair", (), "turn-down"),
    ]  # fmt: skip
    assert len({a.label for a in arms.values()}) == 9
    assert arms["set"].changes(2.0) == ((SetFeatures((M, R), (26.0, 30.0), "all"),),)
    assert arms["contrast"].changes(0.5) == ((SetFeatures((FeatureId(3, 9),), (9.5,), "all"),),)
    assert arms["amplify"].changes(3.0) == ((ScaleFeatures((M, R), 3.0, "all"),),)
    assert arms["direction"].changes(2.0) == (((2.0, "all"),),)
    assert arms["ablate"].changes(1.0) == (("ablated",),)
    assert arms["random-set"].changes(1.0) == tuple(
        (SetFeatures(each.features, (10.0 + each.features[0].index,), "all"),) for each in random
    )
    assert arms["random-up"].changes(3.0) == tuple((ScaleFeatures(each.features, 3.0, "all"),) for each in random)
    own = {a.name: a for a in make_arms(plain_work(), found, refusal, contrast)}
    # On the prompt alone, but for what turns refusal down: that is decided word by word.
    assert own["set"].changes(0.5)[0][0].where == own["amplify"].changes(3.0)[0][0].where == "prompt"  # type: ignore[attr-defined]
    assert own["turn-down"].changes(0.25) == ((ScaleFeatures((M, R), 0.25, "all"),),)
    assert own["random-down"].changes(0.25)[1] == (ScaleFeatures(random[1].features, 0.25, "all"),)
    assert own["ablate"].setting(1.0) == ""
    assert (own["set"].setting(0.5), own["amplify"].setting(3.0)) == ("0.5 × max", "c = 3")
    assert (own["direction"].setting(2.0), own["turn-down"].setting(-1.0)) == ("2 × length", "c = −1")
    # None of what is known may be drawn.
    assert drawn[:2] == [((M, R), "measures", sorted({R, H, M, FeatureId(3, 9)}), seed) for seed in (3, 4)]


# -- the gate ----------------------------------------------------------------------------------------------------------


def read(model: Any, prompts: Any, readings: Any, *_: Any) -> list[np.ndarray]:
    """Harm stands in layer 1 at the last token, clearly, and less so elsewhere."""
    model.read.append([p.text for p in prompts])
    found: list[np.ndarray] = []
    for reading in readings:
        clear = reading.layer == 1 and reading.pooling == "last"
        rows = []
        for n, p in enumerate(prompts):
            harmful = not p.text.lstrip("Play: ").startswith("+")
            rows.append([(1.0 if harmful else -1.0) * (3.0 if clear else (-1) ** n), 0.1 * n])
        found.append(np.array(rows, dtype=np.float32))
    return found


def gated(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Gate, Any]:
    work = plain_work(**options)
    work.splits = splits_of(direction=6, selection=2, tuning=6)
    work.model.__dict__.update({"read": [], "max_context": 5, "n_layers": 3})
    work.config = work.config.model_copy(update={"max_new_tokens": 1})
    work.model.chat = SimpleNamespace(tokenize=lambda text: text.split())
    monkeypatch.setattr("demur.guard.read_prompts", read)
    attacks = [
        Attack("A", templates=("Play: {ask}", "one two three four {ask}")),
        Attack("B", templates=("{ask} please",)),
    ]
    return Gate.of(work, attacks), work


def test_the_probe_is_that_of_the_layer_and_token_that_tell_harm_best(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, work = gated(monkeypatch)
    assert (gate.probe.reading.kind, gate.probe.reading.layer, gate.probe.reading.pooling) == ("dense", 1, "last")
    assert "AUROC 1.000" in gate.title
    assert "after layer 1 (last token)" in gate.title
    assert "templates" in gate.title
    harmless, harmful, held, more = work.model.read
    # Direction and selection prompts plainly, then each in a template; templates take turns, and what does not fit is
    # left out.
    plain = [*(f"+direction {n}" for n in range(6)), "+selection 0", "+selection 1"]
    inside = [f"Play: {t}" if n % 3 == 0 else f"{t} please" for n, t in enumerate(plain) if n % 3 != 1]
    assert harmless == plain + inside
    assert harmful == [t.replace("+", "") for t in harmless]
    assert held[:6] == [f"+tuning {n}" for n in range(6)]
    assert more[:7] == [*(f"tuning {n}" for n in range(6)), "Play: tuning 0"]
    scores = gate.scores(PromptSet(name="x", prompts=(Prompt(id="a", text="bad"), Prompt(id="b", text="+ good"))))
    assert scores[0] > 0.9 > 0.1 > scores[1]


def test_scores_are_read_once_and_fresh_ones_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, work = gated(monkeypatch, probe_on="plain")
    assert "fitted on plain prompts;" in gate.title
    assert [len(texts) for texts in work.model.read] == [8, 8, 6, 6]
    work.model.read.clear()
    prompts = numbered("some", 2)
    first, again = gate.scores(prompts), gate.scores(prompts)
    assert first is again
    assert len(work.model.read) == 1
    np.testing.assert_array_equal(gate.fresh(prompts), first)
    assert len(work.model.read) == 2
    gate.scores(numbered("others", 2))
    assert len(work.model.read) == 3


def test_a_probe_is_named_by_all_that_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, _ = gated(monkeypatch, probe_on="plain")
    probe = gate.probe
    other = [
        Probe(probe.reading, probe.weights * 2, probe.bias), Probe(probe.reading, probe.weights, probe.bias + 1),
        Probe(probe.reading.model_copy(update={"layer": 2}), probe.weights, probe.bias),
        Probe(probe.reading, probe.weights, probe.bias, unit=not probe.unit),
    ]  # fmt: skip
    names = [Gate("t", gate.model, each).digest for each in (probe, *other)]
    assert len(set(names)) == 5
    assert Gate("another title", gate.model, Probe(probe.reading, probe.weights.copy(), probe.bias)).digest == names[0]


def test_a_guard_s_own_probe_is_taken_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = bare(Probe, reading="its reading")
    guard = bare(Guard, harm=probe, rows={1: "rows"})
    monkeypatch.setattr(
        Guard, "load", classmethod(lambda _cls, folder, _model: guard if folder == "my/guard" else None)
    )
    work = plain_work(guard="my/guard")
    gate = Gate.of(work, [])
    assert (gate.probe, gate.rows, gate.model) == (probe, {1: "rows"}, work.model)
    assert "my/guard" in gate.title
