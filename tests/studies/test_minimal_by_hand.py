"""`demur minimal` where what each feature does is a table: every step, share and control is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import ABLATED, Done, TableModel, features_of, numbered, splits_of, use

from demur.errors import ModelError
from demur.method.attribution import Pool
from demur.stats import Estimate
from demur.studies.methods import RandomMatched
from demur.studies.minimal import Config, run
from demur.studies.minimal.pairs import Pairs
from demur.studies.minimal.sections import Result
from demur.studies.roles import FeatureRole, Roles
from demur.types import FeatureId

A, D, B, C, E = (FeatureId(layer, n) for n, layer in enumerate((0, 1, 1, 2, 3)))
LATE, SLEEPER, HALF, SECOND = FeatureId(2, 50), FeatureId(3, 51), FeatureId(3, 52), FeatureId(3, 53)
EARLY, NOTHING = FeatureId(1, 9), FeatureId(3, 60)
CHOSEN = features_of(A, D, B, C, E)
FACTOR = -1.0
# Nats by which a feature scaled by −1 lowers refusal; on tuning prompts C does B's work.
RANDOM = (FeatureId(1, 100), FeatureId(1, 101))
FALL = {A: 4.0, B: 3.0, C: 0.5, D: 0.0, E: 0.0, RANDOM[0]: 0.5, RANDOM[1]: 1.0}
TUNING = FALL | {B: 0.0, C: 3.5}
POOL = Pool(features=(*CHOSEN.features, LATE), cosines=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
BASE = {"direction": 20.0, "selection": 20.0, "tuning": 4.0, "test": 7.0}


def rule(done: Done) -> float:
    name = done.prompt.id.rstrip("0123456789")
    n, place = int(done.prompt.id.removeprefix(name)), name.strip("+")
    if name.startswith("+"):
        return -9.0
    if place == "test" and n == 4:
        return -1.0  # The clean model answers it.
    fall = TUNING if place == "tuning" else FALL
    value = BASE[place] + n
    if done.ablated:
        value = -6.0
    value -= sum((1 - c) / 2 * fall.get(f, 0.0) for f, c in done.scaled.items())
    # The sleeper takes over from D; A and B stand in for each other by one nat.
    value += 1.0 * (D in done.scaled and SLEEPER not in done.scaled) * (place == "test")
    value += 1.0 * (A in done.scaled and B in done.scaled) * (place == "test")
    return value + sum({A: 6.0, C: 3.0, B: 0.5}.get(f, 0.0) * v[0] for f, v in done.held.items())


class Given:
    """What the study finds in the model besides log-odds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        asked: dict[str, Any] = {"target": 0.9, "random_sets": 2, "seed": 5, "n_pairs": 2}
        config = Config(factor=FACTOR, **(asked | options))
        self.work = TableModel(rule, config, splits_of(2, 3, 4, 5))
        found = self.work.found(CHOSEN, pool=POOL)
        use(monkeypatch, self.work, found)
        self.found, self.drawn = found, list[Any]()

        def draw(_self: Any, given: Any, seeds: Any) -> Any:
            self.drawn.append((given.found.chosen, given.k, tuple(seeds)))
            return tuple(features_of(feature, method="random") for feature, _ in zip(RANDOM, seeds, strict=True))

        monkeypatch.setattr(RandomMatched, "draw", draw)
        monkeypatch.setattr("demur.method.activations.feature_activations", self.activations)
        monkeypatch.setattr(
            "demur.method.activations.over_regions", lambda _items, values: np.stack([v.numpy()[0] for v in values])
        )
        monkeypatch.setattr("demur.method.selection.attribute_dictionary", self.dictionary)
        monkeypatch.setattr("demur.studies.roles.find_roles", roles)

    def activations(self, _model: Any, _suite: Any, items: Any, features: Any) -> list[Any]:
        """In the clean run 1 for all but the dormant ones, which wake without D on some prompts."""
        found: list[Any] = []
        for item in items:
            done = Done(item.prompt, self.work.open)
            n = int(item.prompt_id.lstrip("+abcdefghijklmnopqrstuvwxyz"))
            woken = D in done.scaled and done.scaled[D] == FACTOR
            awake = {
                SLEEPER: woken,
                SECOND: woken,
                FeatureId(3, 60): woken,
                FeatureId(1, 9): woken,
                HALF: D in done.scaled and n == 0,
            }
            found.append(torch.tensor([[float(awake.get(f, 1.0)) for f in features]]))
        return found

    def dictionary(self, _model: Any, _suite: Any, items: Any, **asked: Any) -> Any:
        assert asked["patch"] == [ABLATED]
        assert (asked["to_zero"], asked["metric"].refusal_ids) == (True, (1,))
        assert [item.prompt_id for item in items] == ["selection0", "selection1", "selection2"]
        if E in self.work.open[0].features:
            raise ModelError("nothing moves")
        # Always awake; in an earlier layer; asleep; of no effect.
        rows = (
            (LATE, 4.0),
            (FeatureId(1, 9), 3.0),
            (HALF, 2.5),
            (SLEEPER, 2.0),
            (SECOND, 1.0),
            (FeatureId(3, 60), 0.0),
        )
        return SimpleNamespace(overall=SimpleNamespace(features=[f for f, _ in rows], scores=[s for _, s in rows]))

    def run(self) -> Result:
        return run(self.work)


def roles(_work: Any, _found: Any, features: Any) -> Roles:
    share = Estimate(value=0.1, low=0.1, high=0.1, n=3)
    rows = (FeatureRole(feature=f, role="harm", instruction=1, post_instruction=0, share=share) for f in features)
    return Roles(features=tuple(rows))


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(monkeypatch)


def test_the_way_down_takes_the_least_first_and_of_equals_the_last_of_f_star(given: Given) -> None:
    result = given.run()
    rows = [(row.size, row.removed, row.selection, row.tuning.value, row.chosen) for row in result.sizes]
    # Tuning prompts begin at 4 to 7 nats: all of F* takes 7½, A and B take 4, A alone too.
    assert rows == [
        (5, None, 1.0, 1.0, False), (4, E, 1.0, 1.0, False), (3, D, 1.0, 1.0, True),
        (2, C, pytest.approx(7 / 7.5), 0.25, False), (1, B, pytest.approx(4 / 7.5), 0.25, False),
    ]  # fmt: skip
    # On the four refused test prompts suppressing D costs one nat, and A with B another.
    assert [row.test.value for row in result.sizes] == pytest.approx([1.0, 1.0, 6.5 / 5.5, 6 / 5.5, 4 / 5.5])
    assert {row.test.n for row in result.sizes} == {4}
    assert (result.factor, result.target, result.chosen) == (FACTOR, 0.9, CHOSEN.features)
    assert (result.effect.value, result.effect.n) == (5.5, 4)
    # Ablation takes the four to −6, from 7 to 10.
    assert result.of_direction.value == pytest.approx(5.5 / 14.5)
    assert given.work.watched == [f"{sign}tuning{n}" for sign in ("", "+") for n in range(4)]
    assert [told for told in given.work.told if told[0] == "greedy removal"] == [
        ("greedy removal", n, 5) for n in range(1, 6)
    ]


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        # Of 7.5 nats A, C keep 4.5; A and B keep 7, but answer one tuning prompt in four.
        (0.6, (A, C)),
        (0.61, (A, B, C)),
        # One prompt in four is enough, and so are 4 of 7.5 nats.
        (0.25, (A,)),
        (1.0, (A, B, C)),
    ],
)
def test_what_is_left_keeps_both_targets_without_a_feature_that_can_go(
    monkeypatch: pytest.MonkeyPatch, target: float, kept: Any
) -> None:
    result = Given(monkeypatch, target=target).run()
    assert tuple(row.feature for row in result.features) == tuple(f for f in CHOSEN.features if f in kept)


def test_the_same_folder_again_takes_the_way_as_it_is(given: Given) -> None:
    first = given.run()
    given.work.told.clear()
    again = given.run()
    assert again.model_dump_json() == first.model_dump_json()
    assert not [told for told in given.work.told if told[0] == "greedy removal"]


def test_where_no_tuning_prompt_complies_log_odds_alone_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASE, "tuning", 50.0)
    # A alone keeps 4 of 7.5 nats.
    assert [row.feature for row in Given(monkeypatch, target=0.5).run().features] == [A]
    made = Given(monkeypatch, target=0.6)
    assert [row.feature for row in made.run().features] == [A, B]
    assert any("no tuning prompt is complied with" in warning for warning in made.work.warnings)


def test_an_effect_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for feature, fall in ((A, 0.0), (B, -1.0), (C, 0.0)):
        monkeypatch.setitem(FALL, feature, fall)
    with pytest.raises(ModelError, match=r"c = -1 does not lower the refusal log-odds \(\+1\.00 nats\)"):
        Given(monkeypatch).run()
    monkeypatch.setitem(FALL, B, 0.0)
    with pytest.raises(ModelError, match="does not lower"):
        Given(monkeypatch).run()


def test_too_few_refused_test_prompts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASE, "test", -3.0)
    with pytest.raises(ModelError, match="refuses 0 of the 5 harmful test prompts"):
        Given(monkeypatch).run()
    # One of the five.
    made = Given(monkeypatch)
    made.work.rule = lambda done: 1.0 if done.prompt.id == "test3" else rule(done)
    with pytest.raises(ModelError, match="refuses 1 of the 5"):
        made.run()


def test_each_condition_of_the_certificate_is_measured_against_its_own_ends(given: Given) -> None:
    result = given.run()
    rows = {(row.test, row.name): row for row in result.certificate}
    assert [key[1] for key in rows if key[0] == "necessity"] == [
        "minimal set", "F*", "the rest of F*", "random parts of F*", "random features",
    ]  # fmt: skip
    assert [key[1] for key in rows if key[0] == "sufficiency"] == [
        "minimal set", "F*", "the rest of F*", "random parts of F*", "random features", "nothing",
    ]  # fmt: skip
    sizes = {name: (row.size, row.sets) for (test, name), row in rows.items() if test == "sufficiency"}
    assert sizes == {
        "minimal set": (3, 1), "F*": (5, 1), "the rest of F*": (2, 1), "random parts of F*": (3, 2),
        "random features": (1, 2), "nothing": (0, 1),
    }  # fmt: skip
    # Suppressed, of 5.5 nats: A, B and C take 6.5, D and E give one, the two random ones ½ and 1.
    share = {name: row.share.value for (test, name), row in rows.items() if test == "necessity"}
    assert share["minimal set"] == pytest.approx(6.5 / 5.5)
    assert share["F*"] == pytest.approx(1.0)
    assert share["the rest of F*"] == pytest.approx(-1 / 5.5)
    assert share["random features"] == pytest.approx(0.75 / 5.5)
    assert rows["necessity", "random features"].draws == pytest.approx((0.5 / 5.5, 1 / 5.5))
    assert rows["necessity", "minimal set"].draws == ()
    # Refused at 7 to 10 nats; less 6.5 none is complied with.
    rates = {key: (row.rate.value, row.rate.n) for key, row in rows.items()}
    assert rates["necessity", "minimal set"] == (0.0, 4)
    # Restored from −6, of 14.5 nats on average: all do 9.5, of which the rest does none.
    share = {name: row.share.value for (test, name), row in rows.items() if test == "sufficiency"}
    assert share["minimal set"] == share["F*"] == pytest.approx(9.5 / 14.5)
    assert share["the rest of F*"] == share["nothing"] == share["random features"] == 0.0
    assert [rates["sufficiency", name][0] for name in ("minimal set", "F*", "the rest of F*", "nothing")] == [
        1.0, 1.0, 0.0, 0.0,
    ]  # fmt: skip
    difference = {name: row.difference for (test, name), row in rows.items() if test == "sufficiency"}
    assert difference["minimal set"] is None
    assert rows["sufficiency", "minimal set"].p is None
    assert [difference[name].value for name in ("F*", "nothing", "random features")] == [0.0, 1.0, 1.0]  # pyright: ignore
    assert all(0 < (row.p or 0) <= 1 for key, row in rows.items() if key[1] != "minimal set")
    assert "necessity: random features (2)" in given.work.asked
    assert "necessity: minimal set" in given.work.asked


def test_controls_are_as_large_as_the_minimal_set_and_drawn_by_the_seed(given: Given) -> None:
    given.run()
    ((like, k, seeds),) = given.drawn
    assert (like.features, like.scores, k, seeds) == ((A, B, C), (5.0, 3.0, 2.0), 3, (5, 6))
    assert (like.scope, like.method) == ("global", "minimal")
    order = np.random.default_rng(5)
    parts = [sorted(order.permutation(5)[:3].tolist()) for _ in range(2)]
    taken = [sum(FALL[CHOSEN.features[n]] for n in part) for part in parts]
    taken = [
        each - (1 in part) - (0 in part and 2 in part) for each, part in zip(taken, parts, strict=True)
    ]  # D, and A with B.
    (row,) = (r for r in given.run().certificate if (r.test, r.name) == ("necessity", "random parts of F*"))
    assert row.draws == pytest.approx([each / 5.5 for each in taken])


def test_where_nothing_is_left_of_f_star_there_are_no_parts_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Given(monkeypatch, target=1.0)
    monkeypatch.setitem(FALL, D, 1.0)
    monkeypatch.setitem(FALL, E, 1.0)
    result = made.run()
    assert result.chosen == tuple(row.feature for row in result.features)
    assert {row.name for row in result.certificate} == {"minimal set", "F*", "random features", "nothing"}


def test_a_feature_of_the_set_says_what_is_left_without_it(given: Given) -> None:
    rows = {row.feature: row for row in given.run().features}
    # Of 5.5 nats: B and C take 3.5, A and C 4.5, A and B 6.
    assert {f: row.without.value for f, row in rows.items()} == pytest.approx({A: 3.5 / 5.5, B: 4.5 / 5.5, C: 6 / 5.5})
    assert [(row.role, row.cosine, row.complied.value) for row in rows.values()] == [
        ("harm", 0.0, 0.0), ("harm", 0.2, 0.0), ("harm", 0.3, 0.0),
    ]  # fmt: skip
    assert f"test: without {A}" in given.work.asked


def test_dormant_features_lie_later_are_silent_and_wake_on_half_of_the_prompts(given: Given) -> None:
    result = given.run()
    # The other wakes on one selection prompt of three; without E nothing moves the answer.
    row, second = result.dormant
    assert (row.feature, row.layer, row.wakers) == (SLEEPER, 1, (D, B))
    assert (second.feature, second.effect.value, second.alone.value) == (SECOND, 0.0, 0.0)
    assert (row.clean.value, row.awake.value, row.clean.n, row.awake.n) == (0.0, 1.0, 4, 4)
    # It gives one nat while D is suppressed.
    assert (row.effect.value, row.alone.value) == (1.0, 0.0)
    assert [told for told in given.work.told if told[0] == "dormant features"] == [
        ("dormant features", n, 4) for n in range(1, 5)
    ]


def test_as_many_dormant_features_are_tested_as_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Given(monkeypatch, dormant=0).run().dormant
    assert [row.feature for row in Given(monkeypatch, dormant=1).run().dormant] == [SLEEPER]


# -- pairs ---------------------------------------------------------------------------------------------------------


def pairs(monkeypatch: pytest.MonkeyPatch, rule: Any = rule, **options: Any) -> tuple[Pairs, TableModel]:
    made = Given(monkeypatch, **options)
    made.work.rule = rule
    found = made.found

    def scaled(features: Any) -> Any:
        from demur.method.interventions import ScaleFeatures

        return (ScaleFeatures(tuple(features), FACTOR),) if features else ()

    return Pairs(made.work, found, lambda prompts, change: made.work.odds(prompts, change), scaled), made.work


def test_every_pair_is_tested_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    tested, work = pairs(monkeypatch, max_pairs=10)
    rows, machine = tested.rows((A, B), (), numbered("test", 3))
    assert (len(rows), machine) == (10, None)
    first, *rest = rows
    # Together A and B take one nat less than each alone; D and anything else no more and no less.
    assert ((first.first, first.second), first.interaction.value, first.interaction.n) == ((A, B), -1.0, 3)
    assert all(row.interaction.value == pytest.approx(0) for row in rest)
    assert {row.estimate for row in rows} == {None}
    assert all(row.p_holm == 1.0 for row in rest)
    assert [told for told in work.told if told[0] == "pairs of features"] == [
        ("pairs of features", n, 10) for n in range(1, 11)
    ]
    assert tested.rows((A, B), (), numbered("test", 0)) == ((), None)


def test_of_many_pairs_those_of_the_minimal_set_are_tested_without_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tested, _ = pairs(monkeypatch, max_pairs=9, fm_draws=0)
    rows, machine = tested.rows((A, B, C), (), numbered("test", 3))
    assert ([{r.first, r.second} for r in rows], machine) == ([{A, B}, {A, C}, {B, C}], None)
    fewer, _ = pairs(monkeypatch, max_pairs=2, fm_draws=0)
    assert fewer.rows((A, B, C), (), numbered("test", 3)) == ((), None)
    alone, _ = pairs(monkeypatch, max_pairs=0, fm_draws=0)
    assert alone.rows((A,), (), numbered("test", 3)) == ((), None)


def test_a_machine_names_the_pair_that_covers_on_the_prompts_that_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """C and the sleeper, and A and B, take each other's place by two nats and by one."""

    def covered(done: Done) -> float:
        value = 20.0 - sum({A: 4.0, B: 3.0, C: 1.0, D: 0.5, E: 0.25}.get(f, 0.0) for f in done.scaled)
        both = done.prompt.id.startswith("selection")
        return (
            value + 2.0 * (C in done.scaled and SLEEPER in done.scaled) + both * (A in done.scaled and B in done.scaled)
        )

    tested, work = pairs(monkeypatch, covered, max_pairs=3, fm_draws=120, fm_rank=2)
    rows, machine = tested.rows((B, A), (SLEEPER, E), numbered("test", 4))
    assert machine is not None
    # Six features, each once alone; pairs in F*'s order although the set is in another.
    assert (machine.features, machine.rank, machine.pairs) == (6, 2, 1)
    assert machine.draws == len([told for told in work.told if told[0] == "random parts of F*"])
    assert work.told[-1][1] == work.told[-1][2]
    known = {(row.first, row.second): row for row in rows}
    assert len(known) == len(rows) == 15
    assert known[A, B].interaction.value == 0.0
    assert known[C, SLEEPER].interaction.value == -2.0
    assert rows[0] == known[C, SLEEPER]
    assert known[C, SLEEPER].estimate is not None
    assert known[C, SLEEPER].estimate == pytest.approx(-2.0, abs=0.6)
    assert known[A, B].estimate == pytest.approx(-1.0, abs=0.6)
    # One pair has no rank correlation; of the fourteen others the one that exists has its sign.
    assert np.isnan(machine.spearman.value)
    assert (machine.same_sign.n, round(machine.same_sign.value * 14)) == (14, 1)
    assert 0.5 < machine.r2.value <= 1
