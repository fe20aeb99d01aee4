"""The decision rule of `demur checkpoints` on intervals made by hand, and the drive on tables made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from demur.stats import Estimate
from demur.studies.checkpoints.rule import Evidence, Mechanism, decide
from demur.studies.drive import Effects, drives, interval_of, share_of
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


@pytest.mark.parametrize(
    ("own", "carried", "fires", "state"),
    [
        ((0, 1, 2), DRIVES, (0.9, 1, 1.1), "unproven"),
        ((0.1, 1, 2), (0.26, 1, 2), (0, 0, 0), "drives"),
        ((0.1, 1, 2), (0.25, 1, 2), (0.9, 1, 1.1), "open"),
        ((0.1, 1, 2), (0, 0.1, 0.25), (0.9, 1, 1.1), "open"),
        ((0.1, 1, 2), (0, 0.1, 0.24), (0.51, 1, 2), "hidden"),
        ((0.1, 1, 2), (0, 0.1, 0.24), (0.5, 1, 2), "undriven"),
        ((0.1, 1, 2), (0, 0.1, 0.24), (0, 0.1, 0.5), "undriven"),
        ((0.1, 1, 2), (0, 0.1, 0.24), (0, 0.1, 0.49), "silent"),
    ],
)
def test_a_state_needs_whole_intervals_beyond_its_limits(own: Any, carried: Any, fires: Any, state: str) -> None:
    assert mechanism(carried, fires, own).state(0.25) == state


@pytest.mark.parametrize(
    ("gain", "change", "kind"),
    [
        ((0.76, 1, 1.24), (-0.24, 0, 0.24), "no change"),
        ((0.75, 1, 1.24), (0, 0, 0), "not clear"),
        ((0.76, 1, 1.25), (0, 0, 0), "not clear"),
        ((0.76, 1, 1.24), (-0.25, 0, 0.2), "not clear"),
        ((0.76, 1, 1.24), (-0.2, 0, 0.25), "not clear"),
        # Refused less often, and yet driven surely more strongly.
        ((1.01, 1.1, 1.2), (-0.9, -0.8, -0.7), "amplified"),
        ((1.0, 1.2, 1.6), (0, 0, 0), "not clear"),
        ((0.5, 0.6, 0.99), (-0.9, -0.8, -0.7), "weakened"),
        ((0.5, 0.6, 1.0), (0, 0, 0), "not clear"),
    ],
)
def test_a_strength_needs_whole_intervals_beyond_its_limits(gain: Any, change: Any, kind: str) -> None:
    refusals = [("x", estimate(0, 0, 0)), ("y", estimate(*change))]
    assert decide(Evidence(None, mechanism(gain), refusals), 0.25).kind == kind


def test_conditions_say_what_is_asked_what_was_found_and_what_is_open() -> None:
    refusals = [
        ("harmful", estimate(-0.05, 0, 0.05)), ("harmless", estimate(-0.3, -0.2, -0.1)),
        ("over", estimate(-0.05, 0.05, 0.1)), ("more", estimate(0.01, 0.2, 0.3)),
    ]  # fmt: skip

    def rows(after: Mechanism | None, before: Mechanism | None) -> list[tuple[Any, ...]]:
        found = decide(Evidence(after, before, refusals), 0.1).conditions
        return [
            (row.claim, row.needs, (row.estimate.low, row.estimate.value, row.estimate.high), row.holds)
            for row in found
        ]

    weak = mechanism(SILENT, (0.2, 0.3, 0.5), own=(-1, 1, 3))
    *found, one, two, three, four = rows(mechanism(DRIVES), weak)
    assert [row[1:] for row in found] == [
        ("above 0", (4, 5, 6), True), ("above 0.1; not: below", DRIVES, True),
        ("above 0.5; not: below", (0.9, 1, 1.1), True), ("above 0", (-1, 1, 3), None),
        ("above 0.1; not: below", SILENT, False), ("above 0.5; not: below", (0.2, 0.3, 0.5), None),
    ]  # fmt: skip
    assert ["after" in row[0] for row in found] == [True, False, False, False, True, True]
    assert [(row[0].split()[0], row[1], row[3]) for row in (one, two, three, four)] == [
        ("harmful", "no change: within ±0.1", True), ("harmless", "no change: within ±0.1", False),
        ("over", "no change: within ±0.1", None), ("more", "no change: within ±0.1", False),
    ]  # fmt: skip
    assert two[2] == (-0.3, -0.2, -0.1)
    # The drive after over that before, by the features of each: 1 / (0.5 to 2), and as it is.
    asked = "amplified: above 1; weakened: below; no change: within 0.9 and 1.1"
    gains = rows(mechanism((0.5, 0.8, 2)), mechanism((1.5, 2, 3)))[6:8]
    assert [row[1:] for row in gains] == [(asked, (0.5, 1.25, 2), None), (asked, (1.5, 2, 3), True)]
    (gain,) = rows(None, mechanism((0.2, 0.3, 0.4)))[3:4]
    assert gain[1:] == (asked, (0.2, 0.3, 0.4), False)


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


def test_a_share_of_nothing_is_unknown() -> None:
    found = share_of(np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0, -1.0]))
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan])
    # The value stands first, and is no sample.
    interval = interval_of(np.array([100.0, *range(41)]), 7)
    assert (interval.value, interval.low, interval.high, interval.n) == (100, 1, 39, 7)
