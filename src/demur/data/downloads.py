"""The cache of public sets: a file gets into it from its home, or from this machine, and is checked on its way."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from demur.data.named_sets import NamedSet
from demur.data.tables import file_digest, kind_of, read_table
from demur.errors import InputError
from demur.offline import OFFLINE, is_offline

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

    Files of the Hugging Face hub come through huggingface_hub (the user's token is sent for gated sets alone), others
    through pooch. What comes is checked against the set's hash, or, where that is not known, for its columns, before it
    takes its place. `HF_HUB_OFFLINE=1` and `DEMUR_OFFLINE=1` forbid the download. Raises InputError: it cannot be
    downloaded, or its bytes are not those that are expected.
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
    """Put a copy of a file of this machine into the cache, as the set's file.

    Its hash is compared, or, where that is not known, its columns; then another number of rows than the set's is a
    warning on the `demur.data` logger. Raises InputError: it is another file, or cannot be read or copied.
    """
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
    if named.sha256 is None:
        try:
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
    account = "; an account that has accepted the terms is needed" if named.gated else ""
    return InputError(
        f"set {named.name!r} could not be fetched: {why}. "
        f"Download {named.url} where there is a network (licence: {named.licence}; {named.page}{account}), "
        f"and here run `demur data fetch {named.name} --from {named.filename}`, "
        "or pass the file's path in place of the name"
    )
