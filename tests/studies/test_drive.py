"""Drives and falls by hand: what a set does beyond random ones, and how far that is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted import CLEAN, POOL, found, prompt_set
from table_model import in_order

from demur.method.interventions import ScaleFeatures, SetFeatures
from demur.studies import drive
from demur.studies.drive import Effects, drives, falls, interval_of, random_sets, set_to_maxima, share_of
from demur.studies.methods import RandomMatched, Selection
from demur.types import FeatureId, PromptSet, Split

A, B = (FeatureId(0, 1), FeatureId(1, 1)), (FeatureId(0, 7),)


def test_a_drive_is_beyond_harmless_prompts_and_random_sets() -> None:
    effects = Effects(
        np.array([[4.0, 6.0], [1.0, 2.0], [0.0, 1.0]]), np.array([[1.0, 1.0, 4.0], [0, 0, 3.0], [0, 3, 0]])
    )
    # 5 - 2, less the mean of 1.5 - 1 and .5 - 1.
    assert drives([effects])[0][0] == pytest.approx(3.0)
    assert len(drives([effects])[0]) == 2001
    assert len(drives([effects], resamples=10)[0]) == 11
    assert (drives([effects])[0] == drives([effects], seed=0)[0]).all()
    assert (drives([effects])[0] != drives([effects], seed=1)[0]).any()


def test_checkpoints_share_the_prompts_and_sets_that_are_drawn() -> None:
    random = np.random.default_rng(0)
    one = Effects(random.normal(size=(4, 9)), random.normal(size=(4, 7)))
    first, second = drives([one, Effects(one.harmful + 2.0, one.harmless * 1.0)])
    assert second == pytest.approx(first)
    # Twice the effect on every prompt is twice the drive.
    double = drives([one, Effects(2 * one.harmful, 2 * one.harmless)])
    assert double[1] == pytest.approx(2 * double[0])


@pytest.mark.parametrize("varied", ["harmful", "harmless", "sets", "one set"])
def test_the_spread_of_a_drive_is_that_of_what_was_sampled(varied: str) -> None:
    """Prompts vary as their mean does; of sets the sample's variance counts, since few resampled vary less."""
    values = np.array([0.0, 1.0, 3.0, 4.0, 7.0])
    harmful, harmless = np.zeros((4, 5)), np.zeros((4, 5))
    wanted = values.var() / 5
    if varied == "harmful":
        harmful[0] = values
    elif varied == "harmless":
        harmless[0] = values
    elif varied == "sets":
        harmful[1:] = np.array([1.0, 2.0, 6.0])[:, None]
        wanted = np.array([1.0, 2.0, 6.0]).var(ddof=1) / 3
    else:
        harmful, harmless, wanted = np.ones((2, 5)), np.zeros((2, 5)), 0.0
    found = drives([Effects(harmful, harmless)], resamples=20000)[0]
    assert found[1:].var() == pytest.approx(wanted, rel=0.05, abs=1e-12)
    assert found[1:].mean() == pytest.approx(found[0], abs=0.05)


def test_an_interval_leaves_the_value_itself_out() -> None:
    found = interval_of(np.array([9.0, *range(101)]), 7)
    assert (found.value, found.low, found.high, found.n) == (9.0, 2.5, 97.5, 7)


def test_a_share_of_nothing_is_unknown() -> None:
    assert share_of(np.array([1.0, 1.0, -1.0]), np.array([4.0, 0.0, 2.0])) == pytest.approx(
        [0.25, np.nan, -0.5], nan_ok=True
    )
    assert np.isnan(share_of(np.array([1.0]), np.array([-2.0]))[0])


def test_a_fall_is_from_the_clean_odds_under_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Split(harmful=prompt_set("harmful", 2), harmless=prompt_set("harmless", 3))

    def odds(_work: Any, asked: PromptSet, ids: Any, change: Any = ()) -> list[float]:
        assert ids == (1, 2)
        start = 10.0 if asked.name == "harmful" else 0.0
        if not change:
            return [start + n for n in range(len(asked))]
        (scaled,) = change
        assert isinstance(scaled, ScaleFeatures)
        return [start - scaled.factor * len(scaled.features)] * len(asked)

    monkeypatch.setattr(drive, "log_odds", odds)
    work: Any = SimpleNamespace(run=SimpleNamespace(each=in_order))
    effects = falls(_workspace(work), prompts, (1, 2), [A, B], 0.5)
    assert effects.harmful.tolist() == [[1.0, 2.0], [0.5, 1.5]]
    assert effects.harmless.tolist() == [[1.0, 2.0, 3.0], [0.5, 1.5, 2.5]]


def _workspace(work: Any) -> Any:
    from demur.studies.context import Workspace

    made: Any = object.__new__(Workspace)
    made.__dict__.update(vars(work))
    return made


def test_random_sets_are_matched_to_the_features_given(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[dict[str, Any]] = []

    def cached(_name: str, depends: dict[str, Any], _kind: Any, compute: Any, _label: str) -> Any:
        keys.append(depends)
        return compute()

    def draw(_self: Any, given: Selection, seeds: Any) -> Any:
        # Matched to the features given, kept out of the pool of what was found.
        assert (given.found.chosen.features, given.found.pool.features, given.k) == (A, POOL, 2)
        return tuple(drive.as_set((FeatureId(3, seed),)) for seed in seeds)

    monkeypatch.setattr(RandomMatched, "draw", draw)
    work = _workspace(SimpleNamespace(config=SimpleNamespace(seed=5, random_sets=3), cached=cached))
    prompts = {name: prompt_set(name, len(word)) for name, word in CLEAN.items()}
    assert random_sets(work, found(CLEAN, prompts), A) == tuple((FeatureId(3, n),) for n in (5, 6, 7))
    # The same features, with one set more: other sets.
    work.config.random_sets = 4
    assert len(random_sets(work, found(CLEAN, prompts), A)) == 4
    assert keys[0] != keys[1]


def test_features_are_set_to_their_own_maxima_on_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Selection, "maxima", lambda _self, features: tuple(float(f.layer + 2) for f in features.features)
    )
    prompts = {name: prompt_set(name, len(word)) for name, word in CLEAN.items()}
    (change,) = set_to_maxima(_workspace(SimpleNamespace()), found(CLEAN, prompts), A)
    assert change == SetFeatures(A, (2.0, 3.0), "prompt")
