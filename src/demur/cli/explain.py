"""Explain one prompt with the features that a study found in the run folder RUN: why it is answered or refused.

Its tokens coloured by harm and refusal features, P(refuse) and the outcome, which features are suppressed, which words
matter, and what restoring the features does. The page is written beside the run's report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from demur.cli.console import PATH, StageProgress, console, say
from demur.cli.show import FULL, RUN, print_pages

_PLAIN: Final = "The same request put plainly, to compare with."
_OUT: Final = "Page to write (default: explain-HASH.html in the run folder); .md gives Markdown."


@click.command(help=__doc__)
@RUN
@click.argument("prompt")
@click.option("--plain", metavar="TEXT", help=_PLAIN)
@click.option("--out", **PATH, help=_OUT)
@click.option("--full", is_flag=True, help=FULL)
def command(run: Path, prompt: str, plain: str | None, out: Path | None, full: bool) -> None:
    from demur.studies.explain import explain, file_stem

    with StageProgress(console(stderr=True)) as progress:
        found = explain(run, prompt, plain, progress=progress)
    print_pages([found.page()], full=full)
    say(f"page: {found.save_report(out or run / f'{file_stem(prompt, plain)}.html')}")
