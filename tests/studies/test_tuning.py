"""The search for settings: fronts and the choice among trials by hand, and trials that are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from planted_study import effect, lasting

from demur.stats import Estimate
from demur.studies.context import JudgedAnswers
from demur.studies.results import CompareResult
from demur.studies.tuning import Measured, Setting, choose, pareto_front, stability
from demur.types import Answer, Outcome, Prompt, Verdict

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
