"""Progress of long jobs: bars with remaining time on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from demur.cli.console import Warnings, logging_to


class StageProgress:
    """Called with (stage, done, total); use as a context manager. Warnings are printed above the bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: tuple[str, TaskID] | None = None
        self._started = time.perf_counter()
        self._total = 0
        self._open = ExitStack()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        hidden = not console.is_terminal
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._stage is None or self._stage[0] != stage:
            self._end()
            self._stage = stage, self._bars.add_task(stage, total=total)
        self._bars.update(self._stage[1], completed=done, total=total)
        self._total = total
        if done >= total:
            self._end()

    def __enter__(self) -> Self:
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
