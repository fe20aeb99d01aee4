"""F* against another method on the same harmful test prompts: at chosen strengths, and at equal side effects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demur.stats import (
    Estimate,
    TradeOff,
    clustered_rate,
    compare_curves,
    crossed_difference,
    mcnemar,
    paired_difference,
)
from demur.studies.results import Comparison, SideEffects

Outcomes = Sequence[Sequence[bool | None]]
"""Per set drawn (one, but for controls) and prompt: got what it asks for; None when unscored."""


@dataclass(frozen=True)
class Curve:
    """A method's success over the strengths that were measured, and what each strength costs.

    Attributes:
        name: of the method.
        settings: the strengths in words.
        outcomes: per strength.
        effects: side effects per strength; None where none were measured.
        chosen: place of the strength that the tuning prompts chose; None where none could be scored.
        clean: outcomes of the clean model.
        local: sets of its own for each prompt.
    """

    name: str
    settings: tuple[str, ...]
    outcomes: tuple[Outcomes, ...]
    effects: tuple[SideEffects | None, ...]
    chosen: int | None
    clean: tuple[bool | None, ...]
    local: bool = False

    def ce(self, place: int | None) -> float | None:
        """ΔCE on own answers at a strength, nats per token."""
        effects = None if place is None else self.effects[place]
        return None if effects is None else effects.ce_answers.value


def compare_chosen(main: Curve, other: Curve, measure: str) -> Comparison:
    """Both at the strengths that the tuning prompts chose for them."""
    first = None if main.chosen is None else main.outcomes[main.chosen]
    second = None if other.chosen is None else other.outcomes[other.chosen]
    difference: Estimate | None = None
    p = math.nan
    if first is not None and second is not None:
        if len(second) > 1:
            difference, p = crossed_difference(first[0], second)
        else:
            difference = paired_difference(first[0], second[0])
            # Nothing scored under both is no comparison, and must not count in Holm's family.
            p = mcnemar(first[0], second[0]).p if difference.n else math.nan
    return Comparison(
        other=other.name,
        measure=measure,
        level=None,
        setting="" if main.chosen is None else main.settings[main.chosen],
        other_setting="" if other.chosen is None else other.settings[other.chosen],
        value=None if first is None else clustered_rate(first),
        other_value=None if second is None else clustered_rate(second),
        difference=difference,
        ce=main.ce(main.chosen),
        other_ce=other.ce(other.chosen),
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
    costs, rows = [0.0], [_shares((curve.clean,))]
    for outcomes, effects in zip(curve.outcomes, curve.effects, strict=True):
        if effects is not None and math.isfinite(effects.ce_answers.value):
            # A fall of cross-entropy is not a price below nothing.
            costs.append(max(0.0, effects.ce_answers.value))
            rows.append(_shares(outcomes))
    return TradeOff(np.array(costs), np.stack(rows))


def _shares(outcomes: Outcomes) -> np.ndarray:
    table = np.array([[math.nan if each is None else float(each) for each in run] for run in outcomes])
    known = ~np.isnan(table)
    counts = known.sum(0)
    return np.where(counts, np.where(known, table, 0.0).sum(0) / np.maximum(counts, 1), math.nan)
