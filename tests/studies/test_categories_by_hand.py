"""`demur categories` where what each feature does to each prompt is a rule: sets, parts, controls and transfer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import Done, TableModel, features_of, use

from demur.errors import InputError
from demur.method.attribution import Pool
from demur.method.interventions import HoldFeatures
from demur.model import Region
from demur.stats import Estimate, crossed_difference, ratio_of
from demur.studies.categories import CategoriesResult, Config, PartRow, run
from demur.studies.categories.causes import Cause, Causes
from demur.studies.categories.parts import Kinds, kind_of, kinds_of
from demur.studies.methods import RandomMatched
from demur.studies.results import Knowledge
from demur.studies.roles import FeatureRole
from demur.studies.side_effects import SideEffectMeter
from demur.types import FeatureId, FeatureSet, Prompt, PromptSet, Split, Splits

C1, C2, A1, A2, A3 = FeatureId(2, 1), FeatureId(2, 2), FeatureId(0, 3), FeatureId(0, 4), FeatureId(1, 5)
T1, T2, NONE = FeatureId(0, 6), FeatureId(1, 7), FeatureId(3, 8)
OWN = {"arson": (A1, A2), "theft": (T1, T2)}
# Nats that each feature gives on prompts of a category.
FALL = {
    "arson": {C1: 5.0, C2: 4.0, A1: 3.0, A2: 2.0, A3: 0.05, NONE: -1.0},
    "theft": {C2: 6.0, C1: 3.0, T1: 2.5, T2: 0.07, A1: 0.0},
    "fraud": {C1: 1.0},
}
RANDOM = FeatureId(2, 100)


def prompts(name: str, **counts: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(id=f"{name}-{kind}{n}", text=f"{name} {kind} {n}", label="harmful", category=f"{kind.title()} / sub")
        for kind, k in counts.items()
        for n in range(k)
    )


def splits() -> Splits:
    counts: dict[str, dict[str, int]] = {
        "direction": {"theft": 2, "arson": 3}, "selection": {"theft": 1, "arson": 1, "fraud": 1},
        "tuning": {"arson": 2, "theft": 2, "fraud": 3}, "test": {"arson": 3, "theft": 4, "fraud": 1},
    }  # fmt: skip
    made: dict[str, Any] = {}
    for name, each in counts.items():
        harmless = tuple(Prompt(id=f"+{name}{n}", text=f"+{name} {n}", label="harmless") for n in range(2))
        made[name] = Split(
            harmful=PromptSet(name=name, prompts=prompts(name, **each)), harmless=PromptSet(name=name, prompts=harmless)
        )
    return Splits(**made)


def kind(prompt: Prompt) -> str:
    return str(prompt.category).split(" / ")[0].lower()


def rule(done: Done) -> float:
    """Common features act by themselves, a category's own through them; the first prompt of arson needs both."""
    prompt, out = done.prompt, done.scaled
    if prompt.label == "harmless" or prompt.id == "test-theft3":
        return -1.0
    if not out:
        return 1.0
    factors = {*out.values()}
    assert len(factors) == 1
    if factors == {0.0}:
        return -1.0 if prompt.id == "tuning-arson0" else 1.0
    if prompt.id == "test-theft2" and len(out) == 4:
        return float("nan")
    own = all(f in out for f in OWN[kind(prompt)])
    other = all(f in out for f in OWN["theft" if kind(prompt) == "arson" else "arson"])
    common = C1 in out and C2 in out
    if common:
        return 1.0 if prompt.id == "test-arson0" and done.held else -1.0
    if own or (other and prompt.id == "test-arson1"):
        blocked = {C1, C2} <= set(done.held)
        if blocked and done.held[C1] != [1.0, 2.0, 3.0]:
            raise AssertionError(done.held)
        return 1.0 if blocked else -1.0
    return -1.0 if RANDOM in out and prompt.id == "test-theft0" else 1.0


class Given:
    """What the study finds in the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        asked: dict[str, Any] = {
            "k": 4, "min_prompts": 2, "category_prompts": 3, "suppress": (0.0, -1.0, -2.0), "random_sets": 2, "seed": 6,
        }  # fmt: skip
        self.work = work = TableModel(rule, Config(**(asked | options)), splits())
        self.read, self.drawn, self.served, self.held = list[Any](), list[Any](), dict[Any, Any](), list[Any]()
        work.__dict__["judging"] = SimpleNamespace(reader=SimpleNamespace(check=lambda: None))
        regions = (Region.SPECIAL, Region.INSTRUCTION, Region.POST_INSTRUCTION)
        work.model.tokenize = lambda some: [SimpleNamespace(prompt=p, prompt_id=p.id, regions=regions) for p in some]
        pool = Pool(features=(C1, C2, A3, NONE), cosines=(0.9, 0.8, 0.7, 0.6))
        self.found = work.found(features_of(C1, C2), pool=pool)
        use(monkeypatch, work, self.found)
        parts = "demur.studies.categories.parts."
        monkeypatch.setattr(parts + "find", lambda _context, _prompts: self.found)
        monkeypatch.setattr(parts + "effects", self.effects)
        monkeypatch.setattr(parts + "find_causes", self.causes)
        monkeypatch.setattr(parts + "feature_activations", self.activations)
        monkeypatch.setattr(parts + "Attributor", lambda *_: SimpleNamespace(dictionary=self.dictionary))
        monkeypatch.setattr("demur.method.selection.random_set", self.draw)
        monkeypatch.setattr(RandomMatched, "measures", staticmethod(lambda _given, layers: tuple(layers)))
        monkeypatch.setattr(SideEffectMeter, "knowledge", lambda *_: None)

    def dictionary(self, some: PromptSet, *, to_zero: bool, scoring: Any) -> Any:
        assert (to_zero, scoring.regions) == (True, (Region.INSTRUCTION,))
        best = {"Arson": (A1, A2, A3, T2, FeatureId(0, 99)), "Theft": (T1, T2, A1)}[some.name]
        self.read.append((some.name, some.ids))
        return SimpleNamespace(overall=features_of(*best))

    def effects(self, work: Any, found: Any, some: PromptSet, features: Any) -> np.ndarray:
        assert (work, found) == (self.work, self.found)
        self.read.append(("effects", some.ids, features))
        table = np.array([[FALL[kind(p)].get(f, 0.0) for f in features] for p in some])
        table[0] = np.nan  # No signal.
        return table

    def activations(self, _model: Any, _suite: Any, items: Any, features: Any) -> Any:
        values = {C1: 1.0, C2: 4.0}
        return [
            torch.tensor([[values.get(f, 9.0) + token * (f == C1) for f in features] for token in range(3)])
            for _ in items
        ]

    def draw(self, like: FeatureSet, matched: Any, *, exclude: Any, seed: int) -> FeatureSet:
        self.drawn.append((like.features, matched, exclude, seed))
        # The first draw in place of common features does something.
        hit = RANDOM if seed == 6 and C1 in like.features else FeatureId(2, 101)
        return features_of(hit, FeatureId(2, 102))

    def causes(self, _w: Any, _f: Any, choosing: Any, test: Any, features: Any, *, serves: Any) -> Causes:
        self.served = {"choosing": choosing.ids, "test": test.ids, "features": features, "serves": serves}
        share = Estimate(value=0.9, low=0.8, high=1.0, n=3)
        rows: list[Cause] = []
        for f in features:
            role: Any = "refusal" if f in (C1, C2) else "harm"
            fires = FeatureRole(feature=f, role=role, instruction=1, post_instruction=0, share=share)
            rows.append(Cause(feature=f, role=role, fires=fires, alone=share, after=None, wakes=None, upstream=False))
        return Causes(features=tuple(rows), refusal=(C1, C2), whole=-9.0, n=len(test))

    def run(self) -> CategoriesResult:
        return run(self.work)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(monkeypatch)


@pytest.mark.parametrize(
    ("category", "level", "expected"),
    [("a / b / c", 1, "a"), ("a / b / c", 2, "a / b"), ("a / b / c", 0, "a / b / c"), ("", 1, None), (None, 1, None)],
)
def test_a_category_is_as_many_parts_of_its_name(category: Any, level: int, expected: Any) -> None:
    assert kind_of(Prompt(id="x", text="x", category=category), level) == expected


def test_categories_are_in_alphabetical_order_and_those_with_too_few_prompts_are_left_out(given: Given) -> None:
    some = (*prompts("x", theft=2, arson=1), Prompt(id="none", text="none"))
    assert {k: [p.id for p in own] for k, own in kinds_of(some, 1).items()} == {
        "Arson": ["x-arson0"], "Theft": ["x-theft0", "x-theft1"],
    }  # fmt: skip
    assert list(kinds_of(some, 1)) == ["Arson", "Theft"]
    choosing, test = prompts("c", arson=4, theft=2, fraud=2, spam=1), prompts("t", arson=2, theft=5, fraud=1, spam=9)
    kinds = Kinds.of(given.work, choosing, test, "kind")
    assert {k: len(own) for k, own in kinds.choosing.items()} == {"Arson": 3, "Theft": 2}
    assert {k: len(own) for k, own in kinds.test.items()} == {"Arson": 2, "Theft": 5}
    assert kinds.chosen.ids == ("c-arson0", "c-arson1", "c-arson2", "c-theft0", "c-theft1")
    assert given.work.warnings == ["categories left out, with fewer than 2 kind prompts: Fraud, Spam"]
    with pytest.raises(InputError, match=r"of 2 categories, 1 have 2 kind prompts.*Arson 4 \+ 2, Fraud 2 \+ 1\."):
        Kinds.of(given.work, prompts("c", arson=4, fraud=2), prompts("t", arson=2, fraud=1), "kind")


def test_sets_are_the_best_of_the_candidates_on_each_category_s_prompts(given: Given) -> None:
    result = given.run()
    # At most three of each, from all splits that choose; all but the test prompt that is answered.
    arson = ("direction-arson0", "direction-arson1", "direction-arson2")
    theft = ("direction-theft0", "direction-theft1", "selection-theft0")
    assert given.read[:2] == [("Arson", arson), ("Theft", theft)]
    # The pool, and k of each category's own.
    features = tuple(sorted((C1, C2, A1, A2, A3, T1, T2, NONE)))
    assert given.read[2] == ("effects", (*arson, *theft), features)
    assert result.candidates == 8
    one, two = result.categories
    assert (one.category, one.n_choosing, one.n_test) == ("Arson", 3, 3)
    assert (two.category, two.n_choosing, two.n_test) == ("Theft", 3, 3)
    assert (one.features.features, one.features.scores) == ((C1, C2, A1, A2), (5.0, 4.0, 3.0, 2.0))
    # 0.07 is more than a hundredth of 6.
    assert (two.features.features, two.features.scores) == ((C2, C1, T1, T2), (6.0, 3.0, 2.5, pytest.approx(0.07)))
    assert (one.specific, two.specific) == ((A1, A2), (T1, T2))
    # Those that serve more categories first, then the higher score.
    assert result.common == (C2, C1)
    assert [(u.feature, u.role, u.share) for u in result.uses] == [
        (C2, "refusal", 1.0), (C1, "refusal", 1.0), (A1, "harm", 0.5), (T1, "harm", 0.5), (A2, "harm", 0.5),
        (T2, "harm", 0.5),
    ]  # fmt: skip
    assert result.uses[0].scores == {"Arson": 4.0, "Theft": 6.0}
    assert (result.k, result.measures) == (4, ("not refused", "compliance"))
    assert given.work.watched[:2] == ["tuning-arson0", "tuning-arson1"]


def test_a_feature_below_a_hundredth_of_the_best_is_none_of_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FALL, "theft", FALL["theft"] | {T2: 0.06})
    one, two = Given(monkeypatch, k=6).run().categories
    # 0.05 is a hundredth of 5, and 0.06 of 6: no more.
    assert set(one.features.features) == {C1, C2, A1, A2}
    assert set(two.features.features) == {C1, C2, T1}


def test_categories_without_features_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FALL, "theft", {})
    made = Given(monkeypatch)
    with pytest.raises(InputError, match="fewer than 2 categories have features"):
        made.run()
    assert "category left out, as no feature lowers its refusal: Theft" in made.work.warnings


def test_the_strength_is_the_one_most_tuning_prompts_comply_with_and_the_mildest_of_equals(given: Given) -> None:
    # 0 answers one of four, −1 and −2 all; fraud has no set.
    assert given.run().factor == -1.0
    tuned = [label for label in given.work.asked if label.startswith("tuning")]
    assert tuned == ["tuning: c = 0", "tuning: c = -1", "tuning: c = -2"]


def test_without_a_scored_tuning_answer_the_first_strength_is_taken(given: Given) -> None:
    def unscored(done: Done) -> float:
        return float("nan") if done.prompt.id.startswith("tuning") and done.scaled else rule(done)

    given.work.rule = unscored
    given.work.config = given.work.config.model_copy(update={"suppress": (-1.0, 0.0)})
    assert given.run().factor == -1.0
    assert any("no tuning answer could be scored" in warning for warning in given.work.warnings)


def part(result: CategoriesResult, name: Any, other: Any, **wanted: Any) -> PartRow:
    found = result.part(name, other, **wanted)
    assert found is not None
    return found


def test_parts_act_alone_or_through_each_other(given: Given) -> None:
    result = given.run()
    rates = {
        (p, o): [(round(part(result, p, o, category=k).success.value, 6), part(result, p, o, category=k).success.n)
                 for k in ("", "Arson", "Theft")]
        for p, o in (("whole", "free"), *((p, o) for p in ("common", "specific") for o in ("free", "held", "held on")))
    }  # fmt: skip
    # Of three and three; one of theft is unscored under the whole set.
    assert rates == {
        ("whole", "free"): [(1.0, 5), (1.0, 3), (1.0, 2)],
        ("common", "free"): [(1.0, 6), (1.0, 3), (1.0, 3)],
        # The first prompt of arson is refused while its own features are held.
        ("common", "held"): [(0.833333, 6), (0.666667, 3), (1.0, 3)],
        ("common", "held on"): [(0.833333, 6), (0.666667, 3), (1.0, 3)],
        ("specific", "free"): [(1.0, 6), (1.0, 3), (1.0, 3)],
        ("specific", "held"): [(0.0, 6), (0.0, 3), (0.0, 3)],
        ("specific", "held on"): [(0.0, 6), (0.0, 3), (0.0, 3)],
    }
    row = part(result, "common", "held")
    whole = part(result, "whole", "free")
    expected = ratio_of(row.success, whole.success)
    assert (row.normalised.value, row.normalised.low) == pytest.approx((expected.value, expected.low))
    assert (row.size, part(result, "whole", "free").size, row.sets, row.split) == (2.0, 4.0, 1, "intersection")
    assert {r.split for r in result.parts} == {"all", "intersection", "graded"}
    assert {r.measure for r in result.parts} == {"not refused", "compliance"}


def test_what_is_held_has_its_own_values_and_then_is_released_or_stays_at_its_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, seen = Given(monkeypatch), dict[str, set[Any]]()
    before = made.work.answer

    def answer(label: str, some: PromptSet, change: Any = ()) -> Any:
        if "specific (intersection)" in label:
            for changes in change[0].by_prompt.values():
                for one in changes:
                    if isinstance(one, HoldFeatures):
                        after = None if one.after is None else tuple(one.after.tolist())
                        seen.setdefault(label.rpartition(", ")[2], set()).add((one.features, after))
        return before(label, some, change)

    monkeypatch.setattr(made.work, "answer", answer)
    made.run()
    # C1 is 1, 2, 3 at the three tokens, C2 is 4; the first token is scored by no method.
    assert seen == {
        "held": {((C1, C2), None), ((C2, C1), None)}, "held on": {((C1, C2), (2.5, 4.0)), ((C2, C1), (4.0, 2.5))},
    }  # fmt: skip


def test_random_features_take_the_place_of_each_part(given: Given) -> None:
    result = given.run()
    common, specific = (part(result, p, "held", control=True) for p in ("common", "specific"))
    # One of two sets answers one of six prompts.
    assert (common.success.value, common.sets, common.size) == (pytest.approx(1 / 12), 2, 2.0)
    assert (specific.success.value, specific.sets) == (0.0, 2)
    every = tuple(sorted((C1, C2, A1, A2, A3, T1, T2, NONE)))
    # Matched in all layers of the parts; for each part, seed and category.
    assert given.drawn == [
        (features, (0, 1, 2), every, seed)
        for own in (((C1, C2), (C2, C1)), ((A1, A2), (T1, T2)))
        for seed in (6, 7)
        for features in own
    ]
    assert not [r for r in result.parts if r.control and r.split == "graded"]


def test_specific_features_are_tried_on_every_category(given: Given) -> None:
    result = given.run()
    free = {(t.source, t.target): t for t in result.transfers if (t.other, t.measure) == ("free", "not refused")}
    assert {key: round(t.success.value, 6) for key, t in free.items()} == {
        ("Arson", "Arson"): 1.0, ("Arson", "Theft"): 0.0, ("Theft", "Arson"): 0.333333, ("Theft", "Theft"): 1.0,
    }  # fmt: skip
    assert {key: t.shared for key, t in free.items()} == {
        ("Arson", "Arson"): 2, ("Arson", "Theft"): 0, ("Theft", "Arson"): 0, ("Theft", "Theft"): 2,
    }  # fmt: skip
    held = [t for t in result.transfers if t.other == "held"]
    assert {t.success.value for t in held} == {0.0}
    assert len(result.transfers) == 2 * 2 * 4
    tests = {(t.other, t.measure): t for t in result.tests}
    assert list(tests) == [(o, m) for o in ("free", "held") for m in ("not refused", "compliance")]
    test = tests["free", "not refused"]
    assert (test.own.value, test.others.value) == (1.0, pytest.approx(1 / 6))
    difference, p = crossed_difference([True] * 6, [[False, True, False, False, False, False]])
    assert (test.difference.value, test.p) == pytest.approx((difference.value, p))
    assert tests["held", "not refused"].difference.value == 0.0


def test_roles_are_asked_of_the_prompts_that_each_feature_serves(given: Given) -> None:
    result = given.run()
    served = given.served
    assert served["choosing"] == (
        "direction-arson0", "direction-arson1", "direction-arson2", "direction-theft0", "direction-theft1",
        "selection-theft0",
    )  # fmt: skip
    test = ("test-arson0", "test-arson1", "test-arson2", "test-theft0", "test-theft1", "test-theft2")
    assert served["test"] == test
    assert set(served["serves"]) == {C1, C2, A1, A2, T1, T2}
    assert [*served["serves"][A1]] == [*served["choosing"][:3], *test[:3]]
    assert sorted(served["serves"][C1]) == sorted((*served["choosing"], *test))
    assert all(row.harmfulness is None for row in result.causes.features)
    assert any("cannot say which requests are harmful" in warning for warning in given.work.warnings)


def test_without_a_common_feature_the_graded_split_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FALL, "theft", {T1: 3.0, T2: 2.0})
    made = Given(monkeypatch)
    made.work.rule = lambda done: 1.0 if done.prompt.label != "harmless" and not done.scaled else -1.0
    result = made.run()
    assert {row.split for row in result.parts} == {"all", "graded"}
    assert (result.common, result.categories[0].specific) == ((), ())
    assert any("the split is graded only" in warning for warning in made.work.warnings)
    assert [t.shared for t in result.transfers[:1]] == [2]


# -- the pool, judges of harm, judged harmfulness ----------------------------------------------------------------------


def test_the_paper_s_sets_come_from_the_pool_s_attribution_where_it_says_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first prompt of arson carries no signal: what it says does not count."""
    made = Given(monkeypatch, candidates="pool", estimator="ig", k=2)

    def pool(found: Any, method: str, some: PromptSet) -> Any:
        assert (found, method) == (made.found.pool, "ig")
        table = torch.tensor([[FALL[kind(p)].get(f, 0.0) for f in found.features] for p in some], dtype=torch.float64)
        table[0] = torch.tensor([0.0, 0.0, 99.0, 0.0])
        signal = torch.arange(len(some)) > 0
        return SimpleNamespace(features=found.features, means=table, signal=signal)

    def attributor(*given: Any) -> Any:
        assert given == (made.work, made.found.clean, made.found.direction)
        return SimpleNamespace(pool=pool)

    monkeypatch.setattr("demur.studies.categories.parts.Attributor", attributor)
    one, two = made.run().categories
    assert (one.features.features, one.features.scores) == ((C1, C2), (5.0, 4.0))
    assert (two.features.features, two.features.scores) == ((C2, C1), (6.0, 3.0))
    # Nothing is asked of whole dictionaries.
    assert made.read == []


class Harm:
    """A judge of harm: only answers about theft are harmful, of those one cannot be told."""

    def __init__(self) -> None:
        self.asked, self.done = list[str](), list[str]()
        self.reader = SimpleNamespace(check=lambda: self.done.append("check"), close=lambda: self.done.append("close"))

    def judge(self, answers: Any) -> Any:
        self.asked += [answer.text for answer in answers]
        told = [None if a.prompt.id == "test-theft0" else "theft" in a.prompt.id for a in answers]
        return SimpleNamespace(verdicts=[SimpleNamespace(success=each) for each in told])


def test_a_judge_of_harm_is_one_more_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    harm, named = Harm(), list[Any]()

    def cached(run_of: Any, judge: str, progress: Any, *, keep: bool) -> Harm:
        named.append((run_of is made.work.run, judge, progress is made.work.progress, keep))
        return harm

    monkeypatch.setattr("demur.studies.categories.parts.CachedJudge", cached)
    monkeypatch.setattr("demur.studies.categories.parts.get_judge", lambda name: f"judge {name}")
    made = Given(monkeypatch, harm_judges=("guard", "guard"))
    result = made.run()
    assert result.measures == ("not refused", "compliance", "guard")
    assert (named, harm.done) == ([(True, "judge guard", True, True)], ["check", "close"])
    rates = {k: part(result, "specific", "held", category=k, measure="guard").success for k in ("", "Arson", "Theft")}
    assert {k: (rate.value, rate.n, rate.unscored) for k, rate in rates.items()} == {
        "": (0.4, 5, 1), "Arson": (0.0, 3, 0), "Theft": (1.0, 2, 1),
    }  # fmt: skip
    assert {text.partition(":")[0] for text in harm.asked} == {"test"}


def known(auroc: float) -> Knowledge:
    def about(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.1, high=value + 0.1, n=4)

    return Knowledge(says_harmful=about(0.9), says_harmful_of_harmless=about(0.1), auroc=about(auroc))


@pytest.mark.parametrize(("auroc", "asked"), [(0.61, True), (0.6, False)])
def test_judged_harmfulness_is_asked_of_a_model_that_tells_harm(
    monkeypatch: pytest.MonkeyPatch, auroc: float, asked: bool
) -> None:
    """The lower end of its AUROC is above one half. Without a feature harm is less likely, by its index."""
    made = Given(monkeypatch)

    def knowledge(_meter: Any, harmful: PromptSet, harmless: PromptSet, change: Any) -> Knowledge:
        # Prompts on which the labels hold.
        assert harmful.ids == tuple(p.id for p in made.work.splits.tuning.harmful)
        assert (harmless.ids, change) == (("+tuning0", "+tuning1"), ())
        return known(auroc)

    def says(_meter: Any, some: PromptSet, change: Any) -> list[float]:
        out = [f for each in change for f in each.features if each.factor == 0.0]
        return [n - 0.25 * sum(f.index for f in out) for n in range(len(some))]

    monkeypatch.setattr(SideEffectMeter, "knowledge", knowledge)
    monkeypatch.setattr(SideEffectMeter, "says_harmful", says)
    before = made.causes

    def causes(*given: Any, **options: Any) -> Causes:
        found = before(*given, **options)
        rows = [r.model_copy(update={"role": "inert"} if r.feature in (A3, NONE) else {}) for r in found.features]
        return found.model_copy(update={"features": tuple(rows)})

    monkeypatch.setattr("demur.studies.categories.parts.find_causes", causes)
    result = made.run()
    falls = {r.feature: (r.harmfulness.value, r.harmfulness.n) for r in result.causes.features if r.harmfulness}
    # Of features that act, on the six test prompts.
    assert falls == ({f: (0.25 * f.index, 6) for f in (C1, C2, A1, A2, T1, T2)} if asked else {})
    warned = [w for w in made.work.warnings if "which requests are harmful" in w]
    assert [f"{auroc:.2f}" in w for w in warned] == ([] if asked else [True])
    told = [(done, n) for label, done, n in made.work.told if label == "judged harmfulness"]
    assert told == ([(n, 6) for n in range(1, 7)] if asked else [])
    # The roles of the uses are those that were found.
    assert {use.feature: use.role for use in result.uses}[A1] == "harm"
