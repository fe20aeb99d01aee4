"""Pages as HTML: one self-contained file, everything escaped, nothing fetched, no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count, groupby
from typing import Any, Final, NamedTuple

from demur.report._svg import TEMPLATES, colour_rules, to_svg
from demur.report.blocks import Block, Chart, Page, Table

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
    bar: tuple[float, ...] = ()


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


def template(name: str, *, autoescape: bool, **filters: Callable[..., Any]) -> Any:
    """One of the templates with these filters; a name that it does not know is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader, strict = PackageLoader("demur.report", "templates"), StrictUndefined
    found: Any = Environment(
        loader=loader, autoescape=autoescape, undefined=strict, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(filters)
    return found.get_template(name)


def _render(pages: Sequence[Page], *, fragment: bool) -> str:
    from markupsafe import Markup

    from demur import __version__

    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    # In a notebook the rules must not reach beyond the fragment.
    css = colour_rules() + (f".demur-notebook {{\n{css}}}\n" if fragment else css)
    charts = (f"c{number}" for number in count())
    seen: set[str] = set()
    views: list[dict[str, Any]] = []
    for number, page in enumerate(pages):
        # Studies of one folder warn of the same.
        warnings = [warning for warning in page.warnings if warning not in seen]
        seen.update(warnings)
        sections = [(f"p{number}-s{n}", each, list(_parts(each.blocks, charts))) for n, each in enumerate(page.body)]
        views.append({"page": page, "id": f"p{number}", "warnings": warnings, "sections": sections})
    return template("report.html.j2", autoescape=True, cells=_cells).render(
        views=views, fragment=fragment, css=Markup(css), notice=HARMFUL_NOTICE, version=__version__
    )


def _parts(blocks: Sequence[Block], names: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """The kind and the content of what a section holds; charts that follow one another stand side by side."""
    from markupsafe import Markup

    for kind, alike in groupby(blocks, key=type):
        if kind is Chart:
            drawn = [(chart, chart.draw()) for chart in alike if isinstance(chart, Chart)]
            yield "charts", [(chart, Markup(to_svg(d, next(names)))) for chart, d in drawn if d is not None]
        else:
            yield from ((kind.__name__.lower(), block) for block in alike)


def _cells(table: Table) -> tuple[list[list[_Cell]], list[bool]]:
    """A table's cells by row, and which columns are right-aligned: numeric ones without bars."""
    bars = len(table.columns) <= BARS
    rows = [[_cell(text, bars=bars) for text in row] for row in table.rows]
    barred = [any(row[place].bar for row in rows) for place in range(len(table.columns))]
    return rows, [column.numeric and not bar for column, bar in zip(table.columns, barred, strict=True)]


def _cell(text: str, *, bars: bool) -> _Cell:
    parts = _INTERVAL.fullmatch(text)
    if parts is None:
        return _Cell(text)
    rate = _RATE.fullmatch(text) if bars else None
    # On a line that is 150 units long.
    bar = tuple(sorted(1.5 * float(number) for number in rate.groups())) if rate else ()
    return _Cell(text, parts[1], parts[2], bar)


__all__ = ["HARMFUL_NOTICE", "notebook_html", "render_html", "template"]
