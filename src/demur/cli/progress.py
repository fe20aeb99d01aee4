"""Progress of long jobs: bars with remaining time on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Warnings(logging.Handler):
    """Prints log records above the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = Text.assemble((f"{record.levelname.lower()}: ", "yellow"), record.getMessage())
        self._console.print(line, soft_wrap=True)


class StageProgress:
    """Called with (stage, done, total); use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._started = time.perf_counter()
        self._total = 0
        self._task: TaskID | None = None
        self._warnings = _Warnings(console)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._end()
            self._stage, self._total = stage, total
            self._task = self._bars.add_task(stage, total=total)
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)
        self._total = total
        if done >= total:
            self._end()

    def __enter__(self) -> Self:
        logging.getLogger("demur").addHandler(self._warnings)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end()
        self._bars.stop()
        logging.getLogger("demur").removeHandler(self._warnings)

    def _end(self) -> None:
        """Leave one line of a stage that is over."""
        if self._stage is None:
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        now = time.perf_counter()
        self._console.print(f"{self._stage}: {self._total}, {now - self._started:.1f} s", soft_wrap=True)
        # A stage's first report may come after its first batch, so its time runs from the end of the one before.
        self._stage, self._task, self._started = None, None, now
