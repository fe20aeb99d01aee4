"""Charts of the benchmark: what suppression costs, how induction grows, what size of F* it takes, the search.

Methods differ by mark and dash as well as by colour. A chart that would hold no point is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import altair as alt

from demur.report._benchmark_words import COMPLIANCE, METHOD_NAMES
from demur.report._svg import EXACT, INK, inline_data, svg
from demur.report._words import is_known
from demur.stats import Estimate
from demur.studies.benchmark.config import DIRECTIONS, MAIN
from demur.studies.benchmark.results import BenchmarkResult, InduceRow, Method, SuppressRow


class Style(NamedTuple):
    """How one method is drawn: a colour of the page, a mark as a path in the square from −1 to 1, and a dash."""

    colour: str
    mark: str
    dash: tuple[int, ...]


_DISC: Final = "M-1,0A1,1,0,1,1,1,0A1,1,0,1,1,-1,0Z"
_CROSS: Final = "M-0.35,-1H0.35V-0.35H1V0.35H0.35V1H-0.35V0.35H-1V-0.35H-0.35Z"
_STAR: Final = "M0,-1L0.29,-0.4L0.95,-0.31L0.48,0.15L0.59,0.81L0,0.5L-0.59,0.81L-0.48,0.15L-0.95,-0.31L-0.29,-0.4Z"
_HOURGLASS: Final = "M-0.9,-1H0.9L0,0L0.9,1H-0.9L0,0Z"

STYLES: Final[dict[Method, Style]] = {
    "cossim+ap": Style("var(--b-main)", _DISC, (1, 0)),
    "ap": Style("var(--b-ap)", "M0,-1L1,0.85H-1Z", (6, 3)),
    "ap-falling": Style("var(--b-ap-falling)", "M0,1L1,-0.85H-1Z", (2, 2)),
    "actdiff": Style("var(--b-actdiff)", "M-0.85,-0.85H0.85V0.85H-0.85Z", (8, 3, 2, 3)),
    "cossim": Style("var(--b-cossim)", "M0,-1.1L1,0L0,1.1L-1,0Z", (4, 2)),
    "random": Style("var(--b-random)", _CROSS, (1, 3)),
    "direction": Style("var(--b-direction)", _STAR, (10, 3)),
    "direction-affine": Style("var(--b-direction-affine)", _HOURGLASS, (10, 3, 2, 3)),
}
"""Local sets are in no chart: they have no damage of their own, and one strength."""

_DAMAGE: Final = "damage: rise of cross-entropy on own answers, nats per token"
_LINEAR_TO: Final = 0.01
"""Damage up to which the axis is linear; beyond it is logarithmic, so that 0.01 and 5 both have room."""

_TICKS: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, -0.01, -0.1, -1.0)


class _Point(NamedTuple):
    x: float
    y: float
    chosen: bool


def tradeoff(result: BenchmarkResult, measure: str, name: str) -> str | None:
    """Share of harmful test prompts that got what they ask for, against damage: one mark per method and strength."""
    lines: dict[Method, list[_Point]] = {}
    # Strengths in order: a line shows what happens as a method is driven harder.
    for row in sorted(result.suppression, key=lambda row: -row.strength):
        rate = _success(row, measure)
        if row.method in STYLES and row.damage is not None and rate is not None:
            x = row.damage.answers.value
            if math.isfinite(x) and is_known(rate):
                lines.setdefault(row.method, []).append(_Point(x, rate.value, row.chosen))
    if not lines:
        return None
    budgets = sorted({row.budget for row in result.comparisons if row.budget is not None})
    x = _damage_axis((point.x for points in lines.values() for point in points), budgets)
    title = "complied with" if measure == COMPLIANCE else "attack success"
    layers = [_budgets(budgets, x), *_marks(lines, x, _share(title))]
    return svg(alt.layer(*layers).properties(width=470, height=300), name)


def _success(row: SuppressRow, measure: str) -> Estimate | None:
    return row.behaviour.compliance if measure == COMPLIANCE else row.behaviour.attack.get(measure)


def induction(result: BenchmarkResult) -> str | None:
    """Refusal of harmless test prompts against strength.

    Where features are set to values rather than to multiples of their peaks, directions have another axis and are left
    out.
    """
    lines: dict[Method, list[_Point]] = {}
    for row in sorted(induction_rows(result), key=lambda row: row.strength):
        if row.method in STYLES and is_known(row.behaviour.refusal):
            lines.setdefault(row.method, []).append(_Point(row.strength, row.behaviour.refusal.value, row.chosen))
    if not lines:
        return None
    strengths = sorted({point.x for points in lines.values() for point in points})
    multiple = "multiple of each feature’s peak, or of the direction’s length"
    x: Any = alt.X(
        "x:Q",
        title="value v" if result.strength_unit == "value" else multiple,
        scale=alt.Scale(zero=False, nice=False, padding=16),
        axis=alt.Axis(values=strengths, labelExpr=EXACT, grid=False),
    )
    base = next((row for row in result.induction if row.method == "none"), None)
    layers = [*_level(base), *_marks(lines, x, _share("refused"))]
    return svg(alt.layer(*layers).properties(width=470, height=300), "induction")


def induction_rows(result: BenchmarkResult) -> tuple[InduceRow, ...]:
    """The rows that share the chart's axis."""
    left_out = DIRECTIONS if result.strength_unit == "value" else ()
    return tuple(row for row in result.induction if row.method not in left_out)


def _level(base: InduceRow | None) -> list[Any]:
    """The clean model, which has no strength."""
    if base is None or not is_known(base.behaviour.refusal):
        return []
    rule = alt.Chart(inline_data([{"y": base.behaviour.refusal.value}]))
    return [rule.mark_rule(color="var(--m-none)", strokeDash=[2, 3], strokeWidth=1.8).encode(y=alt.Y("y:Q"))]


def sizes_refusal(result: BenchmarkResult) -> str | None:
    """Refusal of harmful test prompts against the size of F*."""
    rows = [(row.size, row.refusal) for row in result.curve if is_known(row.refusal)]
    return _sizes(rows, result, _share("harmful prompts refused"), "sizes-refusal")


def sizes_damage(result: BenchmarkResult) -> str | None:
    """Damage against the size of F*."""
    rows = [(row.size, row.damage) for row in result.curve if is_known(row.damage)]
    # A fraction of a thousandth would fill the axis if it were all there is.
    ends = [0.0, _LINEAR_TO, *(end for _, damage in rows for end in (damage.low, damage.high))]
    y: Any = alt.Y(
        "y:Q",
        title="damage, nats per token",
        scale=alt.Scale(domain=[min(ends), max(ends)], nice=True),
        axis=alt.Axis(labelExpr=EXACT, tickCount=5),
    )
    return _sizes(rows, result, y, "sizes-damage")


def _sizes(rows: Sequence[tuple[int, Estimate]], result: BenchmarkResult, y: Any, name: str) -> str | None:
    if not rows:
        return None
    values = [{"x": size, "y": each.value, "low": each.low, "high": each.high} for size, each in rows]
    chart = alt.Chart(inline_data(values))
    colour = STYLES[MAIN].colour
    x: Any = alt.X(
        "x:Q",
        title="features in F*",
        scale=alt.Scale(type="log", nice=False, padding=14),
        axis=alt.Axis(values=[size for size, _ in rows], labelExpr=EXACT, grid=False),
    )
    band: Any = chart.mark_area(color=colour, opacity=0.16) if len(rows) > 1 else chart.mark_rule(color=colour)
    layers: list[Any] = []
    if rows[0][0] <= result.k <= rows[-1][0]:
        used = alt.Chart(inline_data([{"x": result.k}]))
        layers.append(used.mark_rule(color=INK, opacity=0.45, strokeDash=[3, 3]).encode(x=x))
    layers += [
        band.encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
        chart.mark_line(color=colour, strokeWidth=2).encode(x=x, y=y),
        chart.mark_point(color=colour, fill=colour, size=55, opacity=1).encode(x=x, y=y),
    ]
    return svg(alt.layer(*layers).properties(width=340, height=230), name)


def pareto(result: BenchmarkResult) -> str | None:
    """The search's trials: compliance on harmful tuning prompts against damage, the front joined, the knee ringed."""
    trials = [] if result.tuning is None else result.tuning.trials
    known = [trial for trial in trials if math.isfinite(trial.suppression) and math.isfinite(trial.damage)]
    if result.tuning is None or not known:
        return None
    x = _damage_axis(trial.damage for trial in known)
    y = _share("harmful tuning prompts complied with")

    def points(which: Iterable[Any]) -> Any:
        return alt.Chart(inline_data([{"x": trial.damage, "y": trial.suppression} for trial in which]))

    front = sorted((trial for trial in known if trial.front), key=lambda trial: (trial.damage, trial.suppression))
    layers: list[Any] = [
        points(trial for trial in known if not trial.front)
        .mark_point(color="var(--m-none)", size=34, opacity=0.8)
        .encode(x=x, y=y),
        # Between two trials nothing better than the cheaper one is known: a step, not a slope.
        points(front).mark_line(color=STYLES[MAIN].colour, interpolate="step-after", strokeWidth=1.8).encode(x=x, y=y),
        points(front)
        .mark_point(color=STYLES[MAIN].colour, fill=STYLES[MAIN].colour, size=60, opacity=1)
        .encode(x=x, y=y),
        points(trial for trial in known if trial.number == result.tuning.knee)
        .mark_point(color=INK, size=260, strokeWidth=1.6, opacity=1)
        .encode(x=x, y=y),
    ]
    return svg(alt.layer(*layers).properties(width=470, height=280), "pareto")


def _share(title: str) -> Any:
    return alt.Y(
        "y:Q",
        title=title,
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1]),
    )


def _damage_axis(values: Iterable[float], budgets: Sequence[float] = ()) -> Any:
    """Damage over the values' range, with a tick at each budget and, elsewhere, at round numbers."""
    found = list(values)
    low, high = min(*found, 0.0, -_LINEAR_TO / 10), max(*found, _LINEAR_TO)
    ticks = [*budgets, *(tick for tick in _TICKS if not any(tick / 2 < each < tick * 2 for each in budgets))]
    return alt.X(
        "x:Q",
        title=_DAMAGE,
        scale=alt.Scale(type="symlog", constant=_LINEAR_TO, domain=[low, high], nice=False, padding=16),
        axis=alt.Axis(values=sorted(tick for tick in ticks if low <= tick <= high), labelExpr=EXACT, grid=False),
    )


def _budgets(budgets: Sequence[float], x: Any) -> Any:
    """Damages at which methods were compared."""
    low, high = x.to_dict()["scale"]["domain"]
    rules = alt.Chart(inline_data([{"x": budget} for budget in budgets if low <= budget <= high]))
    return rules.mark_rule(color="var(--faint)", strokeDash=[3, 3]).encode(x=x)


def _marks(lines: dict[Method, list[_Point]], x: Any, y: Any) -> list[Any]:
    """Lines and marks of each method, F* on top; a ring around what the tuning prompts chose."""
    layers: list[Any] = []
    for method in sorted(lines, key=list(STYLES).index, reverse=True):
        style, points = STYLES[method], lines[method]
        chart = alt.Chart(
            inline_data([{"x": p.x, "y": p.y, "chosen": p.chosen, "order": n} for n, p in enumerate(points)])
        )
        path: Any = chart.mark_line(color=style.colour, strokeDash=list(style.dash), strokeWidth=2, opacity=0.85)
        layers += [
            path.encode(x=x, y=y, order="order:Q"),
            chart.mark_point(
                color=style.colour, fill=style.colour, shape=style.mark, size=80, strokeWidth=0.5, opacity=1
            ).encode(x=x, y=y),
            chart.transform_filter("datum.chosen")
            .mark_point(color=style.colour, size=300, strokeWidth=1.6, opacity=1)
            .encode(x=x, y=y),
        ]
    return layers


def legend(rows: Iterable[SuppressRow | InduceRow]) -> tuple[tuple[str, Style], ...]:
    """Names and styles of the methods that a chart of these rows holds."""
    present = {row.method for row in rows}
    return tuple((METHOD_NAMES[method], style) for method, style in STYLES.items() if method in present)


__all__ = [
    "STYLES",
    "Style",
    "induction",
    "induction_rows",
    "legend",
    "pareto",
    "sizes_damage",
    "sizes_refusal",
    "tradeoff",
]
