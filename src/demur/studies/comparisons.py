"""F* against another method on the same harmful test prompts: at chosen strengths, and at equal side effects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from demur.stats import TradeOff, clustered_rate, compare_curves, crossed_difference
from demur.studies.results import Comparison

Outcomes = Sequence[Sequence[bool | None]]
"""Per set drawn (one, but for controls) and prompt: got what it asks for; None when unscored."""


class Point(NamedTuple):
    """One strength in words, what it achieves, and what it costs: ΔCE on own answers, nats per token (None where it was
    not measured)."""

    setting: str
    outcomes: Outcomes
    ce: float | None


class Curve(NamedTuple):
    """A method's success over the strengths that were measured, and what each strength costs."""

    name: str
    points: tuple[Point, ...]
    chosen: Point | None
    """The strength that the tuning prompts chose; None where none could be scored."""
    clean: Outcomes
    """Of the clean model."""
    local: bool = False
    """Sets of its own for each prompt."""


def compare_chosen(main: Curve, other: Curve, measure: str) -> Comparison:
    """Both at the strengths that the tuning prompts chose for them."""
    first, second = main.chosen, other.chosen
    difference, p = None, math.nan
    if first is not None and second is not None:
        # Nothing scored under both is no comparison, and must not count in Holm's family: p is nan.
        difference, p = crossed_difference(first.outcomes[0], second.outcomes)
    return Comparison(
        other=other.name,
        measure=measure,
        level=None,
        setting="" if first is None else first.setting,
        other_setting="" if second is None else second.setting,
        value=None if first is None else clustered_rate(first.outcomes),
        other_value=None if second is None else clustered_rate(second.outcomes),
        difference=difference,
        ce=None if first is None else first.ce,
        other_ce=None if second is None else second.ce,
        p=p,
        p_holm=math.nan,
    )


def compare_at_level(main: Curve, other: Curve, measure: str, level: float, resamples: int) -> Comparison:
    """Both curves read at one ΔCE: the most success that a strength of at most that ΔCE reaches, interpolated between
    the strengths measured, from the clean model on. Prompts are resampled; ΔCE is taken as measured.

    Args:
        main: F*.
        other: another method.
        measure: name of what `outcomes` says.
        level: ΔCE on own answers, nats per token.
        resamples: of the bootstrap.
    """
    found = compare_curves(_trade_off(main), _trade_off(other), level, resamples=resamples)
    return Comparison(
        other=other.name,
        measure=measure,
        level=level,
        value=found.first,
        other_value=found.second,
        difference=found.difference,
        ce=level,
        other_ce=level,
        p=found.p,
        p_holm=math.nan,
    )


def _trade_off(curve: Curve) -> TradeOff:
    """ΔCE of each strength, and success on each prompt (mean over sets; nan: unscored), the clean model first."""
    # A fall of cross-entropy is not a price below nothing.
    known = [(max(0.0, p.ce), p.outcomes) for p in curve.points if p.ce is not None and math.isfinite(p.ce)]
    costs, outcomes = zip((0.0, curve.clean), *known, strict=True)
    return TradeOff(np.array(costs), np.stack([_shares(each) for each in outcomes]))


def _shares(outcomes: Outcomes) -> np.ndarray:
    table = np.array(outcomes, dtype=np.float64)
    known = ~np.isnan(table)
    return np.where(known.any(0), np.where(known, table, 0.0).sum(0) / np.maximum(known.sum(0), 1), math.nan)
