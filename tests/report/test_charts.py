"""Charts: what is drawn of the data, in the page's colours, and what is left out."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from demur.report.charts import (
    Bar,
    Cell,
    Link,
    Node,
    Point,
    Series,
    Spread,
    bar_chart,
    graph_chart,
    heatmap,
    layer_colours,
    line_chart,
    scatter,
    scatter_lines,
    series_styles,
    strip_chart,
    to_svg,
)
from demur.stats import Estimate, wilson

NAN = math.nan


def texts(chart: Any, name: str = "chart") -> set[str]:
    """Every text of the drawing, which must be well-formed."""
    return {element.text or "" for element in ElementTree.fromstring(to_svg(chart, name)).iter() if element.text}


def two_lines(**options: Any) -> Any:
    main = Series("F*", tuple(Point.of(x, wilson(k, 100)) for x, k in ((1.0, 95), (0.25, 60), (-0.125, 20))))
    control = Series("random", (Point(1.0, 0.95), Point(-0.125, 0.9, chosen=True), Point(0.25, NAN)))
    return line_chart([main, control], x_title="scale factor c", y_title="refused", **options)


def test_a_line_chart_names_its_series_and_writes_every_strength_with_its_digits() -> None:
    drawn = texts(two_lines(rules={"clean": 0.95, "unknown": NAN}))
    assert {"F*", "random", "clean", "scale factor c", "refused", "1", "0.25", "−0.125", "0%", "100%"} <= drawn
    assert "unknown" not in drawn


def test_larger_values_of_a_reversed_axis_are_on_the_left() -> None:
    def places(chart: Any) -> dict[str, float]:
        drawing = to_svg(chart, "chart")
        found = re.findall(r'translate\(([\d.]+),[\d.]+\)"[^>]*>(1|0\.25|−0\.125)</text>', drawing)
        return {label: float(x) for x, label in found}

    forward, reverse = places(two_lines()), places(two_lines(reverse=True))
    assert forward["−0.125"] < forward["0.25"] < forward["1"]
    assert reverse["−0.125"] > reverse["0.25"] > reverse["1"]


def test_the_drawing_uses_variables_of_the_page_and_keeps_its_ids_apart() -> None:
    chart = two_lines(rules={"clean": 0.95})
    drawing = to_svg(chart, "first")
    assert {"var(--s0)", "var(--s1)", "var(--grey)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", drawing))
    assert not re.search(r'="#[0-9a-f]{6}"', drawing)
    assert all(name.startswith("first-") for name in re.findall(r'\bid="([^"]+)"', drawing))
    assert "<script" not in drawing


def test_a_chart_by_itself_has_colours_that_any_viewer_knows() -> None:
    assert "var(--" not in two_lines().to_json()


def test_nothing_to_draw_is_none() -> None:
    empty = [Series("F*", ()), Series("AP", (Point(1.0, NAN), Point(math.inf, 0.5)))]
    assert line_chart(empty, x_title="x", y_title="y", rules={"clean": 0.5}) is None
    assert scatter_lines(empty, x_title="x", y_title="y") is None
    assert bar_chart([Bar("a", NAN)], x_title="x") is None
    assert heatmap([], x_title="x", y_title="y") is None
    assert scatter(empty, x_title="x", y_title="y") is None
    assert graph_chart([Node("a", "a", "token", -1, 0, "a")], []) is None


def test_a_name_looks_the_same_in_every_chart_of_one_order() -> None:
    styles = series_styles(("F*", "AP", "random"))
    assert len({style.mark for style in styles.values()}) == len({style.dash for style in styles.values()}) == 3
    assert series_styles(("F*", "AP", "random", "new"))["random"] == styles["random"]
    alone = scatter_lines(
        [Series("random", (Point(0.1, 0.5),))], x_title="x", y_title="y", order=("F*", "AP", "random")
    )
    assert "var(--s2)" in to_svg(alone, "chart")
    assert "var(--s0)" not in to_svg(alone, "chart")


def test_ten_series_differ_in_colour_mark_and_dash() -> None:
    styles = list(series_styles([f"method {n}" for n in range(10)]).values())
    for part in ("colour", "mark", "dash"):
        assert len({getattr(style, part) for style in styles}) == 10


def test_a_trade_off_has_room_for_small_large_and_negative_side_effects() -> None:
    series = [Series("F*", (Point(-0.002, 0.1), Point(0.004, 0.5, chosen=True), Point(4.0, 0.9)))]
    drawn = texts(scatter_lines(series, x_title="ΔCE", y_title="complied with", guides=(0.03, 50.0)))
    assert {"0", "0.03", "0.1", "1", "ΔCE"} <= drawn
    # No tick where it would run into that of the guide, and no guide beyond the data.
    assert not {"0.02", "50"} & drawn


def test_a_measure_that_is_no_share_has_an_axis_from_zero_over_its_intervals() -> None:
    points = tuple(Point.of(x, Estimate(value=0.2, low=0.1, high=0.41, n=9)) for x in (1, 2))
    chart = line_chart([Series("F*", points)], x_title="features", y_title="ΔCE", share=False, x_scale="log")
    assert {"0", "0.2", "0.4", "1", "2"} <= texts(chart)


def test_bars_keep_their_order_colour_and_exact_ticks() -> None:
    bars = [Bar(f"{n}:7", 1.0 - n / 4, n % 2, 0.9 if n < 2 else NAN) for n in range(5)]
    drawing = to_svg(bar_chart(bars, x_title="effect", exact_title="l'exact", limit=4), "bars")
    assert re.findall(r">(\d:7)<", drawing) == ["0:7", "1:7", "2:7", "3:7"]
    assert {"layer", "l'exact"} <= texts(bar_chart(bars, x_title="effect", exact_title="l'exact"))
    for colour in layer_colours([0, 1]).values():
        # Two bars and the swatch of the legend.
        assert drawing.count(f'fill="{colour}"') == 3


def test_bars_without_exact_values_have_no_legend_of_ticks() -> None:
    assert "exact patching" not in texts(bar_chart([Bar("a", 1.0)], x_title="effect"))


def test_layer_colours_follow_depth_from_one_end_to_the_other() -> None:
    assert layer_colours([9, 3, 3, 5]) == {3: "#5e4b9c", 5: "#2a958c", 9: "#d3a029"}
    assert layer_colours([7]) == {7: "#5e4b9c"}
    assert layer_colours([]) == {}


@pytest.mark.parametrize(("low_is_strong", "strongest"), [(False, 3.0), (True, 1.0)])
def test_a_heat_map_tints_the_kept_cells_from_weak_to_strong(low_is_strong: bool, strongest: float) -> None:
    cells = [Cell(4, -2, 1.0), Cell(4, -1, 2.0, chosen=True), Cell(5, -2, 3.0), Cell(6, -1, -9.0, kept=False)]
    chart = heatmap(cells, x_title="position", y_title="layer", low_is_strong=low_is_strong)
    (rows,) = chart.to_dict()["datasets"].values()
    tints = {row["text"]: row["tint"] for row in rows}
    assert max(tints, key=lambda text: tints[text]) == f"{strongest:.1f}"
    assert tints["2.0"] == pytest.approx((tints["1.0"] + tints["3.0"]) / 2)
    assert tints["−9.0"] == 0
    assert {"−9.0", "1.0", "2.0", "3.0", "position", "layer", "−2", "−1", "4", "5", "6"} <= texts(chart)


def test_a_heat_map_names_its_rows_and_columns() -> None:
    cells = [Cell(0, 1, 1.0), Cell(1, 0, 2.0)]
    chart = heatmap(
        cells, x_title="prompts", y_title="features", rows=['3:17 "harm"', "0:4"], columns=["fraud", "theft"]
    )
    assert {'3:17 "harm"', "0:4", "fraud", "theft"} <= texts(chart)


def test_a_heat_map_of_equal_unknown_or_no_kept_cells_is_drawn() -> None:
    for kept in (True, False):
        cells = [Cell(0, -2, 1.0, kept=kept), Cell(0, -1, 1.0, kept=kept), Cell(1, -1, NAN)]
        assert {"1.0", "–"} <= texts(heatmap(cells, x_title="position", y_title="layer"))


def layers(chart: Any) -> list[dict[str, Any]]:
    """The layers of a drawing, each with its own data."""
    made = chart.to_dict()
    known = made.get("datasets", {})
    return [layer | {"data": {"values": known.get(layer["data"].get("name"))}} for layer in made["layer"]]


def test_a_scatter_has_one_scale_for_both_axes_and_a_line_where_both_agree() -> None:
    chart = scatter([Series("edges", (Point(-1.0, 3.0), Point(2.0, NAN)), "none")], x_title="guess", y_title="truth")
    agree, marks, *_ = layers(chart)
    assert agree["data"]["values"] == [{"x": -1.0, "y": -1.0}, {"x": 3.0, "y": 3.0}]
    assert [(row["x"], row["y"]) for row in marks["data"]["values"]] == [(-1.0, 3.0)]
    assert marks["encoding"]["x"]["scale"]["domain"] == marks["encoding"]["y"]["scale"]["domain"] == [-1.0, 3.0]
    assert {"guess", "truth", "edges"} <= texts(chart)


def small_graph(*, most: int = 4) -> Any:
    """Two tokens, two features side by side above the second one, and a logit."""
    nodes = [
        Node("t0", "a", "token", -1, 0, "a"),
        Node("t7", "b\n", "token", -1, 7, "b\n"),
        Node("f", "3:1", "harm", 3, 7, "b\n"),
        Node("g", "3:2", "refusal", 3, 7, "b\n"),
        Node("l", "I", "logit", 8, 7, "b\n"),
    ]
    links = [Link("t0", "f", 2.0), Link("t7", "f", -4.0), Link("f", "l", 1.0), Link("g", "l", 3.0)]
    return graph_chart(nodes, links, most=most)


def test_a_graph_stands_its_nodes_by_token_and_layer_and_dashes_what_lowers() -> None:
    assert {"a", "b\\n", "tokens", "layer 3", "logits", "3:1", "3:2", "I", "raises", "lowers"} <= texts(small_graph())
    lines, dots, *_ = (layer["data"]["values"] for layer in layers(small_graph())[:3])
    places = {dot["label"]: (dot["x"], dot["y"]) for dot in dots}
    assert [places[label][1] for label in ("a", "3:1", "3:2", "I")] == [0, 1, 1, 2]
    assert places["3:1"][0] + 1 == places["3:2"][0]
    assert places["3:1"][0] + places["3:2"][0] == 2 * places["I"][0] == 2 * places["b\n"][0]
    found = {(line["x"], line["y"], line["x2"], line["y2"]): (line["width"], line["sign"]) for line in lines}
    assert found[(*places["b\n"], *places["3:1"])] == (3.0, "lowers")
    assert found[(*places["a"], *places["3:1"])] == (pytest.approx(1.65), "raises")
    assert len(layers(small_graph(most=1))[0]["data"]["values"]) == 2


def test_a_strip_has_a_dot_for_each_known_value_and_its_mean() -> None:
    mean = Estimate(value=0.25, low=0.1, high=0.4, n=2)
    chart = strip_chart([Spread("a", (0.1, 0.4, math.nan), mean), Spread("b", (math.nan,), mean)], x_title="drop")
    drawn = chart.to_dict()
    parts = [*drawn.get("datasets", {}).values(), *(layer["data"].get("values", []) for layer in drawn["layer"])]
    rows = [row for part in parts for row in part]
    assert [row["x"] for row in rows if "jitter" in row] == [0.1, 0.4]
    assert [row for row in rows if "low" in row] == [{"name": "a", "x": 0.25, "low": 0.1, "high": 0.4}]
    assert {"drop", "a"} <= texts(chart)
    assert strip_chart([Spread("b", (math.nan,), mean)], x_title="drop") is None
