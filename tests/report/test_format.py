"""How numbers are written, against texts written by hand."""

from __future__ import annotations

import math

import pytest

from demur.report.format import (
    count_text,
    duration,
    estimate_text,
    interval,
    is_known,
    listed,
    measure,
    model_title,
    p_text,
    percent,
    points_text,
    rate_text,
    short_number,
    span,
    token_text,
)
from demur.stats import Estimate
from demur.types import Rate

NAN, INF = math.nan, math.inf
NOTHING_SCORED = Rate(k=0, n=0, unscored=7, low=0.0, high=1.0)


def estimate(value: float, low: float, high: float, n: int = 100, unscored: int = 0) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=n, unscored=unscored)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (-1.25, 1, "−1.2"),
        (0.0125, 3, "0.013"),
        (-0.0004, 3, "0.000"),
        (12.0, 0, "12"),
        (NAN, 2, "–"),
        (None, 2, "–"),
        (INF, 2, "∞"),
        (-INF, 2, "−∞"),
    ],
)
def test_measure_has_its_decimals_a_real_minus_and_no_negative_zero(
    value: float | None, digits: int, text: str
) -> None:
    assert measure(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-3.0, "−3"), (0.25, "0.25"), (1e-05, "1e−05"), (2.0, "2"), (NAN, "–"), (None, "–")]
)
def test_short_numbers_have_no_more_digits_than_they_need(value: float | None, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0%"),
        (0.001, "<1%"),
        (0.104, "10%"),
        (0.996, ">99%"),
        (1.0, "100%"),
        (2.77, "277%"),
        (-0.5, "−50%"),
        (NAN, "–"),
        (None, "–"),
    ],
)
def test_percent_keeps_0_and_100_for_exactly_those(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


def test_a_rate_has_its_interval_and_is_a_dash_where_nothing_was_scored() -> None:
    assert rate_text(Rate(k=91, n=100, low=0.838, high=0.952)) == "91% [84–95]"
    assert rate_text(estimate(0.9, 0.82, 0.98)) == "90% [82–98]"
    for unknown in (NOTHING_SCORED, None, estimate(NAN, NAN, NAN, n=0), estimate(0.5, -INF, INF)):
        assert rate_text(unknown) == interval(unknown) == "–"
        assert not is_known(unknown)


def test_an_estimate_has_its_interval_where_one_is_known() -> None:
    assert estimate_text(estimate(0.912, 0.842, 0.951)) == "0.91 [0.84–0.95]"
    assert estimate_text(estimate(0.012, -0.004, 0.028), 3) == "0.012 [−0.004 to 0.028]"
    assert estimate_text(estimate(0.012, -INF, INF), 3) == "0.012"
    assert estimate_text(estimate(NAN, NAN, NAN, n=0)) == estimate_text(None) == estimate_text(NOTHING_SCORED) == "–"


def test_an_interval_says_to_where_a_dash_would_hide_a_minus() -> None:
    assert span(0.01, 0.03) == "0.01–0.03"
    assert span(-0.03, -0.01) == "−0.03 to −0.01"


def test_differences_are_in_signed_percentage_points() -> None:
    assert points_text(estimate(0.42, 0.3, 0.54)) == "+42 [30 to 54]"
    assert points_text(estimate(-0.08, -0.2, 0.04)) == "−8 [−20 to 4]"
    assert points_text(estimate(0.004, -0.01, 0.02)) == "0 [−1 to 2]"
    assert points_text(estimate(0.42, -INF, INF)) == "+42"
    assert points_text(estimate(NAN, NAN, NAN, n=0)) == points_text(None) == "–"


def test_counts_say_what_could_not_be_scored() -> None:
    assert count_text(Rate(k=1, n=97, unscored=3, low=0.0, high=0.1)) == "97+3 unscored"
    assert count_text(estimate(0.1, 0.0, 0.2, n=97, unscored=3), unit="") == "97+3"
    assert count_text(estimate(0.1, 0.0, 0.2)) == "100"
    assert count_text(NOTHING_SCORED) == "0+7 unscored"


@pytest.mark.parametrize(
    ("p", "text"),
    [(None, "–"), (NAN, "–"), (1e-9, "<0.001"), (0.0123, "0.012"), (0.0496, "0.050"), (0.5, "0.50"), (1.0, "1.00")],
)
def test_p_values(p: float | None, text: str) -> None:
    assert p_text(p) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.54, "1.5 s"),
        (9.97, "10 s"),
        (12.4, "12 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3700, "1 h 01 min"),
        (NAN, "–"),
        (None, "–"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("google/gemma-2-2b-it", "google/gemma-2-2b-it"),
        ("/data/runs/organism/model", "organism"),
        ("../model", "../model"),
        ("/model", "/model"),
    ],
)
def test_a_model_is_titled_by_the_part_of_its_name_that_says_something(name: str, title: str) -> None:
    assert model_title(name) == title


def test_tokens_show_their_white_space() -> None:
    assert token_text("\n") == "\\n"
    assert token_text("▁I") == "▁I"


def test_lists_read_as_sentences() -> None:
    assert [listed(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
