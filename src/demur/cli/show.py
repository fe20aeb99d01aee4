"""Print the results in the run folder RUN, or how far an unfinished run is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from demur.cli.console import console, say
from demur.studies import STUDIES

if TYPE_CHECKING:
    from demur.report.blocks import Page

RUN: Final = click.argument("run", type=click.Path(path_type=Path))
FULL: Final = "Print all tables, not just the verdict and the main one."


def pages(run: Path) -> list[Page]:
    """The pages of every finished study in a run folder. Raises RunError: it holds none, or one that cannot be read."""
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
@click.option("--full", is_flag=True, help=FULL)
@click.option("--markdown", is_flag=True, help="Print everything as Markdown.")
def command(run: Path, full: bool, markdown: bool) -> None:
    from demur.report import render_markdown
    from demur.runs import read_run
    from demur.studies.base import unfinished

    begun = unfinished(run)
    if not begun or any((run / f"{name}.json").is_file() for name in STUDIES):
        if markdown:
            click.echo(render_markdown(pages(run)))
            return
        print_pages(pages(run), full=full)
    for name in begun:
        say(f"`demur {name}` has not finished in {run}; run the same command again to resume it.")
    if not begun:
        return
    stages: dict[str, list[bool]] = {}
    for stage in read_run(run).stages():
        stages.setdefault(stage.name, []).append(stage.done)
    for name, done in stages.items():
        left = len(done) - sum(done)
        say(f"  {name}: {sum(done)} done" + (f", {left} begun" if left else ""))
