"""`demur transfer` where counterparts, drives and answers are rules: every row is known, and so is its page."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from page_parts import about, blocks, cells
from table_model import Done, TableModel, features_of, numbered, splits_of, use

from demur.method.attribution import Pool
from demur.method.interventions import SetFeatures
from demur.method.matching import Nearest
from demur.report import charts
from demur.report.blocks import Chart, Table
from demur.stats import bootstrap_of, crossed_difference
from demur.studies.drive import Effects
from demur.studies.transfer import Config, EffectRow, MatchRow, Result, SuiteRows, WayRow, run
from demur.types import FeatureId, Split

ONE, TWO, LOST = FeatureId(2, 0), FeatureId(2, 1), FeatureId(0, 3)
SAME, NEAR, ALIKE = FeatureId(2, 10), FeatureId(2, 11), FeatureId(2, 12)
WEAK, DEAD, LOUD = FeatureId(2, 90), FeatureId(2, 91), FeatureId(2, 92)
FOUND = {
    ("good", "decoder", ONE): Nearest((SAME, NEAR, None), (1.0, 0.5, float("nan")), (True, False, False)),
    ("good", "activation", ONE): Nearest((SAME, ALIKE, None), (0.75, 0.25, float("nan")), (True, True, False)),
    ("poor", "decoder", ONE): Nearest((None,) * 3, (float("nan"),) * 3, (False,) * 3),
    ("poor", "activation", ONE): Nearest((ALIKE, ALIKE, None), (0.5, 0.25, float("nan")), (False,) * 3),
    ("good", "decoder", WEAK): Nearest((SAME, NEAR), (0.25, 0.0), (False, True)),
    ("good", "activation", WEAK): Nearest((SAME, NEAR), (0.125, 0.0), (False, False)),
    ("poor", "decoder", WEAK): Nearest((None, None), (float("nan"),) * 2, (False, False)),
    ("poor", "activation", WEAK): Nearest((SAME, NEAR), (0.5, 0.0), (True, True)),
}
# Nats by which sets lower the refusal log-odds.
DRIVE = {(ONE, TWO, LOST): 4.0, (SAME, NEAR): 2.0, (SAME, ALIKE): 1.0, (SAME,): 3.0, (ALIKE,): 0.5}


@dataclass(frozen=True)
class Sources:
    suite: Any
    others: Any


def rule(done: Any) -> float:
    """Clean, harmful prompts and the first harmless one are refused. F* out lets the second pass, the second random set
    both; F* set makes all refuse, the first random set only the first."""
    n = int(done.prompt.id[-1])
    if done.given:
        return 1.0 if ONE in done.given or (DEAD in done.given and WEAK in done.given and n == 0) else -1.0
    if ONE in done.scaled:
        return 1.0 if n == 0 else -1.0
    if LOUD in done.scaled or SAME in done.scaled:
        return -1.0
    return 1.0 if done.prompt.label == "harmful" or done.prompt.id == "+test0" else -1.0


class Work(TableModel):
    """What features are set to is told to the rule."""

    def odds(self, prompts: Any, change: Any) -> np.ndarray:
        found: list[float] = []
        for each in prompts:
            done: Any = Done(getattr(each, "prompt", each), change)
            done.given = [f for one in change if isinstance(one, SetFeatures) for f in one.features]
            assert {*done.scaled.values()} <= {-1.0}
            found.append(self.rule(done))
        return np.array(found)


class Given:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, silent: bool = False) -> None:
        config = Config(to_saes=("a",), factor=-1, random_sets=2, n_answers=2)
        made = splits_of(test=3)
        test = Split(harmful=made.test.harmful, harmless=numbered("+test", 4, "harmless"))
        self.work = work = Work(rule, config, made.model_copy(update={"test": test}))
        self.silent, self.asked = silent, list[Any]()
        suites = {name: SimpleNamespace(identity=f"id {name}", source=name) for name in ("good", "poor")}
        work.suite = SimpleNamespace(identity="own", source="own")
        work.inputs = Sources(work.suite, {"folder/good": suites["good"], "folder/poor": suites["poor"]})
        work.__dict__["judging"] = "judging"
        self.others: list[Work] = []
        monkeypatch.setattr(Work, "on", lambda _self, inputs: self.on(inputs))
        found = work.found(features_of(ONE, TWO, LOST), ids=(1, 2), pool=Pool(features=(ONE,), cosines=(1.0,)))
        self.found = found
        use(monkeypatch, work, found)
        monkeypatch.setattr("demur.studies.drive.random_sets", self.random)
        monkeypatch.setattr("demur.studies.drive.set_to_maxima", self.maxima)
        monkeypatch.setattr("demur.studies.drive.falls", self.falls)
        monkeypatch.setattr("demur.method.activations.feature_activations", self.activations)
        monkeypatch.setattr("demur.method.matching.nearest", self.nearest)
        monkeypatch.setattr("demur.method.matching.by_cosine", "decoder")
        monkeypatch.setattr("demur.method.matching.by_correlation", self.correlation)

    def on(self, inputs: Sources) -> Work:
        made = Work(rule, self.work.config, self.work.splits)
        made.inputs, made.suite = inputs, inputs.suite
        self.others.append(made)
        return made

    def known(self, work: Any, found: Any, features: Any) -> None:
        """What the sets are matched to: F* as it was found, and of other SAEs the features themselves."""
        if work is self.work:
            assert found is self.found
        else:
            assert work.judging == "judging"
            assert found.chosen == self.found.chosen
            assert len(found.pool.features) == len(found.pool.cosines)
            assert features[0] in (*found.pool.features, WEAK, DEAD)

    def random(self, work: Any, found: Any, features: Any) -> Any:
        self.known(work, found, features)
        assert features in DRIVE
        return ((WEAK, DEAD), (DEAD, LOUD))

    def maxima(self, work: Any, found: Any, features: Any) -> Any:
        self.known(work, found, features)
        return (SetFeatures(features, (7.0,) * len(features)),)

    def falls(self, work: Any, prompts: Any, ids: Any, sets: Any, factor: float) -> Effects:
        assert (prompts, ids, sets[1:], factor) == (
            self.work.splits.test, (1, 2), ((WEAK, DEAD), (DEAD, LOUD)), -1.0,
        )  # fmt: skip
        self.asked.append((work.suite.source, sets[0]))
        harmful = np.array([[DRIVE[sets[0]] + 1.5] * 3, [0.5] * 3, [1.5] * 3])
        return Effects(harmful, np.array([[0.5] * 4, [0.0] * 4, [0.0] * 4]))

    def activations(self, model: Any, suite: Any, items: Any, features: Any) -> Any:
        assert (model, suite, features) == (self.work.model, self.work.suite, (WEAK, DEAD, LOUD))
        assert [item.prompt_id for item in items] == ["selection0", "selection1", "+selection0", "+selection1"]
        tables = [torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 2.0]])] + [torch.tensor([[0.0, 0.0, 0.0]])] * 2
        tables.append(torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.0, 0.0]]))
        return [table * 0 for table in tables] if self.silent else tables

    def correlation(self, model: Any, items: Any) -> str:
        assert model is self.work.model
        assert [item.prompt_id for item in items] == ["selection0", "selection1", "+selection0", "+selection1"]
        return "activation"

    def nearest(self, first: Any, second: Any, features: Any, best: Any) -> Nearest:
        assert first is self.work.suite
        if not features:
            return Nearest((), (), ())
        assert features in ((ONE, TWO, LOST), (WEAK, LOUD))
        return FOUND[second.source, best, features[0]]

    def run(self) -> Result:
        return run(self.work)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(monkeypatch)


def test_counterparts_of_each_feature_in_both_ways(given: Given) -> None:
    result = given.run()
    good, poor = result.suites
    assert (good.name, poor.name, result.k, result.factor) == ("folder/good", "folder/poor", 3, -1.0)
    told = [(m.feature, m.way, m.other, m.mutual) for m in good.matches]
    assert told == [
        (ONE, "decoder", SAME, True), (TWO, "decoder", NEAR, False), (LOST, "decoder", None, False),
        (ONE, "activation", SAME, True), (TWO, "activation", ALIKE, True), (LOST, "activation", None, False),
    ]  # fmt: skip
    assert [m.score for m in good.matches] == pytest.approx([1.0, 0.5, float("nan"), 0.75, 0.25, float("nan")],
                                                            nan_ok=True)  # fmt: skip
    # None in both ways is no agreement.
    assert (good.agree, poor.agree) == (1, 0)
    keys = [key for key in given.work.stages if key.startswith("counterparts")]
    # Of F* and of random features, in two suites, in two ways, from the prompts that match.
    assert len(keys) == 8
    used = given.found.clean.used("selection")
    assert all(used.harmful.digest in key and used.harmless.digest in key for key in keys)
    assert given.work.watched == ["tuning0", "tuning1", "+tuning0", "+tuning1"]


def test_random_features_that_never_fire_are_no_control(given: Given) -> None:
    """`nearest` is asked of random features without the silent one; each comes once."""
    decoder, activation = given.run().suites[0].ways
    assert (decoder.way, activation.way) == ("decoder", "activation")
    assert (decoder.score.value, decoder.random.value, decoder.difference.value) == (0.75, 0.125, 0.625)
    assert (activation.score.value, activation.random.value, activation.difference.value) == (0.5, 0.0625, 0.4375)
    one, other = np.array([[1.0], [0.5]]), np.array([[0.25], [0.0]])
    assert decoder.score == bootstrap_of(lambda m: m[..., 0], one)
    assert decoder.random == bootstrap_of(lambda m: m[..., 0], other)
    assert decoder.difference == bootstrap_of(lambda a, b: (a - b)[..., 0], one, other)
    # A feature without an SAE to match in has no mutual counterpart.
    assert (decoder.mutual, decoder.mutual_random) == (pytest.approx(1 / 3), 0.5)
    assert (activation.mutual, activation.mutual_random) == (pytest.approx(2 / 3), 0.0)


def test_without_a_random_feature_that_fires_the_control_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Given(monkeypatch, silent=True).run().suites[0].ways[0]
    assert way.score.value == 0.75
    assert np.isnan([way.random.value, way.difference.value, way.mutual_random]).all()


def test_the_drive_of_each_set_of_counterparts_is_a_share_of_that_of_f_star(given: Given) -> None:
    good, poor = given.run().suites
    # Of what F* takes, 5 ½ nats, ½ is taken from harmless prompts, too, and one by random sets.
    told = [(e.name, e.features, round(e.drive.value, 9), round(e.carried.value, 9)) for e in good.effects]
    assert told == [
        ("F*", 3, 4.0, 1.0), ("counterparts by decoder cosine", 2, 2.0, 0.5),
        ("counterparts by correlation of activations", 2, 1.0, 0.25), ("counterparts in both ways", 1, 3.0, 0.75),
    ]  # fmt: skip
    # Each feature counts once.
    assert [(e.name, e.features, round(e.carried.value, 9)) for e in poor.effects] == [
        ("F*", 3, 1.0), ("counterparts by correlation of activations", 1, 0.125),
    ]  # fmt: skip
    assert {e.drive.n for e in good.effects} == {e.carried.n for e in good.effects} == {7}
    assert given.work.warnings == [
        "poor: there are no counterparts by decoder cosine", "poor: there are no counterparts in both ways",
    ]  # fmt: skip
    # F* is measured once, in its own SAEs.
    assert [source for source, _ in given.asked] == ["own", "good", "good", "good", "poor"]
    assert [other.inputs.others for other in given.others] == [given.work.inputs.others] * 2


def test_answers_under_a_set_are_held_against_those_under_random_sets(given: Given) -> None:
    result = given.run()
    assert (result.clean_harmful.value, result.clean_harmless.value) == (1.0, 0.5)
    assert (result.clean_harmful.n, result.clean_harmless.n) == (2, 2)
    own, decoder, *_ = result.suites[0].effects
    # Of the first two prompts of each class.
    assert (own.suppressed.value, own.suppressed_random.value, own.suppressed_random.n) == (0.5, 0.5, 4)
    assert (own.induced.value, own.induced_random.value) == (1.0, 0.25)
    assert own.suppressed_difference == crossed_difference((True, False), [(True, True), (False, False)])[0]
    assert own.induced_difference == crossed_difference((True, True), [(True, False), (False, False)])[0]
    assert (decoder.suppressed.value, decoder.induced.value, decoder.induced_random.value) == (0.0, 0.0, 0.25)
    assert given.others[0].asked.count("counterparts by decoder cosine: suppressed") == 3
    assert given.work.asked.count("F*: induced") == 3


# -- the page ----------------------------------------------------------------------------------------------------------


def shown() -> Result:
    def effect(name: str, n: int) -> EffectRow:
        parts = ("suppressed", "suppressed_random", "suppressed_difference", "induced", "induced_random",
                 "induced_difference")  # fmt: skip
        given: dict[str, Any] = {part: about((n + k) / 100, 0.01) for k, part in enumerate(parts)}
        return EffectRow(name=name, features=n, drive=about(n / 2), carried=about(n / 10), **given)

    def match(feature: FeatureId, way: Any, other: FeatureId | None, score: float, mutual: bool) -> MatchRow:
        return MatchRow(feature=feature, way=way, other=other, score=score, mutual=mutual)

    suite = SuiteRows(
        name="folder/of/good",
        matches=(
            match(ONE, "decoder", SAME, 0.75, True), match(TWO, "decoder", NEAR, 0.5, True),
            match(LOST, "decoder", None, float("nan"), False), match(ONE, "activation", SAME, 0.25, True),
            match(TWO, "activation", NEAR, 0.125, False), match(LOST, "activation", None, float("nan"), False),
        ),
        ways=(
            WayRow(way="decoder", score=about(0.6), random=about(0.3), difference=about(0.35), mutual=0.5,
                   mutual_random=0.25),
            WayRow(way="activation", score=about(0.7), random=about(0.2), difference=about(0.55), mutual=0.75,
                   mutual_random=float("nan")),
        ),
        effects=(effect("F*", 10), effect("near ones", 20), effect("like ones", 30)),
    )  # fmt: skip
    return Result(
        study="transfer", k=3, factor=-1.5, clean_harmful=about(0.9), clean_harmless=about(0.1), suites=(suite,)
    )


def test_the_verdict_counts_counterparts_and_names_what_they_carry() -> None:
    (said,) = shown().page().verdicts
    parts = (
        "Of 3 features",
        "2 have a mutual",
        "SAEs good by decoder",
        "1 by correlation",
        "2 the same one",
        ". Near ones (20) carry 2.00 [1.95–2.05] of its drive; like ones (30) carry 3.00 [2.95–3.05] of its",
    )
    places = [said.index(part) for part in parts]
    assert places == sorted(places)
    assert said.endswith("of its drive.")


def test_effects_and_counterparts_stand_in_their_columns() -> None:
    effects, section = "F* in SAEs good", "Counterparts in SAEs good"
    (table,) = blocks(shown(), Table, effects)
    assert table.rows[:2] == (
        ("F*", "10", "5.00 [4.95–5.05]", "1.00 [0.95–1.05]", "10% [9–11]", "11% [10–12]", "+12 [11 to 13]",
         "13% [12–14]", "14% [13–15]", "+15 [14 to 16]"),
        ("near ones", "20", "10.00 [9.95–10.05]", "2.00 [1.95–2.05]", "20% [19–21]", "21% [20–22]", "+22 [21 to 23]",
         "23% [22–24]", "24% [23–25]", "+25 [24 to 26]"),
    )  # fmt: skip
    assert table.strong == {0}
    places = [table.caption.index(part) for part in ("90% [85–95] of harmful", "10% [5–15] of harmless", "c = −1.5;")]
    assert places == sorted(places)
    assert [section.brief for section in shown().page().sections] == [True, False]
    assert cells(shown(), section) == [
        ("decoder cosine", "0.60 [0.55–0.65]", "0.30 [0.25–0.35]", "0.35 [0.30–0.40]", "50%", "25%"),
        ("correlation of activations", "0.70 [0.65–0.75]", "0.20 [0.15–0.25]", "0.55 [0.50–0.60]", "75%", "–"),
    ]
    assert cells(shown(), section, 1) == [
        ("2:0", "2:10", "0.75", "yes", "2:10", "0.25", "yes"), ("2:1", "2:11", "0.50", "yes", "2:11", "0.12", "no"),
        ("0:3", "–", "–", "no", "–", "–", "no"),
    ]  # fmt: skip
    assert [table.folded for table in blocks(shown(), Table, section)] == [False, True]


def test_both_ways_are_the_axes_of_the_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "scatter", lambda lines, **options: (lines, options))
    (chart,) = blocks(shown(), Chart)
    (line,), options = chart.draw()
    assert [(p.x, p.y) for p in line.points][:2] == [(0.75, 0.25), (0.5, 0.125)]
    assert (len(line.points), line.join) == (3, "none")
    assert options == {"x_title": "decoder cosine", "y_title": "correlation of activations"}
