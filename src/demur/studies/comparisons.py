"""F* against another method on the same harmful test prompts: at chosen strengths, and at equal side effects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from demur.stats import Estimate, clustered_rate, crossed_difference, mcnemar, paired_difference, value_at
from demur.studies.config import SideEffectOptions
from demur.studies.results import Comparison, SideEffects

Outcomes = tuple[tuple[bool | None, ...], ...]
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


def compare_at_level(
    main: Curve, other: Curve, measure: str, level: float, options: SideEffectOptions, *, seed: int = 0
) -> Comparison:
    """Both curves read at one ΔCE: the most success that a strength of at most that ΔCE reaches, interpolated between
    the strengths measured, from the clean model on.

    Args:
        main: F*.
        other: another method.
        measure: name of what `outcomes` says.
        level: ΔCE on own answers, nats per token.
        options: gives the number of resamples.
        seed: of the bootstrap over prompts. ΔCE itself is taken as measured.
    """
    (x, y), (other_x, other_y) = _points(main), _points(other)
    n = len(main.clean)
    random = np.random.default_rng(seed)
    draws = random.integers(n, size=(options.resamples, n))

    def read(xs: np.ndarray, ys: np.ndarray) -> tuple[float, np.ndarray]:
        return float(value_at(xs, np.nanmean(ys, 1), level)), value_at(xs, np.nanmean(ys[:, draws], 2).T, level)

    (value, values), (other_value, other_values) = read(x, y), read(other_x, other_y)
    gaps = values - other_values
    # Twice the smaller tail, the observed resample among them, so that p is never 0.
    tail = min((gaps <= 0).sum(), (gaps >= 0).sum())
    p = min(1.0, 2 * (1 + float(tail)) / (1 + len(gaps)))

    def estimate(centre: float, resampled: np.ndarray) -> Estimate:
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        return Estimate(value=centre, low=float(low), high=float(high), n=n)

    return Comparison(
        other=other.name,
        measure=measure,
        level=level,
        value=estimate(value, values),
        other_value=estimate(other_value, other_values),
        difference=estimate(value - other_value, gaps),
        ce=level,
        other_ce=level,
        p=p,
        p_holm=math.nan,
    )


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """ΔCE of each point and success `[point, prompt]` (mean over sets; nan: unscored), the clean model first."""
    xs, ys = [0.0], [_shares((curve.clean,))]
    for outcomes, effects in zip(curve.outcomes, curve.effects, strict=True):
        if effects is not None and math.isfinite(effects.ce_answers.value):
            # A fall of cross-entropy is not a price below nothing.
            xs.append(max(0.0, effects.ce_answers.value))
            ys.append(_shares(outcomes))
    return np.array(xs), np.stack(ys)


def _shares(outcomes: Outcomes) -> np.ndarray:
    table = np.array([[math.nan if each is None else float(each) for each in run] for run in outcomes])
    known = ~np.isnan(table)
    counts = known.sum(0)
    return np.where(counts, np.where(known, table, 0.0).sum(0) / np.maximum(counts, 1), math.nan)


__all__ = ["Curve", "Outcomes", "compare_at_level", "compare_chosen"]
