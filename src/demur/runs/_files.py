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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: readers see all of it or nothing."""
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
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_bytes(text.encode()))


def cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be written: {error.strerror or error}")


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed writer left. Only the holder of the run's lock may call this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def complete_lines(path: Path) -> Iterator[bytes]:
    """Each line that ends in a newline, with it: a torn last line is not given."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def open_lines(path: Path) -> IO[bytes]:
    """Open for appending, unbuffered, so that a kill can tear only the last line; one that is torn is cut off."""
    file = path.open("ab", buffering=0)
    file.truncate(sum(map(len, complete_lines(path))))
    return file


def lock_folder(folder: Path) -> BaseFileLock:
    """Make the folder, if it is new, and take the right to write it, which ends with this process at the latest."""
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
