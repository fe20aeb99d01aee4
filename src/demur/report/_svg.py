"""The looks of `templates/theme.toml`, and charts as inline SVG: no script, no network, text that prints.

Charts are drawn with the light colours, so that they look right by themselves; in the SVG each becomes the CSS variable
of its name, so that one drawing serves light and dark.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib.resources import files
from typing import Any, Final

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
