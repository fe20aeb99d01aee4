"""The files of local tasks of lm-evaluation-harness: found, checked and hashed without running any code of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from glob import glob, has_magic
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml

from demur.errors import InputError

_HASHED = 200 * 1024**2
"""Bytes; larger files are known by size and time of change."""
_YAML = (".yaml", ".yml")
_NOT_CONTENT = {"__pycache__", ".ipynb_checkpoints", ".git"}
"""Written by running a task or by looking at it."""
_READERS = {"json", "csv", "parquet", "text", "arrow", "pandas"}
"""Readers of `datasets` for local files; a `dataset_path` of any other name is a folder or a repository."""

Config = dict[str, Any]
"""A YAML file of the harness, as it is written."""


def local_path(task: str | Path) -> Path | None:
    """The file or folder that `task` means, `~` expanded; None for a name that the harness should know. Raises
    InputError: there is no such file or folder."""
    if isinstance(task, str) and "/" not in task and not task.endswith(_YAML):
        return None
    path = Path(task).expanduser().resolve()
    if not path.exists():
        raise InputError(f"there is no task file or folder {path}")
    return path


def task_identity(task: str | Path) -> dict[str, object]:
    """What the numbers of a task depend on beside the model, as JSON data. No code of a task is run. Raises InputError:
    there is no such file or folder.

    Returns:
        `harness`: the installed version or None. `task`: the name, or the last part of the path. For a path also
        `files`, name → content of the files beside it (for a group or folder, in subfolders too) but caches of data;
        and `elsewhere`, [name, content] of included files, modules and data in other places. Content is the SHA-256
        (hex), or size (bytes) and time of change (ns) of files that are larger than 200 MiB or cannot be read.
    """
    try:
        harness = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        harness = None
    path = local_path(task)
    if path is None:
        return {"harness": harness, "task": str(task)}
    # A group names tasks in all the folders below it.
    deep = path.is_dir() or is_group(path)
    folder = path if path.is_dir() else path.parent
    below = dict(_contents(folder, deep=deep))
    yamls = [each for each in below.values() if each.suffix in _YAML] if deep else [path]
    configs = dict(each for file in yamls for each in _readable(file))
    # A cache in the folder itself cannot be told from the task.
    caches = {Path(name).expanduser().resolve() for each in configs.values() for name in _option(each, "cache_dir")}
    files = {name: each for name, each in below.items() if not (caches - {folder}) & {*each.parents}}
    inside = {each.resolve() for each in files.values()}
    named = {place: name for file, config in configs.items() for name, place in _named(config, file.parent)}
    return {
        "harness": harness,
        "task": path.name,
        "files": {name: _content(each) for name, each in files.items()},
        "elsewhere": sorted([name, _content(place)] for place, name in named.items() if place not in inside),
    }


def check_data(path: Path) -> None:
    """Read a task's YAML file, and look whether the data files that it names are there. Raises OSError: one of them, or
    a file that it includes, is not there or cannot be read; ValueError: the text is not a YAML mapping."""
    config: Config = {}
    for _, each in _with_included(path):
        config |= each
    if config.get("dataset_path") not in _READERS or _option(config, "data_dir"):
        return
    for text in _option(config, "data_files"):
        remote = "://" in text or "::" in text
        if not remote and not has_magic(text) and not Path(text).expanduser().exists():
            raise FileNotFoundError(f"there is no data file {text} (paths are relative to the working directory)")


def _contents(folder: Path, *, deep: bool = True) -> Iterator[tuple[str, Path]]:
    """(name in the folder, file) of the files that were not written by running a task or by looking at it."""
    for file in sorted(folder.rglob("*") if deep else folder.iterdir()):
        name = file.relative_to(folder)
        if file.is_file() and file.suffix != ".lock" and not _NOT_CONTENT & {*name.parts}:
            yield name.as_posix(), file


def _content(file: Path) -> object:
    found = file.stat()
    if found.st_size <= _HASHED:
        try:
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError:
            pass  # a file beside the task that is not its own may be closed to this user
    return [found.st_size, found.st_mtime_ns]


def _named(config: Config, base: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every file that a YAML file names and that is there. Included files and modules are found from
    `base`, the YAML file's folder; data from the working directory."""
    folders = {*_texts(config.get("dataset_path")), *_option(config, "data_dir")} - _READERS
    patterns = {*filter(has_magic, _option(config, "data_files"))}
    for text in _texts(config):
        for match in sorted(glob(str(Path(text).expanduser()), recursive=True)) if text in patterns else [text]:
            for place in _places(match, base):
                if place.is_file():
                    yield match, place
                elif text in folders:
                    yield from ((f"{text}/{name}", file) for name, file in _contents(place))


def _places(text: str, base: Path) -> list[Path]:
    if "\n" in text or not text.strip():
        return []
    try:
        name = Path(text.removeprefix("file://")).expanduser()
        return [place.resolve() for place in (base / name, Path.cwd() / name) if place.exists()]
    except (OSError, RuntimeError, ValueError):  # a text that cannot be a path: too long, no such user
        return []


def _with_included(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, Config]]:
    """A YAML file behind those that it includes, whose values it overrides."""
    if path in above:
        raise ValueError(f"{path} includes itself")
    config, above = _read(path), (*above, path)
    included = [(path.parent / text).resolve() for text in _texts(config.get("include"))]
    return [*(each for file in included for each in _with_included(file, above)), (path, config)]


def _readable(path: Path) -> list[tuple[Path, Config]]:
    """`_with_included`, empty for a file that cannot be read: loading the task says so."""
    try:
        return _with_included(path.resolve())
    except (OSError, ValueError):
        return []


def is_group(path: Path) -> bool:
    return any("group" in config for _, config in _readable(path))


class _Loader(yaml.SafeLoader):
    """Reads `!function utils.process`, which names a function in a module beside the file, as `utils.py`."""


def _module(loader: yaml.SafeLoader, node: Any) -> str:
    return f"{str(loader.construct_scalar(node)).rpartition('.')[0].replace('.', '/')}.py"


_Loader.add_constructor("!function", _module)


def _read(path: Path) -> Config:
    try:
        found = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a YAML mapping, not {type(found).__name__}")
    return cast("Config", found)


def _option(config: Config, key: str) -> list[str]:
    """The texts of an argument of the data's loader."""
    options = config.get("dataset_kwargs")
    return list(_texts(cast("Config", options).get(key))) if isinstance(options, dict) else []


def _texts(value: object) -> Iterator[str]:
    """All texts within a value of YAML, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        held = cast("Any", value)
        for each in held.values() if isinstance(value, dict) else held:
            yield from _texts(each)
