"""Pages from templates: as one self-contained HTML file, everything escaped, nothing fetched, no script; as
GitHub-flavoured Markdown; and either as a file."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

from demur.errors import RunError
from demur.report.blocks import Block, Chart, Page, Table
from demur.report.charts import TEMPLATES, colour_rules, to_svg

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
    """One HTML page for the results of one or more studies; it needs no network and runs no script. Verdicts and
    warnings come first, answers to harmful prompts are collapsed behind a notice. Raises ValueError: no page is
    given."""
    return _render(pages, fragment=False)


def notebook_html(page: Page) -> str:
    """A page as a fragment for a notebook: the brief sections, the others folded."""
    return _render([page], fragment=True)


def render_markdown(pages: Sequence[Page]) -> str:
    """The results of one or more studies as Markdown; charts are named, not drawn. Raises ValueError: no page is
    given."""
    filters = {"line": _line, "paragraphs": _paragraphs, "fenced": _fenced, "kind": lambda block: type(block).__name__}
    return _filled("report.md.j2", pages, filters).rstrip("\n") + "\n"


def write_report(pages: Sequence[Page], path: Path) -> Path:
    """Write one report of one or more results: Markdown if `path` ends in `.md`, else HTML; returns its path. In a
    folder the report is called `report.html`. The file appears whole or not at all. Raises RunError: the file cannot be
    written; ValueError: no page is given."""
    path = path / "report.html" if path.is_dir() else path
    text = render_markdown(pages) if path.suffix == ".md" else render_html(pages)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise RunError(f"cannot write the report to {path}: {why}; name another place with --out") from error
    return path


def _filled(name: str, pages: Sequence[Any], filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template filled in; a name that it does not know is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not pages:
        raise ValueError("nothing to report: give at least one page")
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    loader = PackageLoader("demur.report", "templates")
    environment: Any = Environment(loader=loader, autoescape=name.endswith(".html.j2"), **options)
    environment.filters.update(filters)
    return environment.get_template(name).render(pages=pages, notice=HARMFUL_NOTICE, **values)


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
    values = {"fragment": fragment, "css": Markup(css), "version": __version__}
    return _filled("report.html.j2", views, {"cells": _cells}, **values)


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


def _fenced(text: str, kind: str = "") -> str:
    """Text as it is, in a fence longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def _line(text: str) -> str:
    """Text within a line or a cell."""
    return re.sub(r"\s*\n\s*", "<br>", _inline(text.strip()))


def _paragraphs(text: str) -> str:
    """Text by itself, in which no line begins a list, a heading or a rule."""
    plain = re.sub(r"^(\s*)([#+-])", r"\1\\\2", _inline(text), flags=re.MULTILINE)
    return re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", plain, flags=re.MULTILINE)


def _inline(text: str) -> str:
    """Text that Markdown and HTML take literally."""
    plain = re.sub(r"([\\`*_|~])", r"\\\1", html.escape(text, quote=False))
    # Brackets only make a link where one of these follows.
    return re.sub(r"\](?=[(\[:])", r"\\]", plain)
