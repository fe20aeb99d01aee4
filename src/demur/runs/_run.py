"""A run folder: what was asked, with what, and the stages that answer it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast, get_origin

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from demur.errors import RunError
from demur.runs._stage import (
    JSON,
    TEMPORARY,
    Kind,
    KindOf,
    Stage,
    StageFolder,
    hash_of,
    installed,
    now,
    remove_temporaries,
    to_json,
    without_secrets,
    write_text,
)
from demur.types import Value

MANIFEST = "manifest.json"
_LOCK_FILES = (".lock", ".writer")
"""The lock, and who holds it. (Two files: some systems cannot read a locked one.)"""
_PACKAGES = "demur torch transformers tokenizers safetensors huggingface-hub numpy scipy sae-lens"

Progress = Callable[[int, int], None]
"""`(done, total)`."""


def _silent(done: int, total: int) -> None: ...


class StageRef(Value):
    """One stage that a session used; `folder` is relative to the run folder."""

    name: str
    key: str
    folder: str


class Session(Value):
    """One time that a `command` of `demur` was run on this folder.

    `config` is what was asked, `inputs` maps a prompt set, say, to the hash of its content, `identities` the model and
    the SAEs to source, revision and hashes, `versions` packages to those installed. Times are UTC, ISO 8601; `finished`
    stays None after an interruption. `files` are its results at the top of the folder. Secrets are blotted out.
    """

    config: dict[str, Any]
    command: str = "study"
    config_hash: str
    inputs: dict[str, str] = Field(default_factory=dict)
    identities: dict[str, Any] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    started: str
    finished: str | None = None
    python: str
    platform: str
    versions: dict[str, str]
    stages: tuple[StageRef, ...] = ()
    files: tuple[str, ...] = ()


class Manifest(Value):
    """`manifest.json`: every session on the folder, oldest first."""

    format: int = 1
    sessions: tuple[Session, ...] = Field(min_length=1)

    @property
    def latest(self) -> Session:
        return self.sessions[-1]


@dataclass(frozen=True)
class RunView:
    """A run folder for reading: no lock, nothing written."""

    folder: Path
    manifest: Manifest

    def stages(self, name: str | None = None) -> list[StageFolder]:
        """The stages of the latest session (those called `name`, when given), in the order of first use."""
        refs = (ref for ref in self.manifest.latest.stages if name in (None, ref.name))
        return [StageFolder(self.folder / ref.folder, ref.name, ref.key) for ref in refs]


def read_run(folder: str | Path) -> RunView:
    """Open a run folder for reading, also while another process writes it. Raises RunError: it holds no run, or its
    manifest is damaged."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise RunError(f"{folder} holds no run: there is no {MANIFEST} in it")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return RunView(folder, manifest)


class StageCount(NamedTuple):
    """How many values or rows a kind of stage had already, and how many this process computed."""

    found: int
    made: int


def _prompt_id(row: Any) -> str:
    return row.prompt_id if hasattr(row, "prompt_id") else row.prompt.id


@dataclass(eq=False)
class Run:
    """A run folder that this process writes, until `close` or the end of a `with` block, which marks the session as
    finished unless it raises. `counters`: name of a stage → what was found and made, each stage counted once."""

    folder: Path
    manifest: Manifest
    _lock: BaseFileLock
    counters: dict[str, StageCount] = field(default_factory=dict, init=False)
    _counted: set[str] = field(default_factory=set, init=False)
    _stages: dict[str, Stage] = field(default_factory=dict, init=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, object] | BaseModel,
        command: str = "study",
        seeds: Mapping[str, int] | None = None,
    ) -> Run:
        """Take hold of a run folder, made if it is new, and record this session in its manifest. Stages of the same key
        are found as they were left, others get folders beside them. `config` is what the `command` of `demur` asks, as
        JSON data; secrets in it are not written. `seeds`: purpose → seed. Raises RunError: the folder cannot be
        written, holds something else, or is in use by another process."""
        folder = Path(folder)
        plain = cast("dict[str, Any]", without_secrets(to_json(config, "config")))
        lock = _lock_folder(folder)
        try:
            session = Session(
                config=plain,
                command=command,
                config_hash=hash_of(plain),
                started=now(),
                python=platform.python_version(),
                platform=f"{platform.system()} {platform.machine()}",
                versions=installed(*_PACKAGES.split()),
                seeds=dict(seeds or {}),
            )
            run = cls(folder, Manifest(sessions=(*_earlier_sessions(folder), session)), lock)
            run._write()
        except BaseException:
            lock.release()
            raise
        return run

    def record(self, *, inputs: Mapping[str, str] | None = None, identities: Mapping[str, JSON] | None = None) -> None:
        """Add what became known after opening to this session's record; secrets are not written."""
        session = self.manifest.latest
        known = without_secrets(to_json({**session.identities, **(identities or {})}, "identities"))
        self._write(inputs={**session.inputs, **(inputs or {})}, identities=known)

    def cached(
        self,
        name: str,
        depends: Mapping[str, object],
        kind: KindOf[Kind],
        compute: Callable[[], Kind],
        *,
        progress: Progress | None = None,
    ) -> Kind:
        """A value that is computed once for each set of dependencies, and always read back from the run folder. Raises
        RunError: a dependency has no JSON form, the folder cannot be written, or what it holds is damaged.

        Args:
            name: of the stage: lower-case letters, digits, `_`, `-`.
            depends: all that the value depends on, as JSON data (but the versions of demur, torch and transformers).
            kind: a `Codec` (tensors), or what pydantic writes as JSON: a `Value`, `list[Value]`, `tuple[float, ...]`.
            compute: gives the value; only where there is none. `progress` gets 0 of 1 before, and 1 of 1 after it.
        """
        stage = self.stage(name, depends)
        found, tell = stage.done, progress or _silent
        if not found:
            tell(0, 1)
            made = compute()
            stage.save(name, list(cast("Iterable[object]", made)) if get_origin(kind) is list else made)
            stage.finish()
            tell(1, 1)
        value = stage.load(name, kind)
        size = len(cast("list[object]", value)) if isinstance(value, list) else 1
        self._count(stage, size * found, size * (not found))
        return value

    def mapped(
        self,
        name: str,
        depends: Mapping[str, object],
        kind: KindOf[Kind],
        keys: Sequence[str],
        compute: Callable[[frozenset[str]], Iterable[Iterable[Kind]]],
        *,
        key: Callable[[Kind], str] = _prompt_id,
        progress: Progress | None = None,
    ) -> list[Kind]:
        """One row for each key, in the order of `keys`; rows are stored as they come, and those stored are kept. Raises
        RunError: as in `cached`; ValueError: after computing, some key still has no row.

        Args:
            name: of the stage, as in `cached`.
            depends: all that the rows and the set of keys depend on, as in `cached`.
            kind: type of a row: what pydantic can read and write as JSON.
            keys: which rows, such as the prompts' ids.
            compute: given the keys that have a row, yields batches of rows for the others, in any order.
            key: a row's key; its `prompt_id` or `prompt.id` when not given.
            progress: called with the rows that there are and the rows wanted, at the start and after each batch.
        """
        stage = self.stage(name, depends)
        wanted = frozenset(keys)
        known = {key(row) for row in stage.rows(name, kind)}
        found, tell = len(wanted & known), progress or _silent
        if not (stage.done or wanted <= known):
            tell(found, len(wanted))
            for batch in compute(frozenset(known)):
                for row in batch:
                    if key(row) not in known:
                        stage.append(name, row)
                        known.add(key(row))
                tell(len(wanted & known), len(wanted))
        if missing := sorted(wanted - known):
            raise ValueError(f"stage {name}: {len(missing)} of {len(wanted)} keys got no row; one is {missing[0]!r}")
        if not stage.done:
            stage.finish()
        self._count(stage, found, len(wanted) - found)
        rows = {key(row): row for row in stage.rows(name, kind)}
        return [rows[each] for each in keys]

    def _count(self, stage: Stage, found: int, made: int) -> None:
        if stage.key not in self._counted:
            self._counted.add(stage.key)
            before = self.counters.get(stage.name, StageCount(0, 0))
            self.counters[stage.name] = StageCount(before.found + found, before.made + made)

    def stage(self, name: str, depends: Mapping[str, object]) -> Stage:
        """The stage `name` for exactly these dependencies, new or as an earlier session left it: a journal that is read
        while it is written. Raises RunError: a dependency has no JSON form, or the folder cannot be written."""
        stage = Stage.open(self.folder / "stages", name, depends)
        if stage.key in self._stages:
            return self._stages[stage.key]
        self._stages[stage.key] = stage
        ref = StageRef(name=name, key=stage.key, folder=f"stages/{stage.folder.name}")
        self._write(stages=(*self.manifest.latest.stages, ref))
        return stage

    def save_result(self, filename: str, text: str) -> Path:
        """Write a result at the top of the run folder, whole or not at all, and give its path. What the same command
        wrote there for another configuration stays: `study.json` as `study-HASH.json` (8 digits of `config_hash`)."""
        path = self.folder / filename
        latest = self.manifest.latest
        earlier = [s for s in self.manifest.sessions[:-1] if s.command == latest.command and filename in s.files]
        older = earlier[-1].config_hash if earlier else latest.config_hash
        if older != latest.config_hash and filename not in latest.files and path.is_file():
            path.replace(path.with_name(f"{path.stem}-{older[:8]}{path.suffix}"))
        write_text(path, text)
        self._write(files=tuple(dict.fromkeys((*latest.files, filename))))
        return path

    def _write(self, **changes: object) -> None:
        latest = self.manifest.latest.model_copy(update=changes)
        self.manifest = Manifest(sessions=(*self.manifest.sessions[:-1], latest))
        write_text(self.folder / MANIFEST, self.manifest.model_dump_json(indent=1))

    def close(self, *, finished: bool = False) -> None:
        """Flush everything and give the folder up; `finished` says that all that was asked is done."""
        try:
            for stage in self._stages.values():
                stage.close()
            if finished:
                self._write(finished=now())
        finally:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)


def _lock_folder(folder: Path) -> BaseFileLock:
    """Make the folder, if it is new, and take the right to write it, which ends with this process at the latest."""
    path, writer = (folder / name for name in _LOCK_FILES)
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


def _earlier_sessions(folder: Path) -> tuple[Session, ...]:
    """The sessions of the run that `folder` holds; none for an empty folder."""
    remove_temporaries(folder)
    if (folder / MANIFEST).exists():
        return read_run(folder).manifest.sessions
    others = [p.name for p in folder.iterdir() if p.name not in _LOCK_FILES and not p.name.startswith(TEMPORARY)]
    if others:
        raise RunError(f"{folder} holds {others[0]!r} but no run; choose an empty or new folder with --out")
    return ()
