"""Charts of the features study: refusal against strength, and the features' effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt

from demur.report._svg import EXACT, INK, inline_data, svg
from demur.report._words import find_row
from demur.studies.results import EffectRow, FeaturesResult, Kind, Method
from demur.types import Label

SHAPES: Final[dict[Method, str]] = {"features": "circle", "random": "square"}
DASHES: Final[dict[Method, list[int]]] = {"features": [1, 0], "random": [5, 3]}
SHOWN_FEATURES: Final = 40
"""Bars of the attribution chart; the table beside it lists every feature."""

# Lightness rises evenly from violet to ochre, so that the order survives colour blindness and grey printing.
_LAYER_STOPS: Final = ("#5e4b9c", "#3d76b3", "#2a958c", "#74a64b", "#d3a029")


def layer_colours(layers: Sequence[int]) -> dict[int, str]:
    """Layer → colour, by rank between the shallowest and the deepest layer given."""
    ordered = sorted(set(layers))
    span = max(len(ordered) - 1, 1)
    return {layer: _between_stops(rank / span) for rank, layer in enumerate(ordered)}


def _between_stops(t: float) -> str:
    place = t * (len(_LAYER_STOPS) - 1)
    left = min(int(place), len(_LAYER_STOPS) - 2)
    a, b = (bytes.fromhex(stop[1:]) for stop in _LAYER_STOPS[left : left + 2])
    mixed = (round(x + (y - x) * (place - left)) for x, y in zip(a, b, strict=True))
    return "#" + bytes(mixed).hex()


def curve(result: FeaturesResult, prompts: Label, kind: Kind) -> str | None:
    """Refusal against strength: features and control as lines with 95 % bands, a direction as a rule.

    Returns None where nothing was measured.
    """
    rows = [
        row
        for row in result.effects
        if row.prompts == prompts and row.kind == kind and row.method in SHAPES and row.refusal.n
    ]
    if not rows:
        return None
    y: Any = alt.Y(
        "refusal:Q",
        title="refused",
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1]),
    )
    layers = _rules(result, prompts, kind, y)
    x: Any = alt.X(
        "strength:Q",
        title=_strength_title(result, kind),
        scale=alt.Scale(reverse=kind == "suppress", zero=False, nice=False, padding=14),
        axis=alt.Axis(values=sorted({row.strength for row in rows}), labelExpr=EXACT, grid=False),
    )
    for method, shape in SHAPES.items():
        of_method = [row for row in rows if row.method == method]
        if of_method:
            layers += _line(of_method, method, shape, x, y)
    return svg(alt.layer(*layers).properties(width=340, height=240), f"{kind}-{prompts}")


def _strength_title(result: FeaturesResult, kind: Kind) -> str:
    if kind == "suppress":
        return "scale factor c (1 would change nothing)"
    return "value, in multiples of each feature's peak" if result.strength_unit == "multiple" else "value v"


def _rules(result: FeaturesResult, prompts: Label, kind: Kind, y: Any) -> list[Any]:
    """The clean model and the directions, which have no strength."""
    marked: tuple[tuple[Kind, Method, str, list[int]], ...] = (
        ("baseline", "none", "var(--m-none)", [2, 3]),
        (kind, "direction", "var(--m-direction)", [8, 3]),
        (kind, "direction_affine", "var(--m-direction-affine)", [8, 3, 2, 3]),
    )
    found = [
        (row, colour, dash)
        for of_kind, method, colour, dash in marked
        if (row := find_row(result.effects, prompts, of_kind, method)) is not None and row.refusal.n
    ]
    return [
        alt.Chart(inline_data([{"refusal": row.refusal.value}]))
        .mark_rule(color=colour, strokeDash=dash, strokeWidth=1.8)
        .encode(y=y)
        for row, colour, dash in found
    ]


def _line(rows: Sequence[EffectRow], method: Method, shape: str, x: Any, y: Any) -> list[Any]:
    colour = f"var(--m-{method})"
    chart = alt.Chart(
        inline_data(
            [
                {
                    "strength": r.strength,
                    "refusal": r.refusal.value,
                    "low": r.refusal.low,
                    "high": r.refusal.high,
                }
                for r in rows
            ]
        )
    )
    band: Any = chart.mark_area(color=colour, opacity=0.16) if len(rows) > 1 else chart.mark_rule(color=colour)
    point = chart.mark_point(color=colour, fill=colour, shape=shape, size=55, opacity=1)
    return [
        band.encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
        chart.mark_line(color=colour, strokeDash=DASHES[method], strokeWidth=2).encode(x=x, y=y),
        point.encode(x=x, y=y),
    ]


def attribution(result: FeaturesResult) -> str | None:
    """Bars of the features' estimated effects, coloured by layer, with ticks at the exactly patched ones."""
    rows = result.features[:SHOWN_FEATURES]
    if not rows:
        return None
    colours = layer_colours([row.feature.layer for row in result.features])
    names = [f"L{row.feature.layer} · {row.feature.index}" for row in rows]
    chart = alt.Chart(
        inline_data(
            [
                {"name": name, "score": row.score, "exact": row.exact, "colour": colours[row.feature.layer]}
                for name, row in zip(names, rows, strict=True)
            ]
        )
    )
    y: Any = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(ticks=False, labelPadding=6, domain=False))
    bars: Any = chart.mark_bar(height=11).encode(
        x=alt.X("score:Q", title="mean effect on the metric, logits"),
        y=y,
        color=alt.Color("colour:N", scale=None),
    )
    layers: list[Any] = [bars]
    if any(row.exact is not None for row in rows):
        layers.append(
            chart.transform_filter("isValid(datum.exact)")
            .mark_tick(color=INK, thickness=2.2, size=15, opacity=1)
            .encode(x="exact:Q", y=y)
        )
    return svg(alt.layer(*layers).properties(width=400, height=alt.Step(18)), "attribution")
