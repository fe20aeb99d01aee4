"""One stage of a run: a folder named after the hash of everything that its results depend on. Its files are whole or
absent, its lines survive a kill. JSON for hashing, TOML for showing, and what must never be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from types import GenericAlias
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Generic,
    Protocol,
    Self,
    TypeVar,
    cast,
    get_args,
    get_origin,
    runtime_checkable,
)

import pydantic_core
from pydantic import BaseModel, TypeAdapter, ValidationError

from demur import __version__
from demur.errors import RunError

if TYPE_CHECKING:
    from pydantic import JsonValue as JSON
    from torch import Tensor
else:
    JSON = Any  # Runtime type checkers cannot follow a type that holds itself.

TEMPORARY = ".tmp-"
"""Prefix of files that are being written; what a kill leaves of them is removed on the next opening."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: readers see all of it or nothing."""
    # A name of its own: another process that works on the same run may be writing the same file.
    temporary = path.with_name(f"{TEMPORARY}{token_hex(4)}-{path.name}")
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


def complete_lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """Each line from byte `start` on that ends in a newline, with it: a torn last line is not given."""
    with path.open("rb") as file:
        file.seek(start)
        yield from (line for line in file if line.endswith(b"\n"))


def open_lines(path: Path) -> IO[bytes]:
    """Open for appending, unbuffered, so that a kill can tear only the last line; one that is torn is cut off."""
    file = path.open("ab+", buffering=0)
    end, newline = file.seek(0, os.SEEK_END), -1
    while end and newline < 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        end = start + newline + 1
    file.truncate(end)
    return file


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
    """Plain JSON data; mappings and pydantic values become objects. RunError: something in `where` has no JSON form."""
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


_BLOCK = 2**16
"""Bytes that are read at once in search of the end of the last whole line."""

STAGE_FORMAT = 2
"""Part of every key: raised when the files of a stage change their meaning, so that old ones are not read."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_DONE, _ABOUT, _META = "done", "stage.json", "demur"

Kind = TypeVar("Kind")
KindOf = type[Kind] | GenericAlias
"""A class, or such as `list[Value]`."""


@runtime_checkable
class Codec(Protocol):
    """A frozen value that carries tensors and can be taken apart and put together again, equal."""

    def to_parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, JSON]]:
        """Tensors by name, and everything else as JSON."""
        ...

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> Self:
        """The value that `to_parts` took apart; tensors come on the CPU, in the dtype they had."""
        ...


def installed(*packages: str) -> dict[str, str]:
    """Package → version, of those that are installed."""
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@lru_cache
def key_versions() -> Mapping[str, str]:
    """The versions that are part of every key: demur's major and minor number, torch's and transformers' in full.
    Another version of these may compute other numbers, so results of the one are not taken for results of the other."""
    absent = {"torch": "none", "transformers": "none"}  # in a copy of the sources without an installation
    return {"demur": ".".join(__version__.split(".")[:2])} | absent | installed(*absent)


def stage_key(name: str, depends: object, versions: Mapping[str, str] | None = None) -> str:
    """SHA-256, hex, of a stage's name, format, versions (default: `key_versions()`) and dependencies as canonical JSON;
    secrets do not count. Raises RunError: something in `depends` has no JSON form."""
    plain = without_secrets(to_json(depends, f"{name}: depends"))
    used = dict(key_versions() if versions is None else versions)
    return hash_of({"stage": name, "format": STAGE_FORMAT, "versions": used, "depends": plain})


@dataclass(eq=False)
class StageFolder:
    """What a stage has stored, for reading. A value stands in `NAME.json`, a list or rows in `NAME.jsonl`, a value with
    tensors in `NAME.safetensors`."""

    folder: Path
    name: str
    key: str

    @property
    def done(self) -> bool:
        """The stage was finished: its files are whole and will not change."""
        return (self.folder / _DONE).is_file()

    @property
    def remedy(self) -> str:
        """What to do where a file of this stage is damaged."""
        return f"Remove the folder {self.folder} and run again to compute this stage anew"

    def load(self, name: str, kind: KindOf[Kind]) -> Kind:
        """The value of type `kind` that `save` stored under `name`: equal to what it was. Raises RunError: there is
        none, or the file does not hold a `kind`."""
        tensors = isinstance(kind, type) and issubclass(kind, Codec)
        ending = "jsonl" if get_origin(kind) is list else "safetensors" if tensors else "json"
        path = self.path(f"{name}.{ending}")
        if not path.is_file():
            raise RunError(f"{path} does not exist. {self.remedy}")
        if ending == "jsonl":
            return cast("Kind", self.rows(name, get_args(kind)[0]))
        return cast("Kind", self._tensors(path, kind) if tensors else self.parse(path, kind, path.read_bytes()))

    def rows(self, name: str, kind: KindOf[Kind]) -> list[Kind]:
        """The rows of type `kind` appended under `name`, in order. A torn last line, left by a kill, is not given; in a
        finished stage it is an error. Raises RunError: a line does not hold a `kind`; names file and line."""
        return RowReader(self, name, kind).new()

    def parse(self, path: Path, kind: KindOf[Kind], data: bytes, where: str = "") -> Kind:
        """A value of type `kind` from the JSON that stands at `where` in `path`. Raises RunError: it holds none."""
        try:
            return _adapter(kind).validate_json(data)
        except ValidationError as error:
            why, name = error.errors()[0]["msg"], getattr(kind, "__name__", str(kind))
            raise RunError(f"{path}{where}: not a {name}: {why}. {self.remedy}") from error

    def _tensors(self, path: Path, kind: Any) -> Any:
        safetensors: Any = import_module("safetensors")
        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return kind.from_parts(tensors, json.loads((file.metadata() or {})[_META]))
        except (safetensors.SafetensorError, OSError) as error:
            raise RunError(f"{path} is damaged: {error}. Remove {path.parent} and run again") from error
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(f"{path}: not a {kind.__name__}: {error}. {self.remedy}") from error

    def path(self, filename: str) -> Path:
        """A file of this stage."""
        return self.folder / _checked(filename)


@dataclass(eq=False)
class RowReader(Generic[Kind]):
    """The rows of a stage under one name, each given once; other processes may append to them meanwhile."""

    stage: StageFolder
    name: str
    kind: KindOf[Kind]
    _bytes: int = field(default=0, init=False)
    _lines: int = field(default=0, init=False)

    def new(self) -> list[Kind]:
        """The rows that this reader has not given yet, in order. Raises RunError: as `StageFolder.rows`."""
        stage, path = self.stage, self.stage.path(f"{self.name}.jsonl")
        done = stage.done  # Looked at first: a process that finishes the stage now may just have written its last rows.
        lines = list(complete_lines(path, self._bytes)) if path.is_file() else []
        read, before = self._bytes + sum(map(len, lines)), self._lines
        if done and path.is_file() and read < path.stat().st_size:
            raise RunError(f"{path}, line {before + len(lines) + 1} is cut off. {stage.remedy}")
        self._bytes, self._lines = read, before + len(lines)
        return [
            stage.parse(path, self.kind, line, f", line {number}")
            for number, line in enumerate(lines, start=before + 1)
        ]


@dataclass(eq=False)
class Stage(StageFolder):
    """A stage of the run that this process holds. What it stores is on disk before the call returns."""

    _files: dict[str, IO[bytes]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, stages: Path, name: str, depends: Mapping[str, object], *, alone: bool = True) -> Stage:
        """The stage's folder under `stages`, made if it is new. Called by `Run.stage`; `alone` says that no other
        process writes this run, so that what a killed one left can be removed."""
        key = stage_key(_checked(name), depends)
        stage = cls(stages / f"{name}-{key[:12]}", name, key)
        about = stage.folder / _ABOUT
        try:
            stage.folder.mkdir(parents=True, exist_ok=True)
            if alone:
                remove_temporaries(stage.folder)
            known: Any = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
        except (OSError, ValueError) as error:
            raise RunError(f"{stage.folder} cannot be used: {error}. {stage.remedy}") from error
        if known is None:
            content: dict[str, Any] = {"name": name, "key": key, "format": STAGE_FORMAT}
            content |= {"versions": dict(key_versions()), "depends": without_secrets(to_json(depends))}
            write_text(about, json.dumps(content, indent=1, ensure_ascii=False))
        elif known.get("key") != key:
            raise RunError(f"{about} belongs to another stage (key {known.get('key')}). {stage.remedy}")
        return stage

    def save(self, name: str, value: object) -> None:
        """Store under `name`, whole or not at all: a `Codec`, a list (each item on a line), or any other value that
        pydantic can write as JSON."""
        if isinstance(value, list):
            lines = (_dumped(each).decode() + "\n" for each in cast("list[object]", value))
            write_text(self._target(f"{name}.jsonl"), "".join(lines))
        elif not isinstance(value, Codec):
            write_text(self._target(f"{name}.json"), _dumped(value).decode())
        else:
            tensors, meta = value.to_parts()
            # Cloned: safetensors stores no tensors that share memory, and would store all of a slice's.
            ready = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
            target, save_file = self._target(f"{name}.safetensors"), import_module("safetensors.torch").save_file
            write_whole(target, lambda path: save_file(ready, path, metadata={_META: json.dumps(meta)}))

    def append(self, name: str, row: object) -> None:
        """Add one row under `name`. A torn last line, left by a kill or a full disk, is cut off first."""
        path, line = self._target(f"{name}.jsonl"), _dumped(row) + b"\n"
        try:
            if name not in self._files:
                self._files[name] = open_lines(path)
            if self._files[name].write(line) != len(line):
                raise OSError("only a part of the line was written (is the disk full?)")
        except OSError as error:
            self.close()
            raise cannot_write(path, error) from error

    def finish(self) -> None:
        """Mark the stage as finished: from now on it is only read."""
        self.close()
        write_text(self._target(_DONE), now() + "\n")

    def close(self) -> None:
        """Flush and close the files of rows."""
        while self._files:
            _, file = self._files.popitem()
            os.fsync(file.fileno())
            file.close()

    def _target(self, filename: str) -> Path:
        if self.done:
            raise RunError(f"{self.path(filename)} cannot be written: the stage {self.name} is finished")
        return self.path(filename)


@lru_cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def _dumped(value: object) -> bytes:
    return pydantic_core.to_json(value, inf_nan_mode="constants")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RunError(f"{name!r} cannot be the name of a stage or its file; use a-z, 0-9, '_', '-' and '.'")
    return name
