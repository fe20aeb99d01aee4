"""Lines of a text file, read as they are asked for: unzipped, decoded, with errors that name file, line and byte."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from demur.errors import InputError


def kind_of(path: Path) -> str:
    """The format that the name tells, such as ".jsonl": the suffix in lower case, of a zipped file the one before."""
    suffix = path.suffix.casefold()
    return Path(path.stem).suffix.casefold() if suffix == ".gz" else suffix


def lines_of(path: Path) -> Iterator[str]:
    """The lines with their ends, read as they are asked for. A byte-order mark is dropped.

    Raises:
        InputError: the file cannot be read or unzipped, or is not UTF-8.
    """
    offset = 0
    try:
        with gzip.open(path) if path.suffix.casefold() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _decoded(path, raw, number, offset)
                offset += len(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} cannot be unzipped: {error}; is the download complete?") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(path: Path, raw: bytes, number: int, offset: int) -> str:
    start = 0
    if number == 1:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{path} is UTF-16, at line 1, byte 0; save it as UTF-8")
        start = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        return raw[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = start + error.start
        raise InputError(
            f"{path} is not UTF-8: line {number}, byte {offset + place} of the file is 0x{raw[place]:02x}; "
            "save it as UTF-8"
        ) from error


__all__ = ["kind_of", "lines_of"]
