"""Where the command line writes. Nothing is read as markup: prompts and messages hold square brackets."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

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


def complain(message: str, kind: str = "error") -> None:
    """`kind: message` on standard error, the message exactly as it is."""
    from rich.text import Text

    console(stderr=True).print(Text.assemble((f"{kind}: ", _STYLES.get(kind, "")), message), soft_wrap=True)


__all__ = ["complain", "console", "note", "say"]
