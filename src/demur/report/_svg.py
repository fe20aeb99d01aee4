"""Charts as inline SVG: no script, no network, text that prints.

The colours of the page are declared here once. Charts are drawn with the light ones, so that they look right by
themselves; in the SVG each becomes the CSS variable of its name, so that one drawing serves light and dark.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple


class Colour(NamedTuple):
    """A colour of the page by its CSS variable, without the dashes, and its values on light and dark ground."""

    name: str
    light: str
    dark: str


INK: Final = "#1c1e22"
GREY: Final = "#6b7079"
FAINT: Final = "#9a9fa8"
RULE: Final = "#dfe0dc"

PAGE_COLOURS: Final = (
    Colour("paper", "#fdfdfb", "#15171b"),
    Colour("card", "#f5f5f1", "#1e2126"),
    Colour("ink", INK, "#e8e8e4"),
    Colour("soft", "#565b64", "#a9aeb7"),
    Colour("accent", "#0a65a7", "#61b1ed"),
    Colour("warn-bg", "#fff5dc", "#2c2512"),
    Colour("warn-edge", "#c98a00", "#d9a300"),
    Colour("danger-edge", "#b4442e", "#e0765c"),
    Colour("grey", GREY, "#a1a6af"),
    Colour("faint", FAINT, "#6f757f"),
    Colour("rule", RULE, "#32363d"),
)

PALETTE: Final = (
    Colour("s0", "#0b66a8", "#62b2ee"),
    Colour("s1", "#c04a00", "#ff8d4d"),
    Colour("s2", "#00775a", "#3fc79f"),
    Colour("s3", "#7d3fb0", "#c39af0"),
    Colour("s4", "#8f6d00", "#d9b23c"),
    Colour("s5", "#b0306f", "#f08bbb"),
    Colour("s6", "#5b6472", "#b4bac4"),
    Colour("s7", "#8a3324", "#e8836f"),
    Colour("s8", "#4f6f00", "#a6cc4c"),
    Colour("s9", "#26282d", "#f0efe9"),
)
"""Colours of series, in the order in which they are given out."""

FONT: Final = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"

EXACT: Final = "replace(format(datum.value, '~g'), '-', '−')"
"""Labels that hold their tick's own digits. An axis's number format is cut to what it takes to tell even steps apart,
which would write 0.25 as 0.3."""

_VARIABLES: Final = {colour.light: f"var(--{colour.name})" for colour in (*PAGE_COLOURS, *PALETTE)}


def colour_rules() -> str:
    """The colours as CSS variables: light, and dark where the reader's system asks for it."""
    colours = (*PAGE_COLOURS, *PALETTE)
    light = " ".join(f"--{colour.name}: {colour.light};" for colour in colours)
    dark = " ".join(f"--{colour.name}: {colour.dark};" for colour in colours)
    return f".demur {{ {light} }}\n@media (prefers-color-scheme: dark) {{ .demur {{ {dark} }} }}\n"


def to_svg(chart: Any, name: str) -> str:
    """An altair chart as an `<svg>` element, in the page's colours, without script.

    `name` keeps its ids apart from those of other charts on the page.
    """
    import altair as alt
    import vl_convert

    styled = chart.configure(
        background="transparent",
        font=FONT,
        padding=4,
        view=alt.ViewConfig(stroke=None),
        legend=alt.LegendConfig(labelColor=INK, titleColor=INK, labelFontSize=12, titleFontSize=12),
        axis=alt.AxisConfig(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            gridColor=RULE,
            domainColor=FAINT,
            tickColor=FAINT,
            titlePadding=9,
        ),
    )
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
