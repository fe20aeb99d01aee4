"""The search for settings: fronts and the choice among trials by hand, and trials that are kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from planted_study import effect, lasting
from scripted import CLEAN, OWN, Costs, context_of, found, prompts_of

from demur.errors import ModelError
from demur.method.interventions import ScaleFeatures
from demur.runs import Run
from demur.saes import Suite
from demur.stats import Estimate
from demur.studies import tuning
from demur.studies.benchmark import Config as BenchmarkConfig
from demur.studies.context import JudgedAnswers, Workspace
from demur.studies.methods import Method, Selection, Sets
from demur.studies.pipeline import CleanAnswers
from demur.studies.results import CompareResult
from demur.studies.tuning import Measured, MethodSearch, Setting, choose, pareto_front, stability
from demur.types import Answer, Candidate, ChoosingSplits, Outcome, Prompt, Verdict

N = 10


def trial(complied: float, ce: float, *, low: float | None = None, k: int = 20, strength: float = 0.0) -> Measured:
    """A trial with a share of 10 prompts complied with, and ΔCE with the lower end `low` of its interval."""
    outcomes = [None] * N if math.isnan(complied) else [n < round(complied * N) for n in range(N)]
    said = {True: Outcome.COMPLIANCE, False: Outcome.REFUSAL, None: None}
    answers = tuple(Answer(prompt=Prompt(id=str(n), text="?", label="harmful"), text=".") for n in range(N))
    verdicts = tuple(Verdict(outcome=said[each], judge="test") for each in outcomes)
    cost = Estimate(value=ce, low=ce * 0.9 if low is None else low, high=2 * abs(ce) + 1e-9, n=N)
    return Measured(Setting(0, -1, 10, k, strength), JudgedAnswers(answers, verdicts), cost)


def test_a_front_by_hand() -> None:
    points = [(0.9, 0.5), (0.5, 0.1), (0.8, 0.5), (0.9, 0.6), (0.2, 0.1), (1.0, 2.0), (0.5, 0.1), (math.nan, 0.1)]
    assert pareto_front([trial(*point) for point in points]) == (0, 1, 5)
    assert pareto_front([]) == ()


def test_noise_below_zero_is_no_saving() -> None:
    noisy, free = trial(0.5, -0.02, low=-0.03), trial(0.5, 0.004, low=-0.001)
    assert (noisy.cost, free.cost) == (0.0, 0.0)
    # Neither is better, so the first of equals is the front.
    assert pareto_front([noisy, free]) == (0,)


def test_the_choice_pays_for_side_effects_by_their_unit() -> None:
    # At .2 nats for all compliance: 0, .8 - .1, .9 - .75, 1 - 1.
    front = [trial(0.0, 0.0), trial(0.8, 0.02), trial(0.9, 0.15), trial(1.0, 0.2)]
    assert choose(front, 0.2) == 1
    # Where ΔCE costs less, more of it is bought: .8 - .002, .9 - .015, 1 - .02 (its standard error is .08).
    assert choose(front, 2.0) == 3
    assert choose([trial(math.nan, 0.0)], 0.2) is None


def test_of_trials_within_one_standard_error_the_smaller_and_milder_is_taken() -> None:
    # The best has .8, and 9 of 12 with one success and one failure more: a standard error of .125. So .7 is within, .6
    # is not.
    trials = [trial(0.8, 0.0, k=50), trial(0.7, 0.0, k=5), trial(0.6, 0.0, k=1)]
    assert choose(trials, 0.2) == 1
    assert choose([trial(0.7, 0.0, strength=-3.0), trial(0.7, 0.0, strength=0.5)], 0.2) == 1


def test_all_of_a_few_prompts_is_no_certainty() -> None:
    # All of 10 prompts: 11 of 12, a standard error of .08. At .2 nats for all compliance the second has 1 - .05.
    assert choose([trial(1.0, 0.0, k=40), trial(1.0, 0.01, k=5)], 0.2) == 1
    assert choose([trial(1.0, 0.0, k=40), trial(0.9, 0.0, k=5)], 0.2) == 0


def test_stability_is_a_share_of_resamples() -> None:
    clear = [trial(1.0, 0.0), trial(0.0, 0.0)]
    assert stability(clear, 0, 0.2) == 1.0
    close = [trial(0.5, 0.0, k=30), trial(0.4, 0.0, k=20)]
    assert 0.2 < stability(close, choose(close, 0.2) or 0, 0.2) < 1.0


# -- the draws, of settings whose outcomes are given -------------------------------------------------------------------


class Given(MethodSearch):
    """A search whose trials cost nothing: a place decides, and of the last nothing is scored."""

    work: Any

    def __post_init__(self) -> None:
        self.asked: list[tuple[Setting, str]] = []

    def measure(self, setting: Setting, title: str) -> Measured:
        self.asked.append((setting, title))
        layer = setting.layer
        found = trial(math.nan if layer == 3 else layer / 10, layer / 100, k=setting.k, strength=setting.strength)
        return found._replace(setting=setting)


class Plain(Method):
    """Takes nothing but a strength."""

    name, label, has_set = "plain", "plain", False

    def strengths(self, config: Any, kind: Any) -> tuple[float, ...]:  # noqa: ARG002
        return (0.5, 0.25)


class OfFeatures(Plain):
    has_set = True


class TwoLayers(Suite):
    layers: Any = (0, 1)

    def __init__(self) -> None: ...


class Work(Workspace[Any]):
    suite: Any = TwoLayers()

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []
        self.progress = lambda *step: self.steps.append(step)


def given(method: Method) -> Given:
    config = BenchmarkConfig(k0=7, k=13, seed=5)
    clean, prompts = object.__new__(CleanAnswers), object.__new__(ChoosingSplits)
    return Given(Work(), prompts, config, method, clean, ((0, -1), (1, -2), (2, -3), (3, -4)))


@pytest.mark.eval
def test_as_many_different_settings_are_measured_each_once() -> None:
    search = given(Plain())
    found = search.run(6)
    assert [each.setting for each in found] == [setting for setting, _ in search.asked]
    assert len(set(search.asked)) == len(found) == 6
    assert [title for _, title in search.asked] == [f"search: plain, trial {n}" for n in range(1, 7)]
    assert search.work.steps == [("search: plain", n, 6) for n in range(1, 7)]
    # Layer and position belong together; what the method has no use for is as configured.
    assert {(s.layer, s.position) for s, _ in search.asked} <= {(0, -1), (1, -2), (2, -3), (3, -4)}
    assert {(s.k0, s.k) for s, _ in search.asked} == {(7, 13)}
    assert {s.strength for s, _ in search.asked} == {0.5, 0.25}


@pytest.mark.eval
def test_the_sampler_is_told_what_every_draw_gained_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are eight settings: a search for twelve ends after five times as many draws."""
    import optuna

    made: list[optuna.Study] = []
    create = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **options: made.append(create(**options)) or made[-1])
    found = given(Plain()).run(12)
    (study,) = made
    assert [each.name for each in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert (len(study.trials), len(found) <= 8) == (60, True)
    # Of an outcome that is not known nothing is learned.
    failed = {draw.number for draw in study.trials if draw.state.name == "FAIL"}
    assert failed == {draw.number for draw in study.trials if draw.params["place"] == 3} != set()
    for draw in study.trials:
        if draw.number not in failed:
            assert draw.values == pytest.approx([draw.params["place"] / 10, draw.params["place"] / 100])


@pytest.mark.eval
def test_sizes_are_drawn_and_end_at_the_pools() -> None:
    search = given(OfFeatures())
    found = [each.setting for each in search.run(14)]
    assert {s.k0 for s in found} == {5, 10, 20, 40}
    assert all(1 <= s.k <= min(100, 2 * s.k0) for s in found)
    assert any(s.k == 2 * s.k0 for s in found)
    # The same draws for the same outcomes.
    assert found[:4] == [each.setting for each in given(OfFeatures()).run(4)]


# -- the search of several methods, with its trials given --------------------------------------------------------------


class Search(tuning.MethodSearch):
    """Four trials, of which the third is best for a plain method, and none can be scored for an odd one."""

    seen: ClassVar[list[Any]] = []

    def __post_init__(self) -> None:
        self.seen.append((self.method.name, self.places, self.prompts, self.clean))

    def run(self, trials: int) -> tuple[Measured, ...]:
        assert trials == 4
        odd = self.method.name == "odd"
        return tuple(
            trial(math.nan if odd else share, ce, k=k)._replace(setting=Setting(n, -1, 10, k, 0.5))
            for n, (share, ce, k) in enumerate([(0.1, 0.0, 20), (0.6, 0.0, 20), (0.9, 0.001, 20), (0.2, 0.5, 2)])
        )

    def sets(self, setting: Setting) -> Any:
        work = context_of(object.__new__(Run), self.config)
        return Sets(Selection(work, found(CLEAN, prompts_of(CLEAN)), setting.k), self.config)


class Odd(Plain):
    name, label = "odd", "the odd one"


class Follows(Plain):
    name, label, follows = "follows", "follows", "plain"


def place(layer: int, position: int, *, kept: bool) -> Candidate:
    return Candidate(layer=layer, position=position, form="linear", bypass=0.0, induce=0.0, kl=0.0, kept=kept)


@pytest.mark.parametrize("kept", [True, False])
def test_every_method_without_a_leader_is_searched_from_the_kept_places(
    monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    config = BenchmarkConfig(tune=4, tune_unit=0.2, seed=5)
    before, choosing = found(CLEAN, prompts_of(CLEAN)), object.__new__(ChoosingSplits)
    rows = (place(2, -1, kept=kept), place(1, -3, kept=kept), place(2, -1, kept=kept), place(3, -2, kept=False))
    work = context_of(object.__new__(Run), config)

    def answered(trying: Any, prompts: Any) -> Any:
        assert prompts is choosing
        trying.warn("only tried")
        return before.clean

    def direction(trying: Any, clean: Any) -> Any:
        assert (trying.config, clean) == (config, before.clean)
        return replace(before.direction, candidates=rows)

    monkeypatch.setattr(tuning, "answer_clean", answered)
    monkeypatch.setattr(tuning, "choose_direction", direction)
    monkeypatch.setattr(tuning, "MethodSearch", Search)
    Search.seen.clear()
    chosen = tuning.search(work, choosing, config, (Plain(), Follows(), OfFeatures()))
    places = ((1, -3), (2, -1)) if kept else ((1, -3), (2, -1), (3, -2))
    assert Search.seen == [("plain", places, choosing, before.clean)] * 2
    assert work.warnings == []
    measured = Search(work, choosing, config, Plain(), before.clean, places).run(4)
    share = stability(measured, 2, 0.2, seed=5)
    mine = chosen.trials[:4]
    assert [(t.number, t.layer, t.position, t.k0, t.k, t.strength) for t in mine] == [
        (0, 0, -1, 10, 20, 0.5), (1, 1, -1, 10, 20, 0.5), (2, 2, -1, 10, 20, 0.5), (3, 3, -1, 10, 2, 0.5),
    ]  # fmt: skip
    assert [(t.front, t.chosen, t.stability) for t in mine] == [
        (False, False, None), (True, False, None), (True, True, share), (False, False, None),
    ]  # fmt: skip
    assert [t.compliance.value for t in mine] == pytest.approx([0.1, 0.6, 0.9, 0.2])
    assert [t.ce_answers.value for t in mine] == pytest.approx([0.0, 0.0, 0.001, 0.5])
    assert len(chosen.trials) == 8
    assert (list(chosen.sets), chosen.strengths) == (["plain"], {"plain": 0.5})
    assert chosen.sets["plain"].given.k == 20
    with pytest.raises(ModelError, match="no trial of the search for the odd one could be scored"):
        tuning.search(work, choosing, config, (Odd(),))


def test_a_trial_measures_harmful_tuning_prompts_under_its_own_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features come from its own direction and sizes, its costs from harmless tuning prompts."""
    config = BenchmarkConfig(k=13, k0=7)
    work, before = context_of(object.__new__(Run), config), found(CLEAN, prompts_of(CLEAN))
    work.script = {("tuning-harmful", "other", "suppress", 0.25): "YYNN"}

    def find_from(trying: Any, clean: Any) -> Any:
        asked = trying.config
        assert (asked.direction_layer, asked.direction_position, asked.k0, asked.k) == (3, -2, 20, 40)
        assert clean is before.clean
        return before

    monkeypatch.setattr(tuning, "find_from", find_from)
    monkeypatch.setattr(tuning, "SideEffectMeter", Costs)
    work.costs = {("other", 0.25): 0.125}
    search = MethodSearch(work, work.splits.choosing, config, One(), before.clean, ((3, -2),))
    setting = Setting(3, -2, 20, 40, 0.25)
    measured = search.measure(setting, "told")
    assert (measured.setting, measured.gain, measured.ce.value) == (setting, 0.5, 0.125)
    assert [step[0] for step in work.steps] == ["told"]
    # F* has the size of the pool where that is smaller.
    assert search.sets(setting).given.k == 2
    assert search.sets(setting).config is config


class One(Plain):
    """Scales the feature of `other`."""

    def suppress(self, sets: Any, strength: float, prompts: Any) -> Any:
        assert (sets.given.k, prompts.name) == (2, "tuning-harmful")
        return ((ScaleFeatures((OWN,), strength),),)


def settings(files: Any, tune: int) -> dict[str, Any]:
    once = {"suppress": "0.9,0", "methods": ("cossim", "direction"), "knowledge": False, "sizes": "2"}
    return files.small(**once, resamples=100, tune=tune)


@pytest.mark.eval
def test_every_method_has_as_many_trials_and_its_own_settings(files: Any, tmp_path: Path) -> None:
    result: CompareResult = files.study(tmp_path / "run", "benchmark", **settings(files, 5))
    by_method = {name: [t for t in result.trials if t.method == name] for name in result.labels}
    assert {name: len(trials) for name, trials in by_method.items()} == {
        "cossim+ap": 5,
        "cossim": 5,
        # A direction has as many settings as there are places, here fewer than trials perhaps.
        "direction": len(by_method["direction"]),
    }
    for name, trials in by_method.items():
        if not trials:
            continue
        places = [(t.layer, t.position, t.k0, t.k, t.strength) for t in trials]
        assert len(set(places)) == len(places), "a repeated setting counted as a trial"
        (best,) = [t for t in trials if t.chosen]
        assert best.stability is not None
        assert effect(result, "harmful", "suppress", name).strength == best.strength
        if name in result.sets:
            assert len(result.sets[name]) == best.k
    # What is shown of F* is what the search chose.
    (best,) = [t for t in result.trials if t.chosen and t.method == "cossim+ap"]
    assert (result.k, len(result.features)) == (best.k, best.k)
    assert (result.direction.chosen.layer, result.direction.chosen.position) == (best.layer, best.position)
    assert result.sets["cossim+ap"].features == tuple(row.feature for row in result.features)


@pytest.mark.eval
def test_trials_are_kept(files: Any, tmp_path: Path) -> None:
    first = files.study(tmp_path / "run", "benchmark", **settings(files, 4))
    again = files.study(tmp_path / "run", "benchmark", **settings(files, 4))
    assert lasting(again) == lasting(first)
    assert again.counters["answers"][0] == 0


def test_without_optuna_the_way_to_get_it_is_named(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from demur.errors import DemurError

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DemurError, match=r"demur\[eval\]"):
        files.study(tmp_path / "run", "benchmark", **settings(files, 2))
