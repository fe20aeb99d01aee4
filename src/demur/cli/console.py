"""Where the command line writes. Nothing is read as markup: prompts and messages hold square brackets.

`PATH` is what an option whose value is a path takes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from rich.console import Console

PATH: Final[dict[str, Any]] = {"type": click.Path(path_type=Path), "metavar": "PATH"}
PLAIN_WIDTH: Final = 120
"""Columns of tables where the output is not a terminal, unless COLUMNS says otherwise."""

_STYLES: Final = {"error": "bold red", "warning": "yellow", "stopped": "bold yellow"}


def console(*, stderr: bool = False) -> Console:
    """Standard output for results, standard error for everything else."""
    from rich.console import Console

    found = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = PLAIN_WIDTH
    return found


def say(text: str) -> None:
    """One line of result, never wrapped, so that paths can be copied and piped."""
    console().print(text, soft_wrap=True)


def note(text: str) -> None:
    """One line beside the result."""
    console(stderr=True).print(text, soft_wrap=True)


def complain(message: str, kind: str = "error", to: Console | None = None) -> None:
    """`kind: message` on standard error, or another console, the message exactly as it is."""
    from rich.text import Text

    (to or console(stderr=True)).print(Text.assemble((f"{kind}: ", _STYLES.get(kind, "")), message), soft_wrap=True)


class Warnings(logging.Handler):
    """Prints what is logged on standard error, or another console."""

    def __init__(self, to: Console | None = None) -> None:
        super().__init__(logging.WARNING)
        self._to = to

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage(), record.levelname.lower(), self._to)


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Hand what demur logs to `handler` while the context is open."""
    logger = logging.getLogger("demur")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
