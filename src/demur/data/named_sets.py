"""Public prompt sets by name: `named_sets.toml`, and what users and other packages add in the same form."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, ValidationError, model_validator

from demur.errors import InputError, listed, nearest
from demur.registry import Registry
from demur.types import Label, Value

Kind = Literal["prompts", "text", "questions"]
"""Prompts are put to the model, text is read by it (loss), questions are put to it and have a right answer."""

_BUILT_IN = Path(__file__).with_name("named_sets.toml")
_ADDED = "DEMUR_PROMPT_SETS"


class NamedSet(Value):
    """One public set: rows of one file, at one revision. Each field is a key of `named_sets.toml`."""

    name: str
    title: str = ""
    kind: Kind = "prompts"
    label: Label | None = None
    """What its prompts are; None for text, and for a file that holds both classes."""
    github: str | None = None
    """OWNER/REPOSITORY on GitHub that holds `file`."""
    hub: str | None = None
    """OWNER/NAME of the data set on the Hugging Face hub that holds `file`."""
    revision: str = ""
    """The commit, or a branch of a file that is not pinned by one."""
    file: str = ""
    """Path of the file in its repository; without a repository and `url`, a path relative to the TOML file."""
    url: str = ""
    """Where the file is fetched from; follows from the repository where there is one."""
    page: str = ""
    """Where a person finds the set, and its terms; by default the page of the repository."""
    licence: str = "none stated"
    cite: str = ""
    columns: tuple[str, ...] = ()
    """Those that the file has; `prompt` for a file without names of columns."""
    column: str | None = None
    """The one that holds the prompt, text or question (default: found by its usual names)."""
    rows: int | None = None
    """Rows of the set that are not blank, repeated ones counted; None where nobody has counted them."""
    sha256: str | None = None
    gated: bool = False
    """The home gives the file only to accounts that have accepted its terms."""
    keep: dict[str, str] = Field(default_factory=dict)
    """Column → value (`""`: absent): only such rows; the file holds other rows too."""
    family: str = ""
    """Sets of one family may share a file, which is then stored once; the set's own name by default."""

    @model_validator(mode="before")
    @classmethod
    def _with_addresses(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        github, hub, revision, file = (values.get(key) for key in ("github", "hub", "revision", "file"))
        if sum(bool(values.get(home)) for home in ("github", "hub", "url")) > 1 and not values.get("page"):
            raise ValueError("name one of github, hub and url")
        found = {"family": values.get("name"), "title": values.get("name")}
        if hub:
            found["page"] = f"https://huggingface.co/datasets/{hub}"
            found["url"] = f"{values.get('page', found['page'])}/resolve/{revision}/{file}"
        if github:
            found["page"] = f"https://github.com/{github}"
            found["url"] = f"https://raw.githubusercontent.com/{github}/{revision}/{file}"
        return {**found, **values}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.github or self.hub) and not (self.revision and self.file):
            raise ValueError("a file of a repository needs its revision and file")
        if not (self.file or self.url):
            raise ValueError("give github or hub with revision and file, or url, or the file alone (a local one)")
        return self

    def holds(self, row: Mapping[str, object]) -> bool:
        """Whether a row of the file is one of the set's, by `keep`."""
        return all(str(row.get(column) or "").strip() == value for column, value in self.keep.items())

    @property
    def filename(self) -> str:
        return (self.file or self.url).rpartition("/")[2]

    @property
    def pin(self) -> Literal["SHA-256", "commit", "not pinned", "local file"]:
        """What holds the bytes fixed."""
        if self.sha256 is not None:
            return "SHA-256"
        if not self.url:
            return "local file"
        return "commit" if re.fullmatch(r"[0-9a-f]{40}", self.revision) and self.revision in self.url else "not pinned"


PROMPT_SETS: Registry[NamedSet] = Registry("demur.prompt_sets", "prompt set")
"""Sets that this process or an installed package adds."""


def read_set_file(path: str | Path) -> tuple[NamedSet, ...]:
    """The sets of a TOML file in the form of `named_sets.toml`. Raises InputError: the file cannot be read, or a key is
    unknown, missing or of the wrong kind; names file, set and key."""
    path = Path(path).expanduser()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompt sets of {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    return tuple(_named_set(path, values) for values in _flat(path, tables))


def add_prompt_sets(path: str | Path) -> None:
    """Make the sets of a TOML file known by name in this process; InputError names file, set and key."""
    for named in read_set_file(path):
        PROMPT_SETS.register(named.name, named)


def prompt_sets() -> dict[str, NamedSet]:
    """All sets by name: demur's own, those of the files in `DEMUR_PROMPT_SETS`, and those that were added (last wins).
    Raises DemurError: a file of `DEMUR_PROMPT_SETS` cannot be used, or a set of an installed package cannot be
    loaded."""
    files = [_BUILT_IN, *filter(None, os.environ.get(_ADDED, "").split(os.pathsep))]
    found = {named.name: named for path in files for named in read_set_file(path)}
    return found | {name: PROMPT_SETS[name] for name in PROMPT_SETS}


def split_source(source: str | Path) -> tuple[str, str | None]:
    """What a source names, and its column: `"a.csv::goal"` is file `a.csv`, column `goal`. A file whose own name holds
    "::" wins."""
    name, _, column = str(source).rpartition("::")
    return (name, column) if name and not Path(source).expanduser().is_file() else (str(source), None)


def find_set(source: str | Path) -> NamedSet | None:
    """The set that a source names; None where it is a file, which wins, or names no set. Fetches nothing."""
    name, _ = split_source(source)
    if Path(name).expanduser().is_file():
        return None
    return _by_folded_name().get(_folded(name))


def named_set(name: str) -> NamedSet:
    """The set of that name, else InputError. Case does not count; `_` and spaces stand for `-`."""
    known = _by_folded_name()
    if _folded(name) not in known:
        raise InputError(f"there is no set {name!r}{nearest(name, known)}; the sets are {listed(known, 40)}")
    return known[_folded(name)]


def _by_folded_name() -> dict[str, NamedSet]:
    return {_folded(name): named for name, named in prompt_sets().items()}


def _folded(name: str) -> str:
    return name.casefold().replace("_", "-").replace(" ", "-")


def _flat(path: Path, tables: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The keys of each set, those of its family included."""
    for family, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"{path}: expected a table [{family}] for each set, found {family} = {table!r:.40}")
        shared = cast("dict[str, Any]", table)
        members = shared.pop("sets", {family: {}})
        yield from ({"family": family} | shared | own | {"name": name} for name, own in members.items())


def _named_set(path: Path, values: dict[str, Any]) -> NamedSet:
    if not any(values.get(key) for key in ("github", "hub", "url")) and values.get("file"):
        values["file"] = str(path.parent / Path(values["file"]).expanduser())
    try:
        return NamedSet.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'the set'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        )
        raise InputError(f"{path}, set {values['name']!r}: {problems}") from None
