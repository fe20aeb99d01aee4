"""Print the results in the run folder RUN, or how far an unfinished run is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from demur.cli.console import console, say
from demur.studies import STUDIES

if TYPE_CHECKING:
    from demur.report.blocks import Page

RUN = click.argument("run", type=click.Path(path_type=Path))


def pages(run: Path) -> list[Page]:
    """The pages of every finished study in a run folder.

    Raises:
        RunError: it holds none, or one that cannot be read.
    """
    from demur.studies.base import page_of, read_results

    return [page_of(*finished) for finished in read_results(run)]


def print_pages(shown: Sequence[Page], *, full: bool) -> None:
    """Pages on the terminal: verdict, doubts and one table, or everything."""
    from demur.report import render_terminal

    out = console()
    for page in shown:
        for part in render_terminal(page, full=full, width=out.width):
            out.print(part)


def write_pages(run: Path, out: Path | None = None) -> Path:
    """Write a run's report and return where it is."""
    from demur.report import write_report

    return write_report(pages(run), out or run / "report.html")


@click.command(help=__doc__)
@RUN
@click.option("--full", is_flag=True, help="Print all tables, not just the verdict and the main one.")
@click.option("--markdown", is_flag=True, help="Print everything as Markdown.")
def command(run: Path, full: bool, markdown: bool) -> None:
    from demur.studies.base import unfinished

    begun = unfinished(run)
    finished = any((run / f"{name}.json").is_file() for name in STUDIES)
    if finished or not begun:
        found = pages(run)
        if markdown:
            from demur.report import render_markdown

            click.echo(render_markdown(found))
            return
        print_pages(found, full=full)
    for name in begun:
        say(f"`demur {name}` has not finished in {run}; run the same command again to resume it.")
    if begun:
        _say_stages(run)


def _say_stages(run: Path) -> None:
    """One line a stage of the last command: how many are done, and how many begun."""
    from demur.runs import read_run

    states: dict[str, list[bool]] = {}
    for stage in read_run(run).stages():
        states.setdefault(stage.name, []).append(stage.done)
    for name, done in states.items():
        begun = len(done) - sum(done)
        say(f"  {name}: {sum(done)} done" + (f", {begun} begun" if begun else ""))


__all__ = ["RUN", "command", "pages", "print_pages", "write_pages"]
