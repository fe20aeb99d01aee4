"""Files that are whole or absent, JSON Lines that survive a kill, and the lock on a run folder; canonical JSON for
hashing, TOML for showing, and what must never be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel

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


if TYPE_CHECKING:
    from pydantic import JsonValue as JSON
else:
    JSON = Any  # Runtime type checkers cannot follow a type that holds itself.

HIDDEN = "(not recorded)"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SECRET_KEY = re.compile(
    r"^((hf|access|auth|api|bearer|hub|secret|private|id|refresh)_?)?token$"
    r"|(^|_)(api_?key|secret|secret_?key|private_?key|access_?key|password|passwd|credentials?|authorization)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{16})\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def to_json(value: object, where: str = "value") -> JSON:
    """Plain JSON data of mappings, sequences, strings, finite numbers and pydantic values. Raises RunError: something
    in it has no JSON form; `where` names the whole."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_plain))
    except (TypeError, ValueError) as error:
        raise RunError(f"{where} has no JSON form: {error}") from error


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(cast("Mapping[object, object]", value))
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def hash_of(value: object) -> str:
    """SHA-256, hex, of the canonical JSON: equal data have one text, keys sorted, no spaces."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_secrets(value: JSON) -> JSON:
    """`value` with tokens, keys and passwords blotted out, by the name of their key or by their form."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if item is not None and _SECRET_KEY.search(key) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return _SECRET_TEXT.sub(HIDDEN, value) if isinstance(value, str) else value


def as_toml(config: Mapping[str, Any]) -> str:
    """A configuration as TOML: top-level keys with inline values; None is left out, as TOML has no null."""
    return "".join(f"{entry}\n" for entry in _entries(config))


def _entries(table: Mapping[str, Any]) -> list[str]:
    names = {name: name if _BARE_KEY.fullmatch(name) else json.dumps(name) for name in table}
    return [f"{names[name]} = {_toml(value)}" for name, value in table.items() if value is not None]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_entries(cast('Mapping[str, Any]', value)))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, cast('list[Any]', value)))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()  # TOML spells numbers, inf and nan as Python does.
    # A JSON string is a TOML basic string but for U+007F, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
