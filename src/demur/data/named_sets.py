"""Public prompt sets by name (`named_sets.toml`, and what users and other packages add in the same form), and the cache
of their files: one gets into it from its home, or from this machine, and is checked on its way."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, ValidationError, model_validator

from demur.data.tables import file_digest, kind_of, read_table
from demur.errors import InputError, listed, nearest
from demur.offline import OFFLINE, is_offline
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
    Raises DemurError: such a file cannot be used, or a set of an installed package cannot be loaded."""
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
    return None if Path(name).expanduser().is_file() else _by_folded_name().get(_folded(name))


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
        said = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        problems = "; ".join(f"{place or 'the set'}: {what}" for place, what in said)
        raise InputError(f"{path}, set {values['name']!r}: {problems}") from None


logger = logging.getLogger("demur.data")


def cache_path(named: NamedSet) -> Path:
    """Where the set's file is, once it is there: in `DEMUR_CACHE` or `~/.cache/demur`, or a local set's own place."""
    if not named.url:
        return Path(named.file)
    folder = Path(os.environ.get("DEMUR_CACHE") or Path.home() / ".cache" / "demur")
    return folder / "prompts" / named.family / named.revision[:12] / named.filename


def is_intact(named: NamedSet, path: Path) -> bool:
    """Whether the file's hash is the set's; True where the set has none."""
    return named.sha256 is None or file_digest(path) == named.sha256


def fetch(named: NamedSet) -> Path:
    """The set's file in the cache, downloaded at its pinned revision if it is not there yet.

    The user's token is sent for gated sets of the Hugging Face hub alone. What comes is checked against the set's hash,
    or, where that is not known, for its columns, before it takes its place. `HF_HUB_OFFLINE=1` and `DEMUR_OFFLINE=1`
    forbid the download. Raises InputError: it cannot be downloaded, or its bytes are not those that are expected.
    """
    target = cache_path(named)
    damaged = target.is_file() and not is_intact(named, target)
    if target.is_file() and not damaged:
        return target
    if not named.url:
        state = "has changed: its SHA-256 is another" if damaged else "does not exist"
        raise InputError(f"the file {target} of the set {named.name!r} {state}")
    if is_offline():
        state = f"its file {target} is damaged" if damaged else "it is not in the cache"
        raise _unavailable(named, f"{state}, and downloads are switched off ({' or '.join(OFFLINE)} is set)")
    return _put(target, partial(_downloaded, named, target))


def store(named: NamedSet, path: str | Path) -> Path:
    """Put a copy of a file of this machine into the cache, as the set's file. Its hash is compared, or, where that is
    not known, its columns; then another number of rows than the set's is a warning on the `demur.data` logger. Raises
    InputError: it is another file, or cannot be read or copied."""
    path, target = Path(path).expanduser(), cache_path(named)
    if not named.url:
        raise InputError(f"the set {named.name!r} is the local file {target}; there is nothing to fetch")
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected {named.filename} of {named.page}")
    if named.sha256 is None:
        if (kind_of(path), path.suffix == ".gz") != (kind_of(target), target.suffix == ".gz"):
            raise InputError(f"{path} is not of the format of {named.filename}, which is the file of {named.name!r}")
        _check_rows(named, path, str(path))
    elif (digest := file_digest(path)) != named.sha256:
        raise InputError(
            f"{path} is not the file of {named.name!r}: its SHA-256 is {digest}, expected {named.sha256} "
            f"({named.filename} at revision {named.revision} of {named.page}). "
            "A file that is meant to differ is used by its path in place of the name"
        )
    return _put(target, lambda folder: Path(shutil.copyfile(path, folder / target.name)))


def _put(target: Path, get: Callable[[Path], Path]) -> Path:
    """Let `get` put a file into a folder beside `target`, in one process at a time, and move it to its place. The
    folder goes afterwards, unless it holds a download of huggingface_hub that the next call can go on with."""
    from filelock import FileLock

    folder = target.parent / f".{target.name}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            folder.mkdir(exist_ok=True)
            try:
                os.replace(get(folder), target)
            finally:
                if not any(folder.rglob("*.incomplete")):
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"the cache {target.parent} cannot be written ({error.strerror}); set DEMUR_CACHE to another folder"
        ) from error
    return target


def _downloaded(named: NamedSet, target: Path, folder: Path) -> Path:
    """The file as its home gives it, somewhere in `folder`; `target`, if another process has fetched it meanwhile."""
    if target.is_file() and is_intact(named, target):
        return target
    try:
        part = _from_hub(named, folder) if named.hub else _from_url(named, folder)
    except Exception as error:  # Each library, and each version of it, raises its own and those of what it stands on.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:
            raise _unavailable(named, f"{named.url} cannot be reached: {error}") from error
        if not (named.gated and status in (401, 403)):
            raise _unavailable(named, f"{named.url} answered {status}") from error
        raise _gated(named, status) from error
    if not is_intact(named, part):
        raise _unavailable(named, f"the file at {named.url} has changed: its SHA-256 is not {named.sha256}")
    try:
        if named.sha256 is None:
            _check_rows(named, part, named.url)
    except InputError as error:
        raise _unavailable(named, f"what {named.url} gave is not this set: {error}") from error
    return part


def _check_rows(named: NamedSet, path: Path, where: str) -> None:
    """InputError unless a file whose hash is not known has the set's columns, and rows; `where` is for the warning."""
    table = read_table(path)
    wanted = [*((named.column,) if named.column else named.columns[:1]), *named.keep]
    columns = [table.find_column(name, (), what="a part of the set", option="") for name in wanted]
    rows = sum(named.holds(row) and bool(str(row.get(columns[0]) or "").strip()) for row in table.rows(columns))
    if not rows:
        raise InputError(f"{path} holds no row of {named.name!r}")
    if named.rows not in (None, rows):
        logger.warning("%s holds %d rows of %s; expected %d", where, rows, named.name, named.rows)


def _from_hub(named: NamedSet, folder: Path) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT")
    at: dict[str, Any] = {"repo_type": "dataset", "revision": named.revision, "endpoint": endpoint}
    token = None if named.gated else False
    # Asked once, without the half minute of retries that the download spends on a hub that cannot be reached.
    get_hf_file_metadata(hf_hub_url(str(named.hub), named.file, **at), token=token)
    return Path(str(hf_hub_download(str(named.hub), named.file, local_dir=folder, token=token, **at)))


def _from_url(named: NamedSet, folder: Path) -> Path:
    import pooch

    download: Any = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    download(named.url, str(folder / named.filename), None)
    return folder / named.filename


def _gated(named: NamedSet, status: int) -> InputError:
    from huggingface_hub import get_token

    accept = f"accept its terms ({named.licence}) on {named.page} with your account"
    again = f"run `demur data fetch {named.name}` again"
    if get_token() is None:
        step = f"{accept}, log in here with `hf auth login` (or set HF_TOKEN), and {again}"
    elif status == 401:
        step = f"the hub does not know the token that it was given: log in with `hf auth login`, and {again}"
    else:
        step = f"the account of your token has no access: {accept}, and {again}"
    return InputError(f"set {named.name!r} is gated and could not be fetched ({status}): {step}")


def _unavailable(named: NamedSet, why: str) -> InputError:
    account = "an account that has accepted the terms is needed" if named.gated else ""
    terms = "; ".join(filter(None, (f"licence: {named.licence}", named.page, account)))
    return InputError(
        f"set {named.name!r} could not be fetched: {why}. "
        f"Download {named.url} where there is a network ({terms}), "
        f"and here run `demur data fetch {named.name} --from {named.filename}`, "
        "or pass the file's path in place of the name"
    )
