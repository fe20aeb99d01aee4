"""Where SAE files come from (a local folder, or a hub repository at one commit), and the arrays in them.

A few rows or columns are read without the rest: files are memory-mapped. A compressed npz member is unpacked once, when
it is first read, into a temporary file that is mapped instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import numpy as np
import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from demur.errors import SaeError
from demur.offline import is_offline

Which = range | tuple[int, ...]
"""Positions along the first axis. A range of step 1 is read as one block."""

_SAFETENSORS_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}


@dataclass(frozen=True)
class NamedArray:
    """One array of a file, of one or two dimensions, read as float32. `T` swaps the axes."""

    file: str
    name: str
    stored_shape: tuple[int, ...]
    read: Callable[[Which, int], Tensor]
    """Slices along an axis of the stored array, float32, freshly allocated or safe to share."""
    transposed: bool = False

    @property
    def T(self) -> NamedArray:
        return replace(self, transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored_shape[::-1] if self.transposed else self.stored_shape

    def take(self, which: Which) -> Float[Tensor, "k ..."]:
        """The slices `which` along the first axis, that of features, in the order of the file (strided where that is
        the other one); SaeError names a value that is not finite."""
        return self._finite(which, "; feature {feature}")

    def whole(self) -> Float[Tensor, "..."]:
        """All of an array that has no feature axis; raises as `take` does."""
        return self._finite(range(self.shape[0]), "")

    def _finite(self, which: Which, note: str) -> Tensor:
        axis = int(self.transposed)
        values = self.read(which, axis)
        # The sum is much faster than a look at every value, and is not finite where one of them is not.
        if not bool(torch.isfinite(values.sum())) and len(bad := (~torch.isfinite(values)).nonzero()):
            at: list[int] = bad[0].tolist()
            value = values[tuple(at)].item()
            at[axis] = which[at[axis]]
            raise SaeError(
                f"{self.file}: {self.name}{at} is {value}{note.format(feature=at[axis])}. Weights must be finite "
                "float32 numbers; fetch or export the file again."
            )
        return values.T if self.transposed else values


class Arrays(dict[str, NamedArray]):
    """The named arrays of one file."""

    def __init__(self, file: str, arrays: Mapping[str, NamedArray]) -> None:
        super().__init__(arrays)
        self.file = file

    def __missing__(self, name: str) -> NamedArray:
        raise SaeError(f"{self.file} has no array {name!r}; it holds {', '.join(sorted(self)) or 'none'}")


def memory_array(file: str, name: str, tensor: Tensor) -> NamedArray:
    """A tensor that is already in memory."""

    def read(which: Which, axis: int) -> Tensor:
        return _part(tensor.detach(), which, axis).to("cpu", torch.float32)

    return NamedArray(file, name, tuple(tensor.shape), read)


def _part(values: Any, which: Which, axis: int) -> Any:
    index = slice(which.start, which.stop) if isinstance(which, range) else list(which)
    return values[index] if axis == 0 else values[:, index]


def open_arrays(path: Path) -> Arrays:
    """The arrays of an npz or safetensors file: headers are compared with the size of the file, no number is read.
    SaeError where the file is missing, truncated, of another format, or holds something other than numbers."""
    kinds = {".npz": ("an npz", _npz), ".safetensors": ("a safetensors", _safetensors)}
    if path.suffix not in kinds:
        raise SaeError(f"{path} is no file of arrays; expected {' or '.join(kinds)}")
    kind, read = kinds[path.suffix]
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Arrays(str(path), {array.name: array for array in read(path, buffer)})
    except (zipfile.BadZipFile, EOFError, struct.error, ValueError, KeyError, TypeError, OSError) as error:
        raise SaeError(f"{path} cannot be read as {kind} file ({error}). Fetch or export it again.") from error


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: tuple[int, ...]
    dtype: str
    fortran: bool = False

    @property
    def item_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def end(self) -> int:
        return self.offset + self.item_bytes * math.prod(self.shape)

    def read(self, mapped: Callable[[], mmap.mmap], which: Which, axis: int) -> Tensor:
        buffer = mapped()
        # A few columns of a wide matrix are a few numbers per row: reading ahead would fetch the whole file.
        sparse = not isinstance(which, range) or (axis == 1 and self.item_bytes * len(which) < mmap.PAGESIZE)
        if hasattr(mmap, "MADV_RANDOM"):
            buffer.madvise(mmap.MADV_RANDOM if sparse else mmap.MADV_NORMAL)
        # Raw bytes of the item's size need no alignment, so numpy never copies the whole array to align it.
        raw = np.frombuffer(buffer, f"V{self.item_bytes}", count=math.prod(self.shape), offset=self.offset)
        part = np.array(_part(raw.reshape(self.shape, order="F" if self.fortran else "C"), which, axis), order="C")
        if self.dtype == "bfloat16":
            return torch.from_numpy(part.view("<i2")).view(torch.bfloat16).float()
        with np.errstate(over="ignore"):  # a float64 too large for float32 becomes inf, which is reported
            return torch.from_numpy(part.view(self.dtype).astype(np.float32, copy=False))

    def array(self, path: Path, name: str, buffer: mmap.mmap) -> NamedArray:
        """The array of this place in the mapped file."""
        if self.end > len(buffer):
            raise SaeError(f"{path} is truncated: {name} ends beyond the end of the file. Fetch it again.")
        return NamedArray(str(path), name, self.shape, partial(self.read, lambda: buffer))


def _npz(path: Path, buffer: mmap.mmap) -> Iterator[NamedArray]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                place = _Place(stream.tell(), shape, dtype.str, fortran)
            if dtype.kind not in "fiu":
                raise SaeError(f"{path}: {name} has dtype {dtype}; expected floating-point numbers")
            if place.end != info.file_size:
                raise SaeError(f"{path} is malformed: {name} has not the size that its shape {list(shape)} needs")
            if info.compress_type == zipfile.ZIP_STORED:
                # The local header's name and extra lengths may differ from the central directory's.
                lengths = struct.unpack_from("<HH", buffer, info.header_offset + 26)
                start = info.header_offset + 30 + sum(lengths)
                yield replace(place, offset=start + place.offset).array(path, name, buffer)
            else:
                unpacked = cache(partial(_unpacked, path, info.filename))
                yield NamedArray(str(path), name, shape, partial(place.read, unpacked))


def _unpacked(path: Path, member: str) -> mmap.mmap:
    """A compressed member, unpacked into a temporary file that is gone when its mapping is."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream, tempfile.TemporaryFile() as file:
            shutil.copyfileobj(stream, file, 1 << 20)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        name = member.removesuffix(".npy")
        raise SaeError(f"{path}: {name} is damaged or cannot be unpacked ({error}). Fetch it again.") from error


def _safetensors(path: Path, buffer: mmap.mmap) -> Iterator[NamedArray]:
    (length,) = struct.unpack_from("<Q", buffer)
    header: dict[str, Any] = {**json.loads(buffer[8 : 8 + length])}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise SaeError(f"{path}: {name} has dtype {entry['dtype']}; expected floating-point numbers")
        start, stop = entry["data_offsets"]
        # A scalar is read as an array of one.
        place = _Place(8 + length + start, tuple(entry["shape"]) or (1,), _SAFETENSORS_DTYPES[entry["dtype"]])
        if place.end != 8 + length + stop:
            raise SaeError(f"{path} is malformed: {name} has not the size that its shape needs")
        yield place.array(path, name, buffer)


_WHOLE_BYTES = 1 << 26
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 256
_TIMEOUT = 10.0
"""Seconds to wait for the hub's list of files."""


class SaeFiles:
    """The files under a local folder, by their relative paths; base of other sources of SAEs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.name = folder, str(folder)
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
        """The fields of a JSON or YAML file; SaeError where it is not an object, or cannot be downloaded."""
        name, read = f"{self.name}/{file}", yaml.safe_load if file.endswith(".yaml") else json.loads
        kind = "YAML" if file.endswith(".yaml") else "JSON"
        try:
            values: Any = read(self.path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SaeError(f"{name} cannot be read as {kind} ({error}). Fetch or export it again.") from error
        if not isinstance(values, dict):
            raise SaeError(f"{name} is not a {kind} object; expected an SAE's configuration")
        return Config(name, cast("dict[str, Any]", values))


class HubRepository(SaeFiles):
    """The files of a hub repository at one commit: its newest, that of `revision`, or offline the cached one. Of
    `OWNER/NAME/FOLDER` only the files in that folder, by their paths in the repository."""

    def __init__(self, place: str, revision: str | None) -> None:
        from huggingface_hub import errors

        owner, name, *folder = place.split("/")
        self._repo = repo = f"{owner}/{name}"
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
        if folder:
            self.files = tuple(file for file in self.files if file.startswith("/".join((*folder, ""))))
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
        # A snapshot is seldom complete, and newer releases of the library say only in the error where such a one is.
        folder = getattr(error, "snapshot_path", None)
        if folder is None:
            nothing = f"{repo} cannot be listed ({first_line(why)}), and nothing of it is in the local cache"
            raise SaeError(f"{nothing}. Connect to the network, or give a local folder.") from error
    return Path(folder).name, SaeFiles(Path(folder)).files


class Config:
    """The fields of one JSON object, nested ones by dotted names. Of several names for a field, the first that is there
    and not null counts. `number`, `integer`, `text`: SaeError (file and field) where there is none, or of another type.
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
    """Name, size and SHA-256 of a local file; above 64 MiB, of 256 evenly spaced samples of 64 KiB, with the first and
    the last bytes (an npz file ends with its members' checksums): a suite of gigabytes has its key in seconds."""
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
