"""Parts of the pages of results that are made by hand: cells of tables, and the values that charts draw."""

from __future__ import annotations

from typing import Any

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
