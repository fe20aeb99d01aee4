"""The decision rule of `demur checkpoints` on intervals made by hand, and the drive on tables made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from demur.stats import Estimate
from demur.studies.checkpoints.rule import Evidence, Mechanism, decide
from demur.studies.drive import Effects, drives
from demur.types import FeatureId

DRIVES, SILENT, OPEN = (0.8, 1.0, 1.2), (-0.02, 0.01, 0.05), (0.05, 0.2, 0.4)


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=100)


def mechanism(carried: tuple[float, float, float], fires: Any = (0.9, 1, 1.1), own: Any = (4, 5, 6)) -> Mechanism:
    return Mechanism(
        features=(FeatureId(0, 1),),
        own=estimate(*own),
        other=estimate(0, 0, 0),
        carried=estimate(*carried),
        fires=estimate(*fires),
    )


def verdict(after: Mechanism | None, before: Mechanism | None, change: Any = (-0.03, 0, 0.03)) -> tuple[str, bool]:
    found = decide(Evidence(after, before, [("harmful", estimate(*change))]), 0.1)
    return found.kind, found.new_too


@pytest.mark.parametrize(
    ("after", "before", "change", "kind"),
    [
        # Both drive in both: the strength decides, and both sets must show it.
        ((0.6, 0.67, 0.7), (1.3, 1.5, 1.7), (0.1, 0.2, 0.3), "amplified"),
        ((1.3, 1.5, 1.7), (0.6, 0.67, 0.7), (-0.3, -0.2, -0.1), "weakened"),
        ((0.95, 1.0, 1.05), (0.95, 1.0, 1.05), (-0.03, 0, 0.03), "no change"),
        # The interval of the drive reaches beyond the margin, or that of behaviour does.
        ((0.8, 1.0, 1.2), (0.95, 1.0, 1.05), (-0.03, 0, 0.03), "not clear"),
        ((0.95, 1.0, 1.05), (0.95, 1.05, 1.2), (-0.03, 0, 0.03), "not clear"),
        ((0.95, 1.0, 1.05), (0.95, 1.0, 1.05), (-0.03, 0.05, 0.13), "not clear"),
        # The set found after says more, the one found before says less: each flatters its own checkpoint.
        ((0.6, 0.67, 0.7), (0.6, 0.67, 0.7), (0, 0, 0), "not clear"),
        (OPEN, DRIVES, (0, 0, 0), "not clear"),
    ],
)
def test_the_same_mechanism_by_strength(after: Any, before: Any, change: Any, kind: str) -> None:
    assert verdict(mechanism(after), mechanism(before), change)[0] == kind


def test_hidden_needs_features_that_fire_and_do_not_drive() -> None:
    fires, silent, between = (0.6, 0.8, 1.0), (0.0, 0.1, 0.3), (0.3, 0.5, 0.7)
    assert verdict(None, mechanism(SILENT, fires)) == ("hidden", False)
    assert verdict(mechanism(SILENT), mechanism(SILENT, fires)) == ("hidden", True)
    assert verdict(mechanism(DRIVES), mechanism(SILENT, fires)) == ("hidden", False)
    assert verdict(None, mechanism(SILENT, silent)) == ("removed", False)
    assert verdict(None, mechanism(SILENT, between)) == ("not clear", False)
    assert verdict(mechanism(SILENT), mechanism(SILENT, silent)) == ("new mechanism", False)
    assert verdict(None, mechanism(OPEN, fires))[0] == "not clear"


def test_new_needs_features_that_did_not_drive_before() -> None:
    assert verdict(mechanism(SILENT), None)[0] == "new mechanism"
    assert verdict(mechanism(OPEN), None)[0] == "not clear"
    # No F* before, and yet its features drove what refusal there was.
    assert verdict(mechanism((0.2, 0.3, 0.4)), None)[0] == "amplified"


def test_features_no_better_than_random_prove_nothing() -> None:
    unproven = (-0.1, 2, 4)
    assert verdict(mechanism(SILENT, own=unproven), None)[0] == "not clear"
    assert verdict(None, mechanism(SILENT, own=unproven))[0] == "not clear"


def test_the_margin_moves_what_counts_as_nothing() -> None:
    evidence = Evidence(mechanism((0.11, 0.15, 0.19)), None, [])
    assert decide(evidence, 0.1).kind == "amplified"
    assert decide(evidence, 0.2).kind == "new mechanism"


def test_conditions_say_what_is_open() -> None:
    found = decide(Evidence(mechanism(OPEN), None, [("harmful", estimate(0.05, 0.2, 0.3))]), 0.1)
    assert {row.holds for row in found.conditions if row.claim.startswith("they drive it before")} == {None}
    assert {row.holds for row in found.conditions if row.claim.startswith("harmful")} == {False}


def effects(harmful: Any, harmless: Any) -> Effects:
    return Effects(np.array(harmful, dtype=float), np.array(harmless, dtype=float))


def test_a_drive_is_beyond_harmless_prompts_and_beyond_random_sets() -> None:
    # The set: 5 on harmful, 1 on harmless prompts. Random sets: 2 − 1 and 0 − 0, mean ½.
    one = effects([[4, 6, 5], [2, 2, 2], [0, 0, 0]], [[1, 1], [1, 1], [0, 0]])
    found = drives([one])[0]
    assert found[0] == pytest.approx(5 - 1 - 0.5)
    # Two sets resampled and stretched by √2: the mean of their difference has spread √2·½·√½ = ½.
    sets = effects([[0, 0], [1, 1], [0, 0]], [[0, 0], [0, 0], [0, 0]])
    assert drives([sets])[0][1:].std() == pytest.approx(0.5, rel=0.05)


def test_prompts_and_sets_are_resampled_together_in_both_checkpoints() -> None:
    random = np.random.default_rng(1)
    table = effects(random.normal(5, 2, (4, 20)), random.normal(0, 1, (4, 10)))
    first, second = drives([table, effects(2 * table.harmful, 2 * table.harmless)])
    assert second / first == pytest.approx(np.full(len(first), 2.0))
    assert not math.isclose(first[1:].std(), 0)
