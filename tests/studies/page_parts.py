"""Parts of the pages of results that are made by hand: cells of tables, and the values that charts draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, cast
from unittest.mock import patch

from pydantic import BaseModel

from demur.errors import InputError
from demur.report import charts
from demur.report.blocks import Chart, Table
from demur.stats import Estimate
from demur.studies.base import StudyResult


def about(value: float, half: float = 0.05, n: int = 20) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def blocks(result: StudyResult, kind: type[Any], section: str | None = None) -> list[Any]:
    """The blocks of a kind on a result's page, or in one section."""
    page = result.page()
    return [b for s in page.sections if section in (None, s.title) for b in s.blocks if isinstance(b, kind)]


def cells(result: StudyResult, section: str, n: int = 0) -> list[tuple[str, ...]]:
    """The rows of a section's table `n`."""
    return list(blocks(result, Table, section)[n].rows)


def drawn(chart: Chart) -> list[dict[str, Any]]:
    """Every row of data that a chart draws."""
    made = chart.draw().to_dict()
    parts = [
        *made.get("datasets", {}).values(),
        *(la["data"].get("values", []) for la in made["layer"] if "data" in la),
    ]
    return [row for part in parts for row in part]


def points(chart: Chart, *names: str) -> set[tuple[Any, ...]]:
    """Values under these names, of the rows of data that have all of them."""
    return {
        tuple(round(row[n], 6) if isinstance(row[n], float) else row[n] for n in names)
        for row in drawn(chart)
        if all(n in row for n in names)
    }


def unshown(result: StudyResult) -> set[str]:
    """The fields of a result, as `Row.field`, of which no change changes its page: its text, its tables, or what is
    given to its charts.

    Every number, truth value and text is changed in turn, in some rows of each kind. A field counts as shown if one
    such change shows, or makes the page impossible: what it names is then looked up. What every page has is left out.
    """
    tried: Counter[str] = Counter()
    seen: set[str] = set()
    with _undrawn():
        plain = _shown(result)
        for name, changed in _changes(result, ""):
            if name not in seen and tried[name] < _TRIES:
                tried[name] += 1
                try:
                    noticed = _shown(changed) != plain
                except (KeyError, ValueError, StopIteration, InputError):
                    noticed = True
                seen |= {name} if noticed else set()
    page = {"facts", "model", "seconds", "study"}
    return {name for name in set(tried) - seen if name.rpartition(".")[2] not in page}


_TRIES = 12
_ROWS = 12


@contextmanager
def _undrawn() -> Iterator[None]:
    """Charts are what they are made from: drawing takes long, and has tests of its own."""

    def kept(name: str) -> Any:
        return lambda *given, **options: repr((name, given, options))

    with ExitStack() as stack:
        for name in ("line_chart", "scatter_lines", "bar_chart", "strip_chart", "heatmap", "scatter", "graph_chart"):
            stack.enter_context(patch.object(charts, name, kept(name)))
        yield


def _shown(result: StudyResult) -> list[Any]:
    return [
        (section.title, section.intro, [_drawing(b) if isinstance(b, Chart) else b for b in section.blocks])
        for section in result.page().sections
    ]


def _drawing(chart: Chart) -> tuple[Any, ...]:
    return chart.title, chart.caption, chart.draw()


def _changes(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A value with one of its parts changed, and the name of the field that holds the part."""
    if isinstance(value, Estimate):
        yield name, value.model_copy(update={"value": _moved(value.value)})
        yield name, value.model_copy(update={"low": _moved(value.low), "high": _moved(value.high)})
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            for inner, part in _changes(getattr(value, field), f"{type(value).__name__}.{field}"):
                yield inner, value.model_copy(update={field: part})
    elif isinstance(value, tuple):
        parts = cast("tuple[Any, ...]", value)
        for n, each in enumerate(parts[:_ROWS]):
            for inner, part in _changes(each, name):
                changed = (*parts[:n], part, *parts[n + 1 :])
                yield inner, type(parts)(*changed) if hasattr(parts, "_fields") else changed
    elif isinstance(value, dict):
        for key, each in list(cast("dict[Any, Any]", value).items())[:_ROWS]:
            for inner, part in _changes(each, name):
                yield inner, {**value, key: part}
    elif isinstance(value, bool):
        yield name, not value
    elif isinstance(value, int | float):
        yield name, _moved(value)
    elif isinstance(value, str) and not isinstance(value, Enum):
        yield name, f"{value} x"


def _moved(value: float) -> float:
    """Another number, far enough away to be written otherwise, as likely a share as before."""
    if isinstance(value, int):
        return value + 1
    return value - 0.37 if value > 0.5 else value + 0.37
