"""Who computes what, where several processes work on one run folder: locks that end with the process that holds them,
so that what a killed process had begun is taken over by another one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

_POLL = 0.05
"""Seconds between two looks at what another process holds."""


class Busy(Exception):
    """Another process computes a part of a stage."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(part)
        self._lock = _lock(folder, part)

    def wait(self) -> None:
        """Return when the other process has given the part up."""
        with self._lock.acquire(poll_interval=_POLL):
            pass


@contextmanager
def held(folder: Path, part: str, *, wait: bool = True) -> Iterator[None]:
    """Hold a part of a stage's folder while the context is open. Raises Busy: another process holds it, and `wait` is
    False."""
    lock = _lock(folder, part)
    try:
        lock.acquire(timeout=-1 if wait else 0, poll_interval=_POLL)
    except Timeout:
        raise Busy(folder, part) from None
    try:
        yield
    finally:
        lock.release()


def remove_locks(folder: Path) -> None:
    """Remove the lock files of a stage that is finished. One who still waits for such a lock gets it, and finds
    the stage finished."""
    for path in folder.glob(".*.lock"):
        with contextlib.suppress(OSError):  # Windows keeps open files.
            path.unlink()


def _lock(folder: Path, part: str) -> BaseFileLock:
    return FileLock(folder / f".{part}.lock", thread_local=False)


@dataclass(eq=False)
class Claims:
    """Batches of one stage that this process takes and others leave to it, one batch at a time."""

    folder: Path
    name: Callable[[Sequence[str]], str]
    """What a batch with these keys is called."""
    _mine: BaseFileLock | None = field(default=None, init=False)
    refused: list[str] = field(default_factory=list[str], init=False)
    """Batches that another process had when they were asked for."""

    def take(self, keys: Sequence[str]) -> bool:
        """Take the batch, and give up the one before; False where another process has it."""
        self.release()
        part = self.name(keys)
        lock = _lock(self.folder, part)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.refused.append(part)
            return False
        self._mine = lock
        return True

    def release(self) -> None:
        """Give up the batch that was taken last."""
        if self._mine is not None:
            self._mine.release()
            self._mine = None

    def wait(self, tell: Callable[[], None]) -> None:
        """Return as soon as another process has given up one of the batches that were refused; `tell` is called
        meanwhile."""
        parts, self.refused = self.refused, []
        while parts:
            for part in parts:
                with contextlib.suppress(Busy), held(self.folder, part, wait=False):
                    return
            tell()
            time.sleep(_POLL)
