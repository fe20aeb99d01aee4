"""A run folder: what was asked, with what, and the stages that answer it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast, get_origin

from filelock import BaseFileLock, FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from demur.errors import RunError
from demur.runs._claims import Busy, Claims, held, remove_locks
from demur.runs._stage import (
    JSON,
    TEMPORARY,
    Kind,
    KindOf,
    RowReader,
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
from demur.types import Take, Value

MANIFEST = "manifest.json"
_LOCK_FILES = (".lock", ".writer")
"""The lock, and who holds it. (Two files: some systems cannot read a locked one.)"""
_PATIENCE = 10
"""Seconds that a process that joins waits for the one that leads to say what it does."""
_PACKAGES = "demur torch transformers tokenizers safetensors huggingface-hub numpy scipy sae-lens"

T = TypeVar("T")
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
    finished unless it raises. `counters`: name of a stage → what was found and made, each stage counted once.

    Several processes may work on one folder, each on the same configuration from beginning to end: every value and
    every batch of rows is computed by one of them, and read by all. One of them, the one that holds the lock, leads: it
    writes the manifest and the results.
    """

    folder: Path
    manifest: Manifest
    _lock: BaseFileLock | None
    """None where another process leads."""
    shared: bool = False
    """Other processes may work on this folder."""
    counters: dict[str, StageCount] = field(default_factory=dict, init=False)
    _counted: set[str] = field(default_factory=set, init=False)
    _stages: dict[str, Stage] = field(default_factory=dict, init=False)
    _waits: bool = field(default=True, init=False)
    """Whether to wait for what another process computes, or to do something else meanwhile (`each`)."""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        config: Mapping[str, object] | BaseModel,
        command: str = "study",
        seeds: Mapping[str, int] | None = None,
        shared: bool = False,
        join: bool = False,
    ) -> Run:
        """Take hold of a run folder, made if it is new, and record this session in its manifest. Stages of the same key
        are found as they were left, others get folders beside them. Raises RunError: the folder cannot be written,
        holds something else, or is in use by another process.

        Args:
            folder: the run folder.
            config: what the `command` of `demur` asks, as JSON data; secrets in it are not written.
            command: the command.
            seeds: purpose → seed.
            shared: other processes may join this one.
            join: where another process leads this very configuration, join it.
        """
        folder = Path(folder)
        plain = cast("dict[str, Any]", without_secrets(to_json(config, "config")))
        try:
            lock = _lock_folder(folder)
        except Timeout:
            holder = _holder(folder)
            if not join:
                raise RunError(f"{folder} is being written by {holder}; wait, or choose another folder") from None
            return cls(folder, _led(folder, command, hash_of(plain), holder), None, shared=True)
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
            run = cls(folder, Manifest(sessions=(*_earlier_sessions(folder), session)), lock, shared or join)
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
            with self.alone(stage):
                if not stage.done:  # Another process may have made it meanwhile.
                    tell(0, 1)
                    made = compute()
                    stage.save(name, list(cast("Iterable[object]", made)) if get_origin(kind) is list else made)
                    self._finish(stage)
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
        compute: Callable[[Take], Iterable[Iterable[Kind]]],
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
            compute: yields batches of rows, in any order. It is given a function that it calls with the keys of each
                batch, and leaves those out for which it gets False: they have rows, or another process computes them.
            key: a row's key; its `prompt_id` or `prompt.id` when not given.
            progress: called with the rows that there are and the rows wanted, at the start and after each batch.
        """
        stage = self.stage(name, depends)
        wanted, tell = frozenset(keys), progress or _silent
        rows = _Rows(stage, name, kind, key)
        found = len(wanted & rows.known.keys())
        if not (stage.done or wanted <= rows.known.keys()):
            tell(found, len(wanted))
            self._compute(stage, rows, wanted, compute, tell)
        if missing := sorted(wanted - rows.known.keys()):
            raise ValueError(f"stage {name}: {len(missing)} of {len(wanted)} keys got no row; one is {missing[0]!r}")
        if not stage.done:
            with self._held(stage, "rows"):
                self._finish(stage)
        self._count(stage, found, len(wanted) - found)
        rows.read()
        return [rows.known[each] for each in keys]

    def _compute(
        self,
        stage: Stage,
        rows: _Rows[Kind],
        wanted: frozenset[str],
        compute: Callable[[Take], Iterable[Iterable[Kind]]],
        tell: Progress,
    ) -> None:
        """Rows until all that are wanted are there, or nobody is left to make them."""
        claims = Claims(stage.folder, lambda batch: hash_of(list(batch))[:12]) if self.shared else None

        def take(batch: Sequence[str]) -> bool:
            if rows.known.keys() >= set(batch):
                return False
            if claims is None:
                return True
            if not claims.take(batch):
                return False
            rows.read()  # Another process may have had this batch until now.
            return not rows.known.keys() >= set(batch)

        def told() -> None:
            rows.read()
            tell(len(wanted & rows.known.keys()), len(wanted))

        try:
            while True:
                for batch in compute(take):
                    with self._held(stage, "rows"):
                        rows.append(batch)
                    told()
                if claims is None or wanted <= rows.known.keys():
                    return
                claims.release()
                if not claims.refused:
                    return
                if not self._waits:
                    raise Busy(stage.folder, claims.refused[0])
                claims.wait(told)
        finally:
            if claims is not None:
                claims.release()

    def alone(self, stage: Stage) -> contextlib.AbstractContextManager[None]:
        """While this is open, no other process of the run works on the stage: for what is computed in one piece, and
        for journals. What is stored there is to be read anew inside. Where the run is not shared this does nothing."""
        return self._held(stage, "all", wait=self._waits)

    def each(self, tasks: Iterable[Callable[[], T]]) -> list[T]:
        """What the tasks give, in their order. Processes that share the run share them out: each does those that no
        other one is at, and tries the rest again when the other one has made what they need."""
        asked = list(tasks)
        found: dict[int, T] = {}
        waits, self._waits = self._waits, not self.shared
        try:
            while len(found) < len(asked):
                before, busy = len(found), None
                for number in range(len(asked)):
                    if number not in found:
                        try:
                            found[number] = asked[number]()
                        except Busy as error:
                            busy = busy or error
                if busy is not None and len(found) == before:
                    if not waits:
                        raise busy
                    busy.wait()
        finally:
            self._waits = waits
        return [found[number] for number in range(len(asked))]

    @contextmanager
    def _held(self, stage: Stage, part: str, *, wait: bool = True) -> Iterator[None]:
        """Keep other processes of a shared run from a part of the stage."""
        if not self.shared:
            yield
            return
        with held(stage.folder, part, wait=wait):
            try:
                yield
            finally:
                stage.close()  # Opening anew cuts off the line that another process was writing when it was killed.

    def _finish(self, stage: Stage) -> None:
        if not stage.done:
            stage.finish()
        if self.shared:
            remove_locks(stage.folder)

    def _count(self, stage: Stage, found: int, made: int) -> None:
        if stage.key not in self._counted:
            self._counted.add(stage.key)
            before = self.counters.get(stage.name, StageCount(0, 0))
            self.counters[stage.name] = StageCount(before.found + found, before.made + made)

    def stage(self, name: str, depends: Mapping[str, object]) -> Stage:
        """The stage `name` for exactly these dependencies, new or as an earlier session left it: a journal that is read
        while it is written. Raises RunError: a dependency has no JSON form, or the folder cannot be written."""
        stage = Stage.open(self.folder / "stages", name, depends, alone=not self.shared)
        if stage.key in self._stages:
            return self._stages[stage.key]
        self._stages[stage.key] = stage
        ref = StageRef(name=name, key=stage.key, folder=f"stages/{stage.folder.name}")
        self._write(stages=(*self.manifest.latest.stages, ref))
        return stage

    def save_result(self, filename: str, text: str) -> Path:
        """Write a result at the top of the run folder, whole or not at all, and give its path. What the same command
        wrote there for another configuration stays: `study.json` as `study-HASH.json` (8 digits of `config_hash`). A
        process that has joined another one writes nothing."""
        path = self.folder / filename
        if self._lock is None:
            return path
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
        if self._lock is not None:
            write_text(self.folder / MANIFEST, self.manifest.model_dump_json(indent=1))

    def close(self, *, finished: bool = False) -> None:
        """Flush everything and give the folder up; `finished` says that all that was asked is done."""
        try:
            for stage in self._stages.values():
                stage.close()
            if finished:
                self._write(finished=now())
            if self.shared and self._lock is not None:
                for stage in self._stages.values():
                    remove_locks(stage.folder)
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finished=kind is None)


class _Rows(Generic[Kind]):
    """The rows of a stage by key, those that other processes append among them."""

    def __init__(self, stage: Stage, name: str, kind: KindOf[Kind], key: Callable[[Kind], str]) -> None:
        self.known: dict[str, Kind] = {}
        self._stage, self._name, self._key = stage, name, key
        self._reader = RowReader(stage, name, kind)
        self.read()

    def read(self) -> None:
        """Take in what is new in the file."""
        self.known |= {self._key(row): row for row in self._reader.new()}

    def append(self, batch: Iterable[Kind]) -> None:
        """Store the rows of a batch that are not there yet."""
        self.read()
        for row in batch:
            if self._key(row) not in self.known:
                self._stage.append(self._name, row)
                self.known[self._key(row)] = row


def _lock_folder(folder: Path) -> BaseFileLock:
    """Make the folder, if it is new, and take the right to lead, which ends with this process at the latest. Raises
    Timeout: another process has it; RunError: the folder cannot be written."""
    path, writer = (folder / name for name in _LOCK_FILES)
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        writer.write_text(f"process {os.getpid()}")
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        lock.release()
        why = getattr(error, "strerror", None) or error
        raise RunError(f"the run folder {folder} cannot be written: {why}; choose another with --out") from error
    return lock


def _holder(folder: Path) -> str:
    writer = folder / _LOCK_FILES[1]
    return writer.read_text() if writer.is_file() else "another process"


def _led(folder: Path, command: str, config_hash: str, holder: str) -> Manifest:
    """The manifest of the run that another process leads. Raises RunError: it does something else."""
    for _ in range(_PATIENCE):
        with contextlib.suppress(RunError):
            manifest = read_run(folder).manifest
            latest = manifest.latest
            if (latest.command, latest.config_hash, latest.finished) == (command, config_hash, None):
                return manifest
        time.sleep(1.0)  # It takes the lock before it writes what it is about to do.
    raise RunError(
        f"{folder} is being written by {holder}, which runs another command or configuration; give every process the "
        "same one, or choose another folder"
    )


def _earlier_sessions(folder: Path) -> tuple[Session, ...]:
    """The sessions of the run that `folder` holds; none for an empty folder."""
    remove_temporaries(folder)
    if (folder / MANIFEST).exists():
        return read_run(folder).manifest.sessions
    others = [p.name for p in folder.iterdir() if p.name not in _LOCK_FILES and not p.name.startswith(TEMPORARY)]
    if others:
        raise RunError(f"{folder} holds {others[0]!r} but no run; choose an empty or new folder with --out")
    return ()
