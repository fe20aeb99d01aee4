"""Where SAE files come from: a local folder, or a hub repository at one commit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import huggingface_hub

from demur.errors import SaeError
from demur.offline import is_offline
from demur.saes._array_files import Arrays, open_arrays

_WHOLE_BYTES = 1 << 26
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 256
_TIMEOUT = 10.0
"""Seconds to wait for the hub's list of files."""


class SaeFiles:
    """The files under a local folder, by their relative paths; base of other sources of SAEs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = str(folder)
        """For people."""
        self.files = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))

    def path(self, file: str) -> Path:
        """The local path of `file`, downloaded if need be; SaeError where that fails."""
        return self._folder / file

    def is_here(self, file: str) -> bool:  # noqa: ARG002
        """Whether `file` can be read without a download."""
        return True

    def identity(self, file: str) -> str:
        """Key of the content of `file`."""
        return file_identity(self.path(file))

    def arrays(self, file: str) -> Arrays:
        """The arrays of an npz or safetensors file; raises as `open_arrays` and `path` do."""
        return open_arrays(self.path(file))

    def config(self, file: str) -> Config:
        """The fields of a JSON file; SaeError where it is not a JSON object, or cannot be downloaded."""
        name = f"{self.name}/{file}"
        try:
            values: Any = json.loads(self.path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SaeError(f"{name} cannot be read as JSON ({error}). Fetch or export it again.") from error
        if not isinstance(values, dict):
            raise SaeError(f"{name} is not a JSON object; expected an SAE's configuration")
        return Config(name, cast("dict[str, Any]", values))


class HubRepository(SaeFiles):
    """The files of a hub repository at one commit: its newest, that of `revision`, or offline the cached one."""

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import errors

        self._repo = repo
        self._cached_only = is_offline()
        try:
            if self._cached_only:
                raise ConnectionError("downloads are switched off")
            info = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT)
        except errors.GatedRepoError as error:
            raise SaeError(f"{repo} is gated: accept its licence on huggingface.co and run `hf auth login`") from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise SaeError(f"{repo!r} is neither a folder here nor a repository on the Hugging Face hub") from error
        except errors.RevisionNotFoundError as error:
            raise SaeError(f"{repo} has no revision {revision!r}") from error
        except Exception as error:  # no network, time-outs: each client library has its own errors
            self._cached_only = True
            self._commit, self.files = _cached(repo, revision, error)
        else:
            self._commit = info.sha or revision or "main"
            self.files = tuple(sorted(sibling.rfilename for sibling in info.siblings or []))
        self.name = f"{repo}@{self._commit[:12]}{' (cached files only)' if self._cached_only else ''}"

    def path(self, file: str) -> Path:
        where: dict[str, Any] = {"revision": self._commit, "local_files_only": self._cached_only}
        try:
            return Path(huggingface_hub.hf_hub_download(self._repo, file, **where))
        except Exception as error:
            raise SaeError(f"{self.name}/{file} cannot be downloaded: {first_line(error)}") from error

    def is_here(self, file: str) -> bool:
        return isinstance(huggingface_hub.try_to_load_from_cache(self._repo, file, revision=self._commit), str)

    def identity(self, file: str) -> str:
        return f"{self._repo}@{self._commit}/{file}"


def _cached(repo: str, revision: str | None, why: Exception) -> tuple[str, tuple[str, ...]]:
    """Commit and files of what the local cache has of a repository."""
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
    except Exception as error:
        # Files are fetched one at a time, so a snapshot is seldom complete, and newer releases of the library say only
        # in the error where such a one is.
        folder = getattr(error, "snapshot_path", None)
        if folder is None:
            raise SaeError(
                f"{repo} cannot be listed ({first_line(why)}), and nothing of it is in the local cache. "
                "Connect to the network, or give a local folder."
            ) from error
    return Path(folder).name, SaeFiles(Path(folder)).files


class Config:
    """The fields of one JSON object. A dotted name reaches into nested objects.

    Each method takes several names for a field, and uses the first that is there and not null. `number`, `integer` and
    `text` raise SaeError, which names file and field, when there is none or it is of another type.
    """

    def __init__(self, file: str, values: dict[str, Any]) -> None:
        self.file = file
        self._values = values

    def get(self, *fields: str) -> Any:
        """The field as it stands, else None."""
        for field in fields:
            value: Any = self._values
            for part in field.split("."):
                value = cast("dict[str, Any]", value).get(part) if isinstance(value, dict) else None
            if value is not None:
                return value
        return None

    def number(self, *fields: str) -> float:
        """A positive finite number."""
        value = self.get(*fields)
        positive = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        return self._expect(positive, value, fields, "a positive number")

    def integer(self, *fields: str) -> int:
        """A positive whole number."""
        value = self.number(*fields)
        return int(self._expect(value == int(value), value, fields, "a whole number"))

    def text(self, *fields: str) -> str:
        value = self.get(*fields)
        return self._expect(isinstance(value, str), value, fields, "a string")

    def _expect(self, fits: bool, value: Any, fields: tuple[str, ...], expected: str) -> Any:
        if fits:
            return value
        found = "is missing" if value is None else f"is {value!r}"
        raise SaeError(f"{self.file}: {fields[0]} {found}; expected {expected}")


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def file_identity(path: Path) -> str:
    """Name, size and SHA-256 of a local file.

    Of files above 64 MiB, 256 evenly spaced samples of 64 KiB are hashed, the first and the last bytes among them (an
    npz file ends with the checksums of all its members), so that a suite of gigabytes has its key in seconds.
    """
    size = path.stat().st_size
    state = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            state.update(file.read())
            return f"{path.name}:{size}:sha256:{state.hexdigest()}"
        for sample in range(_SAMPLES):
            file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            state.update(file.read(_SAMPLE_BYTES))
    return f"{path.name}:{size}:sampled-sha256:{state.hexdigest()}"
