"""Write the report of the run folder RUN: one HTML page that needs no network."""

from __future__ import annotations

from pathlib import Path

import click

from demur.cli.console import say
from demur.cli.show import RUN, write_pages


@click.command(help=__doc__)
@RUN
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="File to write (default: report.html in the run folder); .md gives Markdown.",
)
def command(run: Path, out: Path | None) -> None:
    say(f"report: {write_pages(run, out)}")


__all__ = ["command"]
