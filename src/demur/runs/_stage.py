"""One stage of a run: a folder named after the hash of everything that its results depend on."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, TypeVar, cast, get_args, get_origin, runtime_checkable

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from demur import __version__
from demur.errors import RunError
from demur.runs._files import LineWriter, complete_lines, remove_temporaries, write_text, write_whole
from demur.runs._json import JSON, hash_of, to_json, without_secrets

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = object  # torch is imported only where tensors are read or written.

STAGE_FORMAT = 2
"""Part of every key: raised when the files of a stage change their meaning, so that old ones are not read."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_DONE = "done"
_ABOUT = "stage.json"
_META = "demur"

Kind = TypeVar("Kind")
KindOf: TypeAlias = type[Kind] | GenericAlias
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


@lru_cache
def key_versions() -> Mapping[str, str]:
    """The versions that are part of every key: demur's major and minor number, torch's and transformers' in full.

    Another version of these may compute other numbers, so results of the one are not taken for results of the other.
    """
    found = {"demur": ".".join(__version__.split(".")[:2])}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # A copy of the sources without an installation.
            found[package] = "none"
    return found


def stage_key(name: str, depends: object, versions: Mapping[str, str] | None = None) -> str:
    """SHA-256, hex, of a stage's name, format, versions and dependencies as canonical JSON; secrets do not count.

    Args:
        name: of the stage.
        depends: JSON data.
        versions: of the packages that compute the results; `key_versions()` when not given.

    Raises:
        RunError: something in `depends` has no JSON form.
    """
    plain = without_secrets(to_json(depends, f"{name}: depends"))
    used = dict(key_versions() if versions is None else versions)
    return hash_of({"stage": name, "format": STAGE_FORMAT, "versions": used, "depends": plain})


class StageFolder:
    """What a stage has stored, for reading.

    A value stands in `NAME.json`, a list or rows in `NAME.jsonl`, a value with tensors in `NAME.safetensors`.
    """

    def __init__(self, folder: Path, name: str, key: str) -> None:
        self.folder = folder
        self.name = name
        self.key = key
        self._remedy = f"Remove the folder {folder} and run again to compute this stage anew"

    @property
    def done(self) -> bool:
        """The stage was finished: its files are whole and will not change."""
        return (self.folder / _DONE).is_file()

    def load(self, name: str, kind: KindOf[Kind]) -> Kind:
        """The value of type `kind` that `save` stored under `name`: equal to what it was.

        Raises:
            RunError: there is none, or the file does not hold a `kind`.
        """
        if get_origin(kind) is list:
            self._existing(f"{name}.jsonl")
            return cast("Kind", self.rows(name, get_args(kind)[0]))
        if not _has_tensors(kind):
            path = self._existing(f"{name}.json")
            return self._parse(path, kind, path.read_bytes())
        path = self._existing(f"{name}.safetensors")
        tensors, metadata = _read_tensors(path)
        try:
            return cast("Any", kind).from_parts(tensors, json.loads(metadata[_META]))
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(f"{path}: not a {kind.__name__}: {error}. {self._remedy}") from error

    def rows(self, name: str, kind: KindOf[Kind]) -> list[Kind]:
        """The rows of type `kind` appended under `name`, in order; none when nothing was appended.

        A torn last line, left by a kill, is not given; in a finished stage it is an error.

        Raises:
            RunError: a line does not hold a `kind`; names file and line.
        """
        path = self.folder / f"{_checked(name)}.jsonl"
        if not path.is_file():
            return []
        found: list[Kind] = []
        size = 0
        for number, line in enumerate(complete_lines(path), start=1):
            found.append(self._parse(path, kind, line, f", line {number}"))
            size += len(line)
        if self.done and size < path.stat().st_size:
            raise RunError(f"{path}, line {len(found) + 1} is cut off. {self._remedy}")
        return found

    def _parse(self, path: Path, kind: KindOf[Kind], data: bytes, where: str = "") -> Kind:
        try:
            return _adapter(kind).validate_json(data)
        except ValidationError as error:
            why, name = error.errors()[0]["msg"], getattr(kind, "__name__", str(kind))
            raise RunError(f"{path}{where}: not a {name}: {why}. {self._remedy}") from error

    def _existing(self, filename: str) -> Path:
        path = self.folder / _checked(filename)
        if not path.is_file():
            raise RunError(f"{path} does not exist. {self._remedy}")
        return path


class Stage(StageFolder):
    """A stage of the run that this process holds. What it stores is on disk before the call returns."""

    def __init__(self, folder: Path, name: str, key: str) -> None:
        super().__init__(folder, name, key)
        self._writers: dict[str, LineWriter] = {}

    @classmethod
    def open(cls, stages: Path, name: str, depends: Mapping[str, object]) -> Stage:
        """The stage's folder under `stages`, made if it is new. Called by `Run.stage`."""
        key = stage_key(_checked(name), depends)
        stage = cls(stages / f"{name}-{key[:12]}", name, key)
        about = stage.folder / _ABOUT
        try:
            stage.folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(stage.folder)
            known: Any = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
        except (OSError, ValueError) as error:
            raise RunError(f"{stage.folder} cannot be used: {error}. {stage._remedy}") from error
        if known is None:
            content: dict[str, Any] = {
                "name": name,
                "key": key,
                "format": STAGE_FORMAT,
                "versions": dict(key_versions()),
            }
            content["depends"] = without_secrets(to_json(depends))
            write_text(about, json.dumps(content, indent=1, ensure_ascii=False))
        elif known.get("key") != key:
            raise RunError(f"{about} belongs to another stage (key {known.get('key')}). {stage._remedy}")
        return stage

    def save(self, name: str, value: object) -> None:
        """Store under `name`, whole or not at all: a `Codec`, a list (each item on a line), or any other value that
        pydantic can write as JSON."""
        if isinstance(value, list):
            text = b"".join(_dumped(each) + b"\n" for each in cast("list[object]", value)).decode()
            write_text(self._target(f"{name}.jsonl"), text)
        elif not isinstance(value, Codec):
            write_text(self._target(f"{name}.json"), _dumped(value).decode())
        else:
            tensors, meta = value.to_parts()
            torch_format: Any = importlib.import_module("safetensors.torch")
            # Cloned: safetensors stores no tensors that share memory, and would store all of a slice's.
            ready = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
            metadata = {_META: json.dumps(meta)}
            target = self._target(f"{name}.safetensors")
            write_whole(target, lambda path: torch_format.save_file(ready, path, metadata=metadata))

    def append(self, name: str, row: object) -> None:
        """Add one row under `name`. A torn last line, left by a kill, is cut off first."""
        path = self._target(f"{name}.jsonl")
        self._writers.setdefault(name, LineWriter(path)).append(_dumped(row))

    def finish(self) -> None:
        """Mark the stage as finished: from now on it is only read."""
        self.close()
        write_text(self._target(_DONE), datetime.now(UTC).isoformat(timespec="seconds") + "\n")

    def close(self) -> None:
        """Flush and close the files of rows."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _target(self, filename: str) -> Path:
        path = self.folder / _checked(filename)
        if self.done:
            raise RunError(f"{path} cannot be written: the stage {self.name} is finished")
        return path


def _has_tensors(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Codec)


@lru_cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def _dumped(value: object) -> bytes:
    return pydantic_core.to_json(value, inf_nan_mode="constants")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RunError(f"{name!r} cannot be the name of a stage or its file; use a-z, 0-9, '_', '-' and '.'")
    return name


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safetensors: Any = importlib.import_module("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged: {error}. Remove {path.parent} and run again") from error
