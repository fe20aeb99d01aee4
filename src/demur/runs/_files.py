"""Files that are whole or absent, JSON Lines that survive a kill, and the lock on a run folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from filelock import BaseFileLock, FileLock, Timeout

from demur.errors import RunError

TEMPORARY = ".tmp-"
"""Prefix of files that are being written; what a kill leaves of them is removed on the next opening."""

LOCK_FILES = (".lock", ".writer")
"""The lock, and who holds it. (Two files: some systems cannot read a locked one.)"""


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: readers see all of it or nothing.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if sys.platform != "win32":  # Makes the rename survive a power cut; Windows has no such call.
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())

    write_whole(path, write)


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left. Only the holder of the run's lock may call this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def complete_lines(path: Path) -> Iterator[bytes]:
    """Each line that ends in a newline, with it: a torn last line is not given."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


class LineWriter:
    """Appends lines, each handed to the system before `append` returns: a kill can tear only the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def append(self, line: bytes) -> None:
        """Write one line, given without its newline.

        Raises:
            RunError: it cannot be written; what was written of it is dropped by the next `append`.
        """
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
                self._file.truncate(sum(map(len, complete_lines(self._path))))
            if self._file.write(line + b"\n") != len(line) + 1:
                raise OSError("only a part of the line was written (is the disk full?)")
        except OSError as error:
            self.close()
            raise RunError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Flush to disk and close."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def lock_folder(folder: Path) -> BaseFileLock:
    """Make the folder if it is not there, and take the right to write it, which ends with this process at the latest.

    Raises:
        RunError: another process holds it, or the folder cannot be written or locked.
    """
    path, writer = (folder / name for name in LOCK_FILES)
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        writer.write_text(f"process {os.getpid()}")
    except Timeout:
        holder = writer.read_text() if writer.is_file() else "another process"
        raise RunError(f"{folder} is being written by {holder}; wait, or choose another folder") from None
    except (OSError, NotImplementedError) as error:
        lock.release()
        why = getattr(error, "strerror", None) or error
        raise RunError(f"the run folder {folder} cannot be written: {why}; choose another with --out") from error
    return lock
