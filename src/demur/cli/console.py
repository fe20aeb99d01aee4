"""Where the command line writes, and progress of long jobs. Nothing is read as markup: prompts and messages hold square
brackets. `PATH` is what an option whose value is a path takes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

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


class StageProgress:
    """Bars with remaining time on a terminal, one line a stage elsewhere. Called with (stage, done, total) and the
    figures that a stage has to tell, which elsewhere get a line at each tenth. Use as a context manager. Warnings are
    printed above the bar."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._stage: tuple[str, TaskID] | None = None
        self._started = time.perf_counter()
        self._total = 0
        self._first = self._done = 0
        self._open = ExitStack()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        hidden = not console.is_terminal
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden)

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None:
        if self._stage is None or self._stage[0] != stage:
            self._end()
            self._stage, self._first, self._done = (stage, self._bars.add_task(stage, total=total)), done, done
        self._bars.update(self._stage[1], completed=done, total=total, description=f"{stage}  {figures}".rstrip())
        self._total, before, self._done = total, self._done, done
        if figures and not self._console.is_terminal and 10 * done // total > 10 * before // total:
            spent, here = time.perf_counter() - self._started, done - self._first
            left = f"{spent * (total - done) / here:.0f} s left"
            self._console.print(f"{stage}: {done} of {total}, {left}; {figures}", soft_wrap=True)
        if done >= total:
            self._end()

    def __enter__(self) -> Self:
        if not self._console.is_terminal:
            # The bars of transformers and the hub cannot be redrawn in files and pipes.
            from transformers.utils import logging

            logging.disable_progress_bar()
        self._open.enter_context(logging_to(Warnings(self._console)))
        self._open.enter_context(self._bars)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end()
        self._open.close()

    def _end(self) -> None:
        """Leave one line of a stage that is over."""
        if self._stage is None:
            return
        name, task = self._stage
        self._bars.remove_task(task)
        now = time.perf_counter()
        self._console.print(f"{name}: {self._total}, {now - self._started:.1f} s", soft_wrap=True)
        # A stage's first report may come after its first batch, so its time runs from the end of the one before.
        self._stage, self._started = None, now
