"""Write the report of the run folder RUN: one HTML page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from demur.cli.console import PATH, say
from demur.cli.show import RUN, write_pages

_OUT: Final = "File to write (default: report.html in the run folder); .md gives Markdown."


@click.command(help=__doc__)
@RUN
@click.option("--out", **PATH, help=_OUT)
def command(run: Path, out: Path | None) -> None:
    say(f"report: {write_pages(run, out)}")
