"""F* against another method, by hand: at chosen strengths, and on curves read at one ΔCE."""

from __future__ import annotations

import math

import numpy as np
import pytest

from demur.stats import TradeOff, clustered_rate, compare_curves, crossed_difference
from demur.studies.comparisons import Curve, Outcomes, Point, compare_at_level, compare_chosen

T, F = True, False
CLEAN: Outcomes = [[F, F, F, F]]
MAIN = Point("c = 0", [[T, T, T, F]], 0.1)
DRAWN = Point("c = 2", [[T, F, None, None], [F, F, None, T]], 0.3)


def curve(name: str, *points: Point, chosen: Point | None = None) -> Curve:
    return Curve(name, points, chosen, CLEAN)


def test_at_chosen_strengths_each_side_says_what_it_achieves_and_costs() -> None:
    got = compare_chosen(curve("main", MAIN, chosen=MAIN), curve("drawn", DRAWN, chosen=DRAWN), "harm")
    difference, p = crossed_difference(MAIN.outcomes[0], DRAWN.outcomes)
    assert (got.other, got.measure, got.level) == ("drawn", "harm", None)
    assert (got.setting, got.other_setting, got.ce, got.other_ce) == ("c = 0", "c = 2", 0.1, 0.3)
    assert got.value == clustered_rate(MAIN.outcomes)
    assert got.other_value == clustered_rate(DRAWN.outcomes)
    assert (got.difference, got.p) == (difference, p)
    assert math.isnan(got.p_holm)


@pytest.mark.parametrize(("first", "second"), [(None, DRAWN), (MAIN, None)])
def test_without_a_chosen_strength_on_one_side_nothing_is_compared(first: Point | None, second: Point | None) -> None:
    got = compare_chosen(curve("main", MAIN, chosen=first), curve("drawn", DRAWN, chosen=second), "harm")
    assert (got.difference, math.isnan(got.p)) == (None, True)
    assert (got.value is None, got.ce, got.setting) == ((True, None, "") if first is None else (False, 0.1, "c = 0"))
    assert (got.other_value is None, got.other_ce, got.other_setting) == (
        (True, None, "") if second is None else (False, 0.3, "c = 2")
    )


def test_curves_are_interpolated_from_the_clean_model_on() -> None:
    main = curve("main", Point("a", [[T, T, T, T]], 0.1))
    # A strength that was not measured, or broke the model, is none; a fall of cross-entropy is no price below nothing.
    other = curve(
        "other",
        Point("b", [[T, F, F, F]], -0.02),
        Point("c", [[T, T, T, T]], None),
        Point("d", [[T, T, T, T]], math.inf),
        Point("e", [[T, F, None, None], [F, F, None, T]], 0.2),
    )
    got = compare_at_level(main, other, "harm", 0.05, 300)
    assert (got.other, got.measure, got.level, got.ce, got.other_ce) == ("other", "harm", 0.05, 0.05, 0.05)
    assert (got.setting, got.other_setting, math.isnan(got.p_holm)) == ("", "", True)
    assert got.value is not None
    assert got.value.value == pytest.approx(0.5)
    wanted = compare_curves(
        TradeOff(np.array([0.0, 0.1]), np.array([[0.0] * 4, [1.0] * 4])),
        TradeOff(np.array([0.0, 0.0, 0.2]), np.array([[0.0] * 4, [1.0, 0, 0, 0], [0.5, 0, math.nan, 1.0]])),
        0.05,
        resamples=300,
    )
    assert (got.value, got.other_value, got.difference, got.p) == (
        wanted.first, wanted.second, wanted.difference, wanted.p,
    )  # fmt: skip


def test_resamples_are_those_asked_for() -> None:
    """The bootstrap's p is no smaller than one of its samples: 2 / (1 + resamples)."""
    main, other = curve("main", Point("a", [[T] * 4], 0.0)), curve("other", Point("b", [[F] * 4], 0.0))
    assert compare_at_level(main, other, "harm", 0.05, 199).p == pytest.approx(2 / 200)
