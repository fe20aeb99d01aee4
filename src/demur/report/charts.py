"""Charts of a study's results: lines over strengths, trade-offs, bars, heat maps; the looks of `templates/theme.toml`.

Each function gives an altair chart, or None where there is nothing to draw; a `Chart` block whose `draw` gives None is
left out of the page. Series differ in mark and dash as well as in colour. Charts are drawn with the light colours, so
that they look right by themselves; `to_svg` makes each the CSS variable of its name, so that one drawing serves light
and dark: inline, without script or network, text that prints. Altair is imported on use.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import cycle
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from demur.report.format import measure, token_text

if TYPE_CHECKING:
    from demur.stats import Estimate
    from demur.types import Rate

TEMPLATES: Final = files("demur.report") / "templates"
THEME: Final[dict[str, Any]] = tomllib.loads((TEMPLATES / "theme.toml").read_text(encoding="utf-8"))
LIGHT: Final[dict[str, str]] = {name: light for name, (light, _) in THEME["colours"].items()}

EXACT: Final = "replace(format(datum.value, '~g'), '-', '−')"
"""Labels that hold their tick's own digits. An axis's number format is cut to what it takes to tell even steps apart,
which would write 0.25 as 0.3."""

_VARIABLES: Final = {light: f"var(--{name})" for name, light in LIGHT.items()}


def colour_rules() -> str:
    """The colours as CSS variables: light, and dark where the reader's system asks for it."""
    light, dark = (" ".join(f"--{name}: {pair[n]};" for name, pair in THEME["colours"].items()) for n in (0, 1))
    return f".demur {{ {light} }}\n@media (prefers-color-scheme: dark) {{ .demur {{ {dark} }} }}\n"


def to_svg(chart: Any, name: str) -> str:
    """An altair chart as an `<svg>` element, in the page's colours, without script. `name` keeps its ids apart from
    those of other charts on the page."""
    import vl_convert

    styled = chart.configure(view={"stroke": None}, **THEME["config"])
    drawn: str = vl_convert.vegalite_to_svg(json.loads(styled.to_json()))
    opening, rest = drawn.split(">", 1)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)
    if found is None:
        raise ValueError("the chart came back without a size")
    # The page names the whole drawing; the renderer's notes on each mark would be read aloud one by one.
    rest = re.sub(r' (?:aria-[a-z]+|role)="[^"]*"', "", rest)
    rest = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', rest)
    rest = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", rest)
    rest = re.sub(r'(?<==")#[0-9a-f]{6}(?=")', lambda colour: _VARIABLES.get(colour[0], colour[0]), rest)
    width, height = found.groups()
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} aria-hidden="true">{rest}'


_INK: Final = LIGHT["ink"]
_MAIN: Final = LIGHT["s0"]
_TICKS: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, -0.01, -0.1, -1.0)


class Point(NamedTuple):
    """One measured point. `low` and `high` are the 95 % interval of `y`; `chosen` points are ringed."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    chosen: bool = False

    @classmethod
    def of(cls, x: float, y: Rate | Estimate, *, chosen: bool = False) -> Point:
        """A rate or an estimate with its interval, at `x`. nan where nothing was scored, which charts leave out."""
        return cls(x, y.value if y.n else math.nan, y.low, y.high, chosen)


class Series(NamedTuple):
    """A named line of points, in the order in which they are joined."""

    name: str
    points: tuple[Point, ...]
    join: Literal["line", "step", "none"] = "line"


class Bar(NamedTuple):
    """One bar. `layer` colours it; `exact` is drawn as a tick across it."""

    name: str
    value: float
    layer: int | None = None
    exact: float | None = None


class Cell(NamedTuple):
    """One cell of a heat map. A cell that is not `kept` has no tint; the `chosen` one is framed."""

    row: int
    column: int
    value: float
    kept: bool = True
    chosen: bool = False


class Node(NamedTuple):
    """A node of a graph of one prompt. `layer` −1 holds the prompt's tokens, the highest one the logits; `token` is the
    token at `position`."""

    name: str
    label: str
    kind: str
    layer: int
    position: int
    token: str


class Link(NamedTuple):
    """An edge between two nodes by name."""

    source: str
    target: str
    weight: float


class Spread(NamedTuple):
    """A group of values, one of each prompt, and their mean with its 95 % interval."""

    name: str
    values: tuple[float, ...]
    mean: Estimate


class Style(NamedTuple):
    """How a series is drawn: a colour, a mark as an SVG path in the square from −1 to 1, and a dash."""

    colour: str
    mark: str
    dash: tuple[int, ...]

    @property
    def stroke(self) -> dict[str, Any]:
        """Colour and dash as altair's marks take them."""
        return {"color": self.colour, "strokeDash": list(self.dash)}


def series_styles(names: Iterable[str]) -> dict[str, Style]:
    """Name → style, by rank among the names given; after ten names styles come round again."""
    looks = [Style(LIGHT[f"s{n}"], look["mark"], tuple(look["dash"])) for n, look in enumerate(THEME["series"])]
    return dict(zip(dict.fromkeys(names), cycle(looks), strict=False))


def layer_colours(layers: Sequence[int]) -> dict[int, str]:
    """Layer → colour, by rank between the shallowest and the deepest layer given."""
    ordered = sorted(set(layers))
    span = max(len(ordered) - 1, 1)
    return {layer: _between_stops(rank / span) for rank, layer in enumerate(ordered)}


def _between_stops(t: float) -> str:
    stops: list[str] = THEME["layer_stops"]
    place = t * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    a, b = (bytes.fromhex(stop[1:]) for stop in stops[left : left + 2])
    mixed = (round(x + (y - x) * (place - left)) for x, y in zip(a, b, strict=True))
    return "#" + bytes(mixed).hex()


def line_chart(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    order: Sequence[str] = (),
    share: bool = True,
    x_scale: Literal["linear", "log"] = "linear",
    reverse: bool = False,
    rules: Mapping[str, float] | None = None,
    guides: Sequence[float] = (),
) -> Any:
    """Lines with 95 % bands over a strength or a size, and level lines for what has none.

    Args:
        series: the lines; points that are not finite are left out.
        x_title, y_title: with the unit.
        order: names in the order in which they take their looks, the same for every chart of a study; others follow.
        share: y is a share from 0 to 1, shown in percent.
        x_scale: `log` for sizes that double.
        reverse: larger x to the left, as for scale factors, where 1 changes nothing.
        rules: name → constant y, as of the clean model or of a direction; drawn as level lines.
        guides: x values marked by an upright line, as the size that is used elsewhere.
    """
    known, styles = _drawable(series, order)
    if not known:
        return None
    import altair as alt

    values = sorted({point.x for each in known for point in each.points})
    scale = alt.Scale(type=x_scale, reverse=reverse, zero=False, nice=False, padding=14)
    axis = alt.Axis(values=values, labelExpr=EXACT, grid=False, labelOverlap=True, labelSeparation=8)
    x = alt.X("x:Q", title=x_title, scale=scale, axis=axis)
    rules = {name: y for name, y in (rules or {}).items() if math.isfinite(y)}
    y = _y_axis(known, y_title, share, rules.values())
    # A rule that is a series of other charts looks as there, the others are grey.
    dashes = cycle(THEME["rule_dashes"])
    level = {n: styles[n]._replace(mark="") if n in order else Style(LIGHT["grey"], "", next(dashes)) for n in rules}
    layers = [_upright([each for each in guides if values[0] <= each <= values[-1]], x)]
    for name, value in rules.items():
        layers.append(_chart([{"y": value}]).mark_rule(strokeWidth=1.8, **level[name].stroke).encode(y=y))
    # The first series is the one that matters: it is drawn last, on top.
    for each in reversed(known):
        layers += [_band(each, styles[each.name], x), *_marks(each, styles[each.name], x, y)]
    layers.append(_legend({each.name: styles[each.name] for each in known} | level))
    return alt.layer(*layers).properties(width=360, height=240)


def scatter_lines(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    order: Sequence[str] = (),
    share: bool = True,
    linear_to: float = 0.01,
    guides: Sequence[float] = (),
) -> Any:
    """A trade-off, one mark per point: x is a side effect on an axis that is linear near zero and logarithmic beyond.

    Args:
        series: the lines; points that are not finite are left out, chosen ones are ringed.
        x_title, y_title, order, share: as in `line_chart`.
        linear_to: x up to which the axis is linear, on both sides of zero.
        guides: x values marked by an upright line and a tick, as budgets.
    """
    known, styles = _drawable(series, order)
    if not known:
        return None
    import altair as alt

    found = [point.x for each in known for point in each.points]
    low, high = min(*found, 0.0, -linear_to / 10), max(*found, linear_to)
    # Round numbers keep away from the guides.
    ticks = {*guides, *(tick for tick in _TICKS if not any(tick / 2 < each < tick * 2 for each in guides))}
    scale = alt.Scale(type="symlog", constant=linear_to, domain=[low, high], nice=False, padding=16)
    axis = alt.Axis(values=sorted(tick for tick in ticks if low <= tick <= high), labelExpr=EXACT, grid=False)
    x, y = alt.X("x:Q", title=x_title, scale=scale, axis=axis), _y_axis(known, y_title, share)
    layers = [_upright([each for each in guides if low <= each <= high], x)]
    for each in reversed(known):
        layers += _marks(each, styles[each.name], x, y)
    layers.append(_legend({each.name: styles[each.name] for each in known}))
    return alt.layer(*layers).properties(width=470, height=300)


def bar_chart(bars: Sequence[Bar], *, x_title: str, exact_title: str = "exact patching", limit: int = 40) -> Any:
    """Horizontal bars in the order given, coloured by layer, with a tick where the exact value is known.

    Args:
        bars: names must differ.
        x_title: with the unit.
        exact_title: what the ticks are, for the legend.
        limit: how many bars are drawn, from the first; a table beside the chart lists all.
    """
    shown = [bar for bar in bars if math.isfinite(bar.value)][:limit]
    if not shown:
        return None
    import altair as alt

    axis = alt.Axis(ticks=False, labelPadding=6, domain=False, labelLimit=0)
    y = alt.Y("name:N", sort=[bar.name for bar in shown], title=None, axis=axis)
    x = alt.X("value:Q", title=x_title, axis=alt.Axis(labelExpr=EXACT, tickCount=6))
    colour: Any = alt.value(_MAIN)
    if colours := layer_colours([bar.layer for bar in bars if bar.layer is not None]):
        scale = alt.Scale(domain=list(colours), range=list(colours.values()))
        colour = alt.Color("layer:O", title="layer", scale=scale, legend=alt.Legend(symbolType="square"))
    chart = _chart([{**bar._asdict(), "exact": _or_none(bar.exact), "kind": exact_title} for bar in shown])
    layers = [chart.mark_bar(height=11).encode(x=x, y=y, color=colour)]
    if any(_or_none(bar.exact) is not None for bar in shown):
        upright = "M-0.2,-1.2H0.2V1.2H-0.2Z"
        legend = alt.Legend(symbolType=upright, symbolFillColor=_INK, symbolStrokeWidth=0, symbolOpacity=1)
        kind = alt.Opacity("kind:N", title=None, scale=alt.Scale(range=[1, 1]), legend=legend)
        ticks = chart.transform_filter("isValid(datum.exact)").mark_tick(color=_INK, thickness=2.2, size=15)
        layers.append(ticks.encode(x="exact:Q", y=y, opacity=kind))
    return alt.layer(*layers).properties(width=400, height=alt.Step(18))


def strip_chart(groups: Sequence[Spread], *, x_title: str) -> Any:
    """Every value of each group as a dot, groups below one another, and over them the mean with its 95 % interval.

    Args:
        groups: names must differ; values that are not finite are left out.
        x_title: with the unit.
    """
    shown = [(each, [value for value in each.values if math.isfinite(value)]) for each in groups]
    shown = [(each, values) for each, values in shown if values]
    if not shown:
        return None
    import altair as alt

    axis = alt.Axis(ticks=False, labelPadding=6, domain=False, labelLimit=0)
    y = alt.Y("name:N", sort=[each.name for each, _ in shown], title=None, axis=axis)
    x = alt.X("x:Q", title=x_title, axis=alt.Axis(labelExpr=EXACT, tickCount=6))
    # Dots keep apart by the golden ratio, the same way whenever they are drawn.
    dots = [
        {"name": each.name, "x": value, "jitter": (n * 0.618034) % 1 * 20 - 10}
        for each, values in shown
        for n, value in enumerate(values)
    ]
    scale = alt.Scale(domain=[-26, 26], range=[26, -26])
    offset = alt.YOffset("jitter:Q", scale=scale)
    means = [{"name": s.name, "x": s.mean.value, "low": s.mean.low, "high": s.mean.high} for s, _ in shown]
    means = [{name: _or_none(v) if isinstance(v, float) else v for name, v in row.items()} for row in means]
    bars = _chart(means).encode(y=y)
    return alt.layer(
        _upright([0.0], alt.X("x:Q")),
        _chart(dots).mark_circle(color=_MAIN, opacity=0.35, size=26).encode(x=x, y=y, yOffset=offset),
        bars.mark_rule(color=_INK, strokeWidth=2.5).encode(x="low:Q", x2="high:Q"),
        bars.mark_point(color=_INK, fill=_INK, shape="diamond", size=90, opacity=1).encode(x="x:Q"),
    ).properties(width=400, height=alt.Step(52))


def heatmap(
    cells: Sequence[Cell],
    *,
    x_title: str,
    y_title: str,
    low_is_strong: bool = False,
    digits: int = 1,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Any:
    """Cells by row and column (layers × positions) with their values written in, tinted from weak to strong.

    Args:
        cells: those kept are tinted over their own range of values.
        x_title, y_title: of the columns and of the rows.
        low_is_strong: the lowest value has the strongest tint.
        digits: decimals of the values.
        rows, columns: names of the rows and columns by number (default: the numbers).
    """
    if not cells:
        return None
    import altair as alt

    kept = [cell.value for cell in cells if cell.kept and math.isfinite(cell.value)] or [0.0]
    weakest, strongest = (max(kept), min(kept)) if low_is_strong else (min(kept), max(kept))

    def tint(cell: Cell) -> float:
        """Opacity: none for what was dropped, else by how far it is from the weakest to the strongest."""
        tinted = cell.kept and math.isfinite(cell.value)
        return 0.06 + 0.42 * (cell.value - weakest) / ((strongest - weakest) or 1.0) if tinted else 0.0

    across, down = (f"{json.dumps(list(names))}[datum.value]" if names else EXACT for names in (columns, rows))
    bare: dict[str, Any] = {"domain": False, "ticks": False, "labelLimit": 0}
    # Names may be longer than the renderer leaves room for: their title goes on top of them.
    beside: dict[str, Any] = {"titleAngle": 0, "titleAlign": "right", "titleX": -6, "titleY": -10}
    axis = alt.Axis(labelExpr=across, labelAngle=-40 if columns else 0, orient="top", **bare)
    # The value itself stays out: JSON has no nan.
    texts = [{"text": measure(cell.value, digits), "tint": tint(cell)} for cell in cells]
    chart = _chart([cell._replace(value=0)._asdict() | text for cell, text in zip(cells, texts, strict=True)]).encode(
        x=alt.X("column:O", title=x_title, axis=axis),
        y=alt.Y("row:O", title=y_title, axis=alt.Axis(labelExpr=down, **bare, **(beside if rows else {}))),
    )
    text, dropped = chart.transform_filter("datum.kept"), chart.transform_filter("!datum.kept")
    return alt.layer(
        chart.mark_rect(color=_MAIN, strokeWidth=0).encode(opacity=alt.Opacity("tint:Q", scale=None)),
        chart.transform_filter("datum.chosen").mark_rect(fillOpacity=0, stroke=_INK, strokeWidth=2.5),
        text.mark_text(color=_INK, fontSize=11).encode(text="text:N"),
        dropped.mark_text(color=LIGHT["grey"], fontSize=11, fontStyle="italic").encode(text="text:N"),
    ).properties(width=alt.Step(52), height=alt.Step(22))


def scatter(series: Sequence[Series], *, x_title: str, y_title: str) -> Any:
    """Points of one quantity found in two ways, and the line on which both agree; points that are not finite are left
    out."""
    known, styles = _drawable(series, ())
    if not known:
        return None
    import altair as alt

    found = [end for each in known for point in each.points for end in (point.x, point.y)]
    ends = [min(*found, 0.0), max(*found, 0.0)]
    scale = alt.Scale(domain=ends, nice=True)
    axis = alt.Axis(labelExpr=EXACT, tickCount=5)
    x, y = alt.X("x:Q", title=x_title, scale=scale, axis=axis), alt.Y("y:Q", title=y_title, scale=scale, axis=axis)
    agree = _chart([{"x": end, "y": end} for end in ends]).mark_line(color=LIGHT["faint"], strokeDash=[3, 3])
    layers = [agree.encode(x=x, y=y)]
    for each in reversed(known):
        layers += _marks(each, styles[each.name], x, y)
    layers.append(_legend({each.name: styles[each.name] for each in known}))
    return alt.layer(*layers).properties(width=300, height=300)


def graph_chart(nodes: Sequence[Node], links: Sequence[Link], *, most: int = 4) -> Any:
    """A graph of one prompt: its tokens from left to right, layers from below to above. Only tokens and layers that
    have a node are drawn, and of each node's incoming edges the `most` strongest: as wide as their shares of the
    strongest, dashed where the weight is negative."""
    if not links:
        return None
    import altair as alt

    levels = sorted({node.layer for node in nodes})
    spots, columns = _graph_places(nodes, levels)
    by_target: dict[str, list[Link]] = {}
    for link in sorted(links, key=lambda each: -abs(each.weight)):
        by_target.setdefault(link.target, []).append(link)
    lines = [
        {
            **dict(zip(("x", "y", "x2", "y2"), (*spots[link.source], *spots[link.target]), strict=True)),
            "width": 0.3 + 2.7 * abs(link.weight / into[0].weight),
            "sign": "raises" if link.weight > 0 else "lowers",
        }
        for into in by_target.values()
        for link in into[:most]
    ]
    names = {n: "tokens" if n < 0 else "logits" if n == levels[-1] else f"layer {n}" for n in levels}
    rows = {float(n): names[level] for n, level in enumerate(levels)}

    def axis(labels: Mapping[float, str], angle: int) -> Any:
        texts = json.dumps({f"{place:g}": text for place, text in labels.items()})
        expr = f"({texts})[format(datum.value, '~g')]"
        return alt.Axis(labelExpr=expr, values=list(labels), labelAngle=angle, labelOverlap=False, grid=False)

    def scale(labels: Mapping[float, str]) -> Any:
        return alt.Scale(domain=[min(labels) - 1.2, max(labels) + 1.2], nice=False)

    x = alt.X("x:Q", title=None, scale=scale(columns), axis=axis(columns, -40))
    y = alt.Y("y:Q", title=None, scale=alt.Scale(domain=[-0.4, len(levels) - 0.4]), axis=axis(rows, 0))
    styles = series_styles(sorted({node.kind for node in nodes}))
    dots = [{"x": spots[n.name][0], "y": spots[n.name][1], "kind": n.kind, "label": n.label} for n in nodes]
    known = alt.Scale(domain=list(styles), range=[style.colour for style in styles.values()])
    kind = alt.Color("kind:N", title=None, scale=known)
    dash = alt.StrokeDash("sign:N", title=None, scale=alt.Scale(domain=["raises", "lowers"], range=[[1, 0], [4, 3]]))
    width = alt.StrokeWidth("width:Q", scale=None)
    edges = _chart(lines).mark_rule(color=LIGHT["grey"], opacity=0.7)
    inner = _chart([dot for dot in dots if dot["kind"] != "token"])
    return alt.layer(
        edges.encode(x=x, y=y, x2="x2:Q", y2="y2:Q", strokeWidth=width, strokeDash=dash),
        _chart(dots).mark_circle(size=90, opacity=1).encode(x=x, y=y, color=kind),
        inner.mark_text(color=_INK, fontSize=8, dy=-9).encode(x=x, y=y, text="label:N"),
    ).properties(width=max(300, 30 * (max(columns) - min(columns) + 2)), height=48 * len(levels))


def _graph_places(
    nodes: Sequence[Node], levels: Sequence[int]
) -> tuple[dict[str, tuple[float, float]], dict[float, str]]:
    """Where each node stands, nodes of one cell side by side; and place → token of each column."""
    cells: dict[tuple[int, int], list[str]] = {}
    for node in nodes:
        cells.setdefault((node.position, node.layer), []).append(node.name)
    tokens = {node.position: token_text(node.token) for node in nodes}
    columns, at = {}, 0.0
    centre: dict[int, float] = {}
    for position in sorted(tokens):
        span = max(1.5, *(float(len(cell)) for (place, _), cell in cells.items() if place == position))
        centre[position] = at + span / 2
        columns[centre[position]] = tokens[position]
        at += span
    spots = {
        name: (centre[position] + n - (len(cell) - 1) / 2, float(levels.index(layer)))
        for (position, layer), cell in cells.items()
        for n, name in enumerate(cell)
    }
    return spots, columns


def _chart(rows: list[dict[str, Any]]) -> Any:
    import altair as alt

    return alt.Chart(alt.InlineData(values=rows))


def _or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _drawable(series: Sequence[Series], order: Sequence[str]) -> tuple[list[Series], dict[str, Style]]:
    """The series with the points that can be drawn, those without any left out; and everyone's style."""
    finite = (
        each._replace(points=tuple(p for p in each.points if math.isfinite(p.x) and math.isfinite(p.y)))
        for each in series
    )
    return [each for each in finite if each.points], series_styles([*order, *(each.name for each in series)])


def _y_axis(series: Sequence[Series], title: str, share: bool, more: Iterable[float] = ()) -> Any:
    import altair as alt

    if share:
        axis = alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1])
        return alt.Y("y:Q", title=title, scale=alt.Scale(domain=[0, 1]), axis=axis)
    points = [point for each in series for point in each.points]
    ends = [0.0, *more, *(end for p in points for end in (p.y, p.low, p.high) if math.isfinite(end))]
    scale = alt.Scale(domain=[min(ends), max(ends)], nice=True)
    return alt.Y("y:Q", title=title, scale=scale, axis=alt.Axis(labelExpr=EXACT, tickCount=5))


def _upright(guides: Sequence[float], x: Any) -> Any:
    return _chart([{"x": each} for each in guides]).mark_rule(color=LIGHT["faint"], strokeDash=[3, 3]).encode(x=x)


def _rows(series: Series) -> Any:
    rows = [{**point._asdict(), "order": n} for n, point in enumerate(series.points)]
    return _chart([{name: _or_none(value) for name, value in row.items()} for row in rows])


def _band(series: Series, style: Style, x: Any) -> Any:
    """The 95 % interval along a line; at a single point, an upright bar."""
    chart = _rows(series).transform_filter("isValid(datum.low) && isValid(datum.high)")
    band = chart.mark_area(color=style.colour, opacity=0.16)
    if len(series.points) == 1:
        band = chart.mark_rule(color=style.colour, opacity=0.6, strokeWidth=1.5)
    return band.encode(x=x, y="low:Q", y2="high:Q")


def _marks(series: Series, style: Style, x: Any, y: Any) -> list[Any]:
    """The line of a series, its marks, and a ring around what was chosen."""
    chart, colour = _rows(series).encode(x=x, y=y), style.colour
    chosen = chart.transform_filter("datum.chosen")
    layers = [
        chart.mark_point(color=colour, fill=colour, shape=style.mark, size=70, strokeWidth=0.5, opacity=1),
        chosen.mark_point(color=colour, size=300, strokeWidth=1.6, opacity=1, filled=False),
    ]
    if series.join == "none":
        return layers
    # Between two points nothing better than the cheaper one is known: a step, not a slope.
    shape = "step-after" if series.join == "step" else "linear"
    line = chart.mark_line(interpolate=shape, strokeWidth=2, opacity=0.9, **style.stroke)
    return [line.encode(order="order:Q"), *layers]


def _legend(styles: Mapping[str, Style]) -> Any:
    """An empty layer whose legend shows each name's line and mark."""
    import altair as alt

    def look(channel: Any, values: Iterable[Any]) -> Any:
        return channel("name:N", scale=alt.Scale(domain=list(styles), range=list(values)), legend=legend)

    legend = alt.Legend(title=None, **THEME["legend"])
    colours = [style.colour for style in styles.values()]
    return (
        _chart([{"name": name} for name in styles])
        .mark_point(opacity=0, size=0)
        .encode(
            color=look(alt.Color, colours),
            fill=look(alt.Fill, colours),
            # One path holds the line and, on it, the mark.
            shape=look(alt.Shape, ("M-2.4,0H2.4" + style.mark for style in styles.values())),
            strokeDash=look(alt.StrokeDash, (list(style.dash) for style in styles.values())),
        )
    )
