"""`demur checkpoints` where both checkpoints are rules: every row of a comparison is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import Done, TableModel, features_of, numbered, splits_of, use

from demur.errors import ModelError
from demur.method.attribution import Pool
from demur.method.interventions import SetFeatures
from demur.stats import Estimate, bootstrap_mean, crossed_difference, holm, mcnemar, paired_difference
from demur.studies.checkpoints import Config, Result, run
from demur.studies.checkpoints.measure import (
    Pair,
    Side,
    activations,
    alone,
    contrast,
    direction_cosines,
    p_harmful,
    unexplained,
)
from demur.studies.checkpoints.rule import Evidence, Mechanism, Verdict, decide
from demur.studies.drive import Effects
from demur.studies.roles import FeatureRole, Roles
from demur.types import FeatureId, PromptSet

# Kept; moved to TWIN in the earlier; too far from FAR; harm, in the later only.
KEPT, MOVED, LONE, HARM = FeatureId(2, 0), FeatureId(2, 1), FeatureId(2, 2), FeatureId(0, 3)
TWIN, FAR = FeatureId(2, 4), FeatureId(2, 5)
LATER, EARLIER = (KEPT, MOVED, LONE, HARM), (KEPT, TWIN, FAR)
DRAWN = tuple((FeatureId(2, 90 + n),) for n in range(7))
# What the decoder rows of two features have in common.
COSINE = {(MOVED, TWIN): 0.9, (LONE, FAR): 0.4, **{(each[0], FAR): 0.4 for each in DRAWN}}


def rule(when: str) -> Any:
    """The later refuses harmful prompts but the last, and over-refusal prompts; the earlier the first two harmful ones.
    Without its refusal features the later answers all but one, and the earlier all."""

    def odds(done: Any) -> float:
        prompt, n = done.prompt, int(done.prompt.id[-1])
        if "SetFeatures" in done.kinds:
            # Three features or more, set to their maxima, make it refuse; one does not.
            return 1.0 if len(done.value) > 1 and n < (3 if when == "after" else 1) else -1.0
        if prompt.label == "harmless":
            return 1.0 if prompt.id == "over1" and when == "after" else -1.0
        refuses = n != 3 if when == "after" else n < 2
        if KEPT in done.scaled:
            return 1.0 if refuses and n == 0 and when == "after" else -1.0
        if DRAWN[0][0] in done.scaled and n == 1:
            return -1.0
        return 1.0 if refuses else -1.0

    return odds


class Work(TableModel):
    """A checkpoint; how often features are set is told to the rule."""

    name = ""

    def odds(self, prompts: Any, change: Any) -> np.ndarray:
        found: list[float] = []
        for each in prompts:
            done: Any = Done(getattr(each, "prompt", each), change)
            done.value = next((one.value for one in change if isinstance(one, SetFeatures)), None)
            found.append(self.rule(done))
        return np.array(found)


class OneSide(Side):
    """A checkpoint whose refusal features and random sets are given."""

    @property
    def refusal_features(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return () if self.found is None else tuple(f for f in self.found.chosen.features if f != HARM)

    def random_sets(self, features: Any) -> Any:
        self.work.told.append(("random", len(features), 0))  # type: ignore[attr-defined]
        return () if self.found is None else DRAWN

    def read_in(self, other: Side) -> Any:
        return other.work


class Given:
    """Two checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, silent: tuple[str, ...] = (), one: bool = True) -> None:
        config = Config(before=("old",), n_answers=3, n_alone=2, margin=0.1, factor=0.0)
        splits = splits_of(test=4)
        self.works = {w: Work(rule(w), config, splits) for w in ("after", "before")}
        suites = {"after": "a", "before": "a" if one else "b"}
        for when, work in self.works.items():
            work.suite, work.name = SimpleNamespace(identity=suites[when], name=when), when
        self.context = self.works["after"]
        self.context.inputs = SimpleNamespace(before={"old": "inputs"})
        monkeypatch.setattr(Work, "on", lambda _self, inputs: self.works["before"] if inputs == "inputs" else None)
        founds: dict[str, Any] = {}
        pool = Pool(features=(KEPT,), cosines=(1.0,))
        for when, features, ids in (("after", LATER, (1, 2)), ("before", EARLIER, (2, 3))):
            founds[when] = self.works[when].found(features_of(*features), ids=ids, pool=pool)

        def side(_cls: Any, name: str, work: Any, context: Any) -> Side:
            assert context is self.context
            assert name == {"after": "MODEL", "before": "old"}[work.name]
            if work.name == "before":
                work.warn("something odd")
            return OneSide(name, work, None if work.name in silent else founds[work.name])

        self.asked: list[Any] = []
        self.evidence: list[Evidence] = []
        monkeypatch.setattr("demur.studies.checkpoints.decide", self.decide)
        measure = "demur.studies.checkpoints.measure."
        monkeypatch.setattr(Side, "of", classmethod(side))
        monkeypatch.setattr(Pair, "mechanism", self.mechanism)
        monkeypatch.setattr(measure + "direction_cosines", self.cosines)
        monkeypatch.setattr(measure + "activations", self.active)
        monkeypatch.setattr(measure + "alone", self.alone)
        monkeypatch.setattr(measure + "p_harmful", self.harmful)
        monkeypatch.setattr(measure + "unexplained", self.unexplained)
        monkeypatch.setattr("demur.studies.gauge.p_refuse", self.refuse)
        monkeypatch.setattr("demur.method.matching.unit_rows", self.rows)
        over = PromptSet(name="over", prompts=numbered("over", 2, "harmless").prompts)
        self.over: PromptSet | None = over
        monkeypatch.setattr("demur.studies.side_effects.over_refusal_prompts", lambda _config, _context: self.over)
        monkeypatch.setattr("demur.studies.drive.set_to_maxima", self.maxima)

    def maxima(self, work: Any, found: Any, features: Any) -> Any:
        assert found.chosen.features == {"after": LATER, "before": EARLIER}[work.name]
        return (SetFeatures(features, (7.0,) * len(features)),)

    def decide(self, evidence: Evidence, margin: float) -> Verdict:
        assert margin == 0.1
        self.evidence.append(evidence)
        return decide(evidence, margin)

    def mechanism(self, side: Side, features: Any, factor: float) -> Mechanism:
        self.asked.append((side.name, features, factor))

        def about(value: float) -> Estimate:
            return Estimate(value=value, low=value - 0.01, high=value + 0.01, n=9)

        return Mechanism(features=features, own=about(5.0), other=about(5.0), carried=about(1.0), fires=about(1.0))

    def cosines(self, _pair: Any, harmful: PromptSet, harmless: PromptSet) -> Any:
        assert (harmful.ids, harmless.ids) == (("direction0", "direction1"), ("+direction0", "+direction1"))
        return [(Estimate(value=n / 10, low=0, high=1, n=4), 0.5 + n / 10) for n in range(3)]

    def active(self, work: Any, prompts: PromptSet, features: Any) -> np.ndarray:
        assert len(prompts) == 4
        return np.array([[(10.0 if work.name == "after" else 1.0) * f.index + n for f in features] for n in range(4)])

    def alone(self, _pair: Any, work: Any, features: Any, prompts: PromptSet) -> list[Estimate]:
        assert len(prompts) == 2
        value = 2.0 if work.name == "after" else 1.0
        return [Estimate(value=value + f.index, low=0, high=9, n=2) for f in features]

    def harmful(self, side: Side, context: Any, tests: Any) -> list[np.ndarray]:
        assert context is self.context
        start = 0.4 if side.name == "MODEL" else 0.1
        return [np.array([start + 0.2 * n for n in range(len(each))]) for each in tests]

    def refuse(self, work: Any, prompts: PromptSet, ids: Any) -> np.ndarray:
        assert ids == (1, 2, 3)
        return np.array([0.5 if n == 1 else (0.9 if work.name == "after" else 0.2) for n in range(len(prompts))])

    def unexplained(self, side: Side, suite_of: Side, prompts: PromptSet, layers: Any) -> dict[int, float]:
        self.asked.append((side.name, suite_of.name, prompts.ids, layers))
        return {layer: layer / 10 + (0.5 if side.name == "old" else 0) for layer in layers}

    def rows(self, suite: Any, features: Any) -> Any:
        """Rows in a space of one axis for each feature, mixed by `COSINE`."""
        axes = (*LATER, TWIN, FAR, *(each[0] for each in DRAWN))
        table = torch.zeros(len(features), len(axes))
        for n, f in enumerate(features):
            table[n, axes.index(f)] = 1.0
            for (a, b), value in COSINE.items():
                if a == f and suite.name == "after":
                    table[n, axes.index(b)] = value
        return table, torch.ones(len(features))

    def run(self) -> Result:
        return run(self.context)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(monkeypatch)


def test_behaviour_is_compared_prompt_by_prompt(given: Given) -> None:
    (pair,) = given.run().pairs
    assert pair.before == "old"
    rows = {row.prompts: row for row in pair.behaviour}
    assert {name: (r.after.value, r.before.value) for name, r in rows.items()} == {
        "harmful": (0.75, 0.5), "harmless": (0.0, 0.0), "over-refusal": (0.5, 0.0),
    }  # fmt: skip
    later, earlier = (True, True, True, False), (True, True, False, False)
    expected = paired_difference(later, earlier)
    assert (rows["harmful"].difference.value, rows["harmful"].difference.low) == (0.25, expected.low)
    ps = [mcnemar(later, earlier).p, 1.0, mcnemar((False, True), (False, False)).p]
    assert [r.p for r in pair.behaviour] == ps
    assert [r.p_holm for r in pair.behaviour] == list(holm(ps))


def test_without_over_refusal_prompts_two_kinds_are_compared(given: Given) -> None:
    given.over = None
    (pair,) = given.run().pairs
    assert [row.prompts for row in pair.behaviour] == [row.prompts for row in pair.knowing] == ["harmful", "harmless"]


def test_the_features_of_each_are_scaled_and_set_in_both(given: Given) -> None:
    (pair,) = given.run().pairs
    rows = {(r.found, r.checkpoint, r.kind): r for r in pair.answers}
    assert list(rows) == [
        (f, c, k) for f in ("after", "before") for c in ("after", "before") for k in ("suppress", "induce")
    ]
    told = {key: (r.clean.value, round(r.changed.value, 6), round(r.random.value, 6)) for key, r in rows.items()}
    # On the first three prompts of each class. One of five random sets answers the second harmful prompt.
    assert told["after", "after", "suppress"] == told["before", "after", "suppress"] == (
        1.0, 0.333333, round(1 - 1 / 15, 6),
    )  # fmt: skip
    # The earlier refuses two of the three.
    assert told["after", "before", "suppress"] == (2 / 3, 0.0, 0.6)
    # Harmless prompts are refused with the features set.
    assert (told["after", "after", "induce"], told["before", "before", "induce"]) == (
        (0.0, 1.0, 0.0), (0.0, 0.333333, 0.0),
    )  # fmt: skip
    row = rows["after", "after", "suppress"]
    runs = [(True, False, True), *[(True, True, True)] * 4]
    difference, p = crossed_difference((True, False, False), runs)
    assert (row.difference.value, row.p) == (difference.value, p)
    assert (row.clean.n, row.random.n) == (3, 15)
    asked = [label for label in given.context.asked if "found after, in after" in label]
    assert asked.count("suppress: found after, in after") == 1
    assert asked.count("suppress: found after, in after, random") == 5


def test_without_answers_asked_for_there_are_none(given: Given) -> None:
    given.context.config = given.context.config.model_copy(update={"n_answers": 0})
    assert given.run().pairs[0].answers == ()


def test_features_are_kept_moved_gained_or_lost(given: Given) -> None:
    (pair,) = given.run().pairs
    # The later checkpoint's first; what is in both stands there.
    assert [r.feature for r in pair.features] == [*LATER, TWIN, FAR]
    rows = {r.feature: r for r in pair.features}
    assert {f: r.status for f, r in rows.items()} == {
        KEPT: "kept", MOVED: "moved", LONE: "gained", HARM: "gained", TWIN: "moved", FAR: "lost",
    }  # fmt: skip
    assert [(r.partner, r.cosine) for r in (rows[MOVED], rows[TWIN])] == [
        (TWIN, pytest.approx(0.9)), (MOVED, pytest.approx(0.9)),
    ]  # fmt: skip
    # No nearer than a random feature.
    assert (rows[LONE].partner, rows[FAR].cosine, rows[KEPT].partner) == (None, None, None)
    assert [f for f, r in rows.items() if not r.refusal] == [HARM]
    # Means over four prompts.
    assert (rows[MOVED].active_after, rows[MOVED].active_before) == (11.5, 2.5)
    assert (rows[TWIN].active_after, rows[TWIN].active_before) == (41.5, 5.5)
    assert (rows[FAR].alone_after.value, rows[FAR].alone_before.value) == (7.0, 6.0)


def test_with_other_saes_no_number_means_the_same_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Given(monkeypatch, one=False)
    (pair,) = made.run().pairs
    # Both checkpoints' features 2:0 have the same decoder row here, so one has moved to the other.
    kept = [(r.feature, r.status, r.partner) for r in pair.features if r.feature == KEPT]
    assert kept == [(KEPT, "moved", KEPT), (KEPT, "moved", KEPT)]


def test_mechanisms_are_of_refusal_features_and_of_the_whole_set(given: Given) -> None:
    (pair,) = given.run().pairs
    assert given.asked[:3] == [
        ("MODEL", (KEPT, MOVED, LONE), 0.0), ("MODEL", LATER, 0.0), ("old", EARLIER, 0.0),
    ]  # fmt: skip
    assert (pair.mechanisms["after"].features, pair.stars["after"].features) == ((KEPT, MOVED, LONE), LATER)
    # All of the earlier F* are refusal features: measured once.
    assert pair.stars["before"] == pair.mechanisms["before"]
    (evidence,) = given.evidence
    assert (evidence.after, evidence.before) == (pair.mechanisms["after"], pair.mechanisms["before"])
    assert evidence.refusals == [(row.prompts, row.difference) for row in pair.behaviour]
    # Both drive alike; refusals differ by more than a tenth.
    assert pair.verdict.kind == "not clear"
    assert [(row.layer, row.cosine.value, row.halves) for row in pair.cosines] == [
        (0, 0.0, 0.5), (1, 0.1, 0.6), (2, 0.2, 0.7),
    ]  # fmt: skip
    fit = {row.layer: (row.after, row.before) for row in pair.fit}
    assert fit == {2: (0.2, pytest.approx(0.7)), 0: (0.0, 0.5)}
    assert given.asked[3][:3] == ("MODEL", "MODEL", ("test0", "test1", "test2", "test3"))
    assert given.asked[4][:2] == ("old", "MODEL")


def test_what_is_known_and_not_refused_is_counted(given: Given) -> None:
    (pair,) = given.run().pairs
    row = pair.knowing[0]
    # 0.4 to 1.0 and 0.1 to 0.7; refusals 0.9, 0.5, 0.9, 0.9 and 0.2, 0.5, 0.2, 0.2.
    assert [round(e.value, 6) for e in (row.harmful_after, row.harmful_before, row.harmful_change)] == [0.7, 0.4, 0.3]
    assert [round(e.value, 6) for e in (row.refuse_after, row.refuse_before, row.refuse_change)] == [0.8, 0.275, 0.525]
    # Above one half and at most one half: the second after; the last before, at 0.7.
    assert (row.ignored_after.value, row.ignored_before.value) == (0.25, 0.25)
    points = [(p.checkpoint, round(p.harmful, 6), p.refuse) for p in pair.points if p.prompts == "harmful"]
    assert points[:2] == [("after", 0.4, 0.9), ("after", 0.6, 0.5)]
    assert points[4:6] == [("before", 0.1, 0.2), ("before", 0.3, 0.5)]
    assert len(pair.points) == 2 * (4 + 4 + 2)


def test_a_checkpoint_that_never_refuses_has_no_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Given(monkeypatch, silent=("before",))
    monkeypatch.setattr("demur.studies.gauge.p_refuse", lambda _w, prompts, _ids: np.zeros(len(prompts)))
    result = made.run()
    (pair,) = result.pairs
    assert set(pair.mechanisms) == set(pair.stars) == {"after"}
    assert {r.found for r in pair.answers} == {"after"}
    assert {r.status for r in pair.features} == {"gained"}
    assert "old: something odd" in made.context.warnings
    assert (result.factor, result.margin) == (0.0, 0.1)
    other = Given(monkeypatch, silent=("after",))
    monkeypatch.setattr("demur.studies.gauge.p_refuse", lambda _w, prompts, _ids: np.zeros(len(prompts)))
    (pair,) = other.run().pairs
    assert {r.status for r in pair.features} == {"lost"}
    # The SAEs' fit is then read at the earlier one's layers.
    assert [row.layer for row in pair.fit] == [2]
    with pytest.raises(ModelError, match="none of the checkpoints refuses"):
        Given(monkeypatch, silent=("after", "before")).run()


# -- what is measured --------------------------------------------------------------------------------------------------


def side(work: Any, name: str = "MODEL") -> Side:
    return Side(name, work, None)


def work_of(rule: Any = lambda done: 5.0 - done.scaled.get(KEPT, 1.0)) -> TableModel:
    config = Config(before=("old",))
    work = TableModel(rule, config, splits_of(4, 4, 4, 3))
    work.suite = SimpleNamespace(identity="a")
    work.__dict__["identity"] = {"weights": "w"}
    return work


def test_activations_are_maxima_and_the_contrast_is_their_sum_by_decoder_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of()
    values = "demur.studies.checkpoints.measure."
    monkeypatch.setattr(values + "feature_activations", lambda _m, _s, items, features: [len(features)] * len(items))
    monkeypatch.setattr(values + "over_regions", lambda _items, found: np.array([[k, 2.0 * k] for k in found]))
    monkeypatch.setattr(values + "unit_rows", lambda _suite, _features: (None, torch.tensor([3.0, 5.0])))
    some = numbered("x", 3)
    assert activations(work, some, (KEPT, HARM)).tolist() == [[2.0, 4.0]] * 3
    assert contrast(work, some, (KEPT, HARM)).tolist() == [26.0] * 3


def test_a_feature_alone_is_what_refusal_falls_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(done: Done) -> float:
        n = int(done.prompt.id[-1])
        left = {f: 1 - done.scaled.get(f, 1.0) for f in (KEPT, HARM)}
        return 5.0 + n - (2.0 + n) * left[KEPT] - 0.5 * left[HARM]

    work = work_of(rule)
    found = work.found(features_of(KEPT), ids=(4,), pool=Pool(features=(KEPT,), cosines=(1.0,)))
    use(monkeypatch, work, found)
    measure = "demur.studies.checkpoints.measure."
    monkeypatch.setattr(measure + "Compiled", lambda _m, _s, change: change)
    monkeypatch.setattr(
        measure + "first_token", lambda _m, items, _ids, change: SimpleNamespace(log_odds=work.odds(items, change))
    )
    pair = Pair(Side("MODEL", work, found), Side("old", work, None), work.splits.test)
    one, two = alone(pair, work, (KEPT, HARM), numbered("x", 3))
    assert (one.value, one.low, one.high) == pytest.approx(
        (3.0, bootstrap_mean([2.0, 3.0, 4.0]).low, bootstrap_mean([2.0, 3.0, 4.0]).high)
    )
    assert (two.value, two.n) == (0.5, 3)
    assert pair.refusal_ids == (4,)
    assert pair.other(pair.after) is pair.before
    assert pair.other(pair.before) is pair.after


def test_a_mechanism_is_measured_in_its_own_checkpoint_and_in_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond harmless prompts and random sets, features take 4 nats in their own checkpoint and 1 in the other, and
    fire half as much there."""
    own, other = work_of(), work_of()
    asked: list[Any] = []

    def falls(work: Any, prompts: Any, ids: Any, sets: Any, factor: float) -> Effects:
        asked.append((prompts, ids, sets, factor))
        size = 4.0 if work is own else 1.0
        return Effects(np.array([[size + 1.0] * 3, [0.5] * 3, [0.5] * 3]), np.array([[0.5] * 2, [0.0] * 2, [0.0] * 2]))

    def contrast(work: Any, prompts: PromptSet, features: Any) -> np.ndarray:
        assert features == (KEPT, HARM)
        high = 6.0 if work is own else 4.0
        return np.full(len(prompts), high if prompts.prompts[0].label == "harmful" else 2.0)

    monkeypatch.setattr("demur.studies.checkpoints.measure.falls", falls)
    monkeypatch.setattr("demur.studies.checkpoints.measure.contrast", contrast)
    monkeypatch.setattr(Side, "random_sets", lambda _side, features: DRAWN[:2] if features == (KEPT, HARM) else ())
    monkeypatch.setattr(Side, "read_in", lambda _side, there: there.work)
    one = Side("old", own, None)
    pair = Pair(Side("MODEL", other, None), one, own.splits.test)
    found = pair.mechanism(one, (KEPT, HARM), -1.0)
    assert asked == [(own.splits.test, (), ((KEPT, HARM), *DRAWN[:2]), -1.0)] * 2
    assert found.features == (KEPT, HARM)
    # 5 less ½ of harmless prompts, less ½ of random sets; and 2 less 1.
    assert [round(each.value, 6) for each in (found.own, found.other, found.carried, found.fires)] == [
        4.0,
        1.0,
        0.25,
        0.5,
    ]
    assert (found.own.n, found.fires.n) == (6, 6)


def test_directions_are_compared_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first layer both differ alike, in the second at a right angle; the means over words say otherwise."""
    after, before = work_of(), work_of()
    after.model.n_layers = before.model.n_layers = 2

    def readings(asked: Side, prompts: PromptSet) -> list[np.ndarray]:
        harmful = 1.0 if prompts.prompts[0].label == "harmful" else -1.0
        turned = np.array([0.0, 1.0]) if asked.name == "old" else np.array([1.0, 0.0])
        n = len(prompts)
        last = [harmful * np.tile(each, (n, 1)) for each in (np.array([2.0, 0.0]), turned)]
        return [*(np.full((n, 2), 9.0),) * 2, *last]

    monkeypatch.setattr("demur.studies.checkpoints.measure.readings", readings)
    pair = Pair(side(after), side(before, "old"), after.splits.test)
    (same, half), (turned, _) = direction_cosines(pair, numbered("h", 4), numbered("+h", 4, "harmless"))
    assert (same.value, same.low, same.high, same.n, half) == pytest.approx((1.0, 1.0, 1.0, 8, 1.0))
    assert turned.value == pytest.approx(0.0)


def test_harm_is_read_at_the_layer_that_tells_it_best_on_tuning_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of()
    work.model.n_layers = 2

    def readings(_side: Side, prompts: PromptSet) -> list[np.ndarray]:
        signs = np.array([1.0 if p.label == "harmful" else -1.0 for p in prompts])
        purpose = prompts.ids[0].strip("+0123456789")
        # The first layer tells where it is fitted, and the other way on tuning prompts.
        first = signs * (-1.0 if purpose == "tuning" else 1.0)
        return [first[:, None].astype(np.float32), (3 * signs)[:, None].astype(np.float32)]

    monkeypatch.setattr("demur.studies.checkpoints.measure.readings", readings)
    tests = (numbered("bad", 2), numbered("good", 3, "harmless"))
    bad, good = p_harmful(side(work), work, tests)
    assert (len(bad), len(good)) == (2, 3)
    assert (bad > 0.8).all()
    assert (good < 0.2).all()


def test_what_the_saes_miss_is_a_share_of_the_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of()
    work.suite = {n: SimpleNamespace(dense=lambda n=n: n) for n in range(4)}

    def reconstruction(_model: Any, dense: int, items: Any, _regions: Any) -> Any:
        # Residuals may be small numbers; where they do not vary at all there is nothing to divide by.
        error, spread = np.array([[0.01, 0.02]]) * len(items), np.array([[0.05, 0.05]]) * dense
        return SimpleNamespace(error=error * (dense > 0), spread=spread)

    monkeypatch.setattr("demur.method.fidelity.reconstruction", reconstruction)
    monkeypatch.setattr(Side, "read_in", lambda _self, other: other.work)
    found = unexplained(side(work), side(work), numbered("x", 2), (0, 1, 3))
    assert found == pytest.approx({0: 0.0, 1: 0.6, 3: 0.2})


def test_a_checkpoint_without_refusals_is_a_finding_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    context, other = work_of(), work_of()

    def find(work: Any, prompts: Any) -> Any:
        assert prompts == context.splits.choosing
        if work is other:
            raise ModelError("it refused 0 of 4. For example:\nmore")
        return work.found(features_of(KEPT, HARM), ids=(4,), pool=Pool(features=(KEPT,), cosines=(1.0,)))

    monkeypatch.setattr("demur.studies.checkpoints.measure.find", find)
    one, none = Side.of("MODEL", context, context), Side.of("old", other, context)
    assert one.found is not None
    assert (one.name, [t.token_id for t in one.tokens], none.found, none.tokens) == ("MODEL", [4], None, ())
    assert context.warnings == ["old has no F*: it refused 0 of 4."]
    assert other.watched == [f"{sign}tuning{n}" for sign in ("", "+") for n in range(4)]
    assert (none.refusal_features, none.random_sets((KEPT,))) == ((), ())
    assert one.read_in(one) is context

    def roles(*given: tuple[FeatureId, Any]) -> Any:
        share = Estimate(value=0.5, low=0, high=1, n=2)
        rows = (FeatureRole(feature=f, role=r, instruction=0, post_instruction=0, share=share) for f, r in given)
        return lambda _work, _found: Roles(features=tuple(rows))

    for found, expected, warned in (
        (((KEPT, "refusal"), (HARM, "mixed")), (KEPT,), 0),
        (((KEPT, "harm"), (HARM, "mixed")), (HARM,), 1),
        (((KEPT, "harm"), (HARM, "harm")), (KEPT, HARM), 1),
    ):
        monkeypatch.setattr("demur.studies.checkpoints.measure.find_roles", roles(*found))
        context.warnings.clear()
        assert Side("MODEL", context, one.found).refusal_features == expected
        assert len(context.warnings) == warned
