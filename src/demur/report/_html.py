"""Pages as HTML: one self-contained file, everything escaped, nothing fetched, no script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from demur.report._svg import colour_rules, to_svg
from demur.report.blocks import Block, Chart, Page, Section, Table, Text, Transcripts

if TYPE_CHECKING:
    from jinja2 import Template

HARMFUL_NOTICE: Final = (
    "Harmful prompts and what the model answered: click to read. They ask for harm, and some answers were written with "
    "refusal switched off. They are here as evidence of cause, not as advice; do not pass them on."
)

BARS: Final = 8
"""A table of more columns than this shows its rates without their little bars, which would make it too wide."""

_INTERVAL: Final = re.compile(r"(.+?) (\[[^\[\]]+\])")
_RATE: Final = re.compile(r"[<>]?(\d+)% \[(\d+)–(\d+)\]")


class _Cell(NamedTuple):
    """A cell; a number with an interval is split, and a rate also has the ends and the middle of its bar."""

    text: str
    value: str = ""
    interval: str = ""
    bar: tuple[float, float, float] | None = None


def render_html(pages: Sequence[Page]) -> str:
    """One HTML page for the results of one or more studies; it needs no network and runs no script.

    Verdicts and warnings come first, answers to harmful prompts are collapsed behind a notice.

    Raises:
        ValueError: no page is given.
    """
    if not pages:
        raise ValueError("nothing to report: give at least one page")
    return _render(pages, fragment=False)


def notebook_html(page: Page) -> str:
    """A page as a fragment for a notebook: the brief sections, the others folded."""
    return _render([page], fragment=True)


def _render(pages: Sequence[Page], *, fragment: bool) -> str:
    from markupsafe import Markup

    from demur import __version__

    css = files("demur.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    # In a notebook the rules must not reach beyond the fragment.
    css = colour_rules() + (f".demur-notebook {{\n{css}}}\n" if fragment else css)
    numbers = count(1)
    seen: set[str] = set()
    views: list[dict[str, Any]] = []
    for page in pages:
        fresh = [warning for warning in page.warnings if warning not in seen]
        seen.update(fresh)
        sections = [_section_view(section, f"s{next(numbers)}", numbers) for section in page.body]
        views.append({**_fields(page), "id": f"p{next(numbers)}", "warnings": fresh, "sections": sections})
    return _template().render(
        pages=views, fragment=fragment, css=Markup(css), notice=HARMFUL_NOTICE, version=__version__
    )


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("demur.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _fields(page: Page) -> dict[str, Any]:
    return {name: getattr(page, name) for name in ("title", "verdicts", "facts", "command", "config")}


def _section_view(section: Section, name: str, numbers: Iterator[int]) -> dict[str, Any]:
    """A section as the template takes it; charts that follow one another stand side by side."""
    parts: list[dict[str, Any]] = []
    for block in section.blocks:
        part = _part(block, f"c{next(numbers)}", section.title)
        if part["kind"] == "charts" and parts and parts[-1]["kind"] == "charts":
            parts[-1]["charts"] += part["charts"]
        else:
            parts.append(part)
    return {"id": name, "title": section.title, "intro": section.intro, "brief": section.brief, "parts": parts}


def _part(block: Block, name: str, section: str) -> dict[str, Any]:
    """A block as the template takes it; a title that only repeats the section's is no heading."""
    from markupsafe import Markup

    match block:
        case Chart():
            drawn = block.draw()
            charts = [] if drawn is None else [(block.title, block.caption, Markup(to_svg(drawn, name)))]
            return {"kind": "charts", "charts": charts}
        case Table():
            heading = "" if block.title == section else block.title
            rows = _cells(block)
            right = [
                column.numeric and not any(row[place].bar for row in rows) for place, column in enumerate(block.columns)
            ]
            return {"kind": "table", "block": block, "heading": heading, "rows": rows, "right": right}
        case Text():
            return {"kind": "text", "block": block}
        case Transcripts():
            return {"kind": "transcripts", "block": block}


def _cells(table: Table) -> list[list[_Cell]]:
    bars = len(table.columns) <= BARS
    return [[_cell(text, bars=bars) for text in row] for row in table.rows]


def _cell(text: str, *, bars: bool) -> _Cell:
    parts = _INTERVAL.fullmatch(text)
    if parts is None:
        return _Cell(text)
    rate = _RATE.fullmatch(text) if bars else None
    if rate is None:
        return _Cell(text, parts[1], parts[2])
    # On a line that is 150 units long.
    low, value, high = sorted(1.5 * float(number) for number in rate.groups())
    return _Cell(text, parts[1], parts[2], (low, value, high))


__all__ = ["HARMFUL_NOTICE", "notebook_html", "render_html"]
