"""Rows of a file in any of six formats, read as they are asked for, with errors that name file, line, byte and row.

Parquet is read by polars, csv and JSON by the standard library: polars reads past a last quote that is never closed,
refuses a cell that ends with an inch mark, and wants one type in each column of JSON.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, cast

from demur.errors import InputError, listed, nearest

COLUMNS: dict[str, Any] = tomllib.loads(files("demur.data").joinpath("columns.toml").read_text("utf-8"))
PROMPT_COLUMNS: tuple[str, ...] = tuple(COLUMNS["prompt"])
"""Names under which the field's files keep the user's message, best first; compared without case."""

Row = Mapping[str, object]
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
_BATCH = 1024


@dataclass(frozen=True)
class Table:
    """The columns of a file, and its rows, which are read when they are asked for."""

    path: Path
    columns: tuple[str, ...]
    rows: Callable[..., Iterator[Row]]
    """The rows in order, with at least the columns that it is given (default: all); InputError at a malformed one. A
    cell that the file does not have is None or missing."""

    def find_column(self, wanted: str | None, ranked: Sequence[str], *, what: str, option: str) -> str:
        """The column called `wanted` (without case), or, where that is None, the first of `ranked` (lower case) that
        this file has. Where there is none, InputError says that `what` is looked for, and that `option` names it."""
        found = self.optional_column(ranked if wanted is None else [wanted.casefold()])
        if found is not None:
            return found
        has = f"it has {listed(self.columns)}"
        if wanted is None:
            raise InputError(f"{self.path}: no column looks like {what}; {has}. Name the column with {option}")
        raise InputError(f"{self.path}: no column {wanted!r}{nearest(wanted, self.columns)}; {has}")

    def optional_column(self, ranked: Sequence[str], *, besides: str | None = None) -> str | None:
        """The first of `ranked` that is among the columns, other than the column `besides`; None where none is."""
        by_folded = {name.casefold(): name for name in reversed(self.columns) if name != besides}
        return next((by_folded[name] for name in ranked if name in by_folded), None)


def read_table(path: str | Path, *, later_columns: bool = True) -> Table:
    """Open a csv, tsv, json, jsonl, txt or parquet file; all but parquet may be zipped (`.jsonl.gz`).

    JSON may be a list of strings or objects, an object of lists of strings by category (names of nested ones are joined
    with " / "), of columns, or with one list of records among other entries, or one value a line, which is read whole
    with `later_columns`, for columns that first appear in a later row. A txt file has one row per line. An empty csv or
    tsv cell counts as absent. Raises InputError: the file is missing, empty, of an unknown kind, not UTF-8 or
    malformed; or a row is, when asked for.
    """
    path = Path(path)
    kind = _checked_kind(path)
    if kind == ".txt":
        return Table(path, ("prompt",), lambda *_: ({"prompt": line.rstrip("\r\n")} for line in _lines(path)))
    if kind == ".parquet":
        return _parquet(path)
    if kind in (".csv", ".tsv"):
        return _delimited(path, "," if kind == ".csv" else "\t")
    if kind == ".json" and not _has_json_lines(path):
        return _gathered(path, _json(path))
    rows = _json_lines(path)
    if later_columns:
        return _gathered(path, rows)
    first = next(rows)
    return Table(path, tuple(first), lambda *_: chain((first,), rows))


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, hex. The file is never held whole."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def kind_of(path: Path) -> str:
    """The format that the name tells, such as ".jsonl": the suffix in lower case, of a zipped file the one before."""
    suffix = path.suffix.casefold()
    return Path(path.stem).suffix.casefold() if suffix == ".gz" else suffix


def _checked_kind(path: Path) -> str:
    """The kind of a file; InputError where it is absent, empty, or cannot be read."""
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir() if kind_of(item) in KINDS)
        inside = f"; it holds {listed(names)}" if names else ""
        raise InputError(f"{path} is a folder; expected a file of prompts{inside}")
    if not path.exists():
        if not path.parent.is_dir():
            raise InputError(f"{path} does not exist: there is no folder {path.parent}")
        raise InputError(f"{path} does not exist{nearest(path.name, [item.name for item in path.parent.iterdir()])}")
    if not path.is_file():
        raise InputError(f"{path} is a pipe or a device, which can be read once at most; save its content in a file")
    kind = kind_of(path)
    if kind not in KINDS:
        raise InputError(f"{path}: cannot read files of kind {kind or '(none)'!r}; use {', '.join(KINDS)}")
    if not path.stat().st_size if kind == ".parquet" else not any(line.strip() for line in _lines(path)):
        raise InputError(f"{path} is empty; expected prompts")
    return kind


def _lines(path: Path) -> Iterator[str]:
    """The lines with their ends, unzipped and decoded, as they are asked for. A byte-order mark is dropped."""
    number, offset, raw = 0, 0, b""
    try:
        with gzip.open(path) if path.suffix.casefold() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InputError(f"{path} is UTF-16, at line 1, byte 0; save it as UTF-8")
                text = raw.decode("utf-8")
                yield text.removeprefix("\ufeff") if number == 1 else text
                offset += len(raw)
    except UnicodeDecodeError as error:
        place = f"line {number}, byte {offset + error.start} of the file is 0x{raw[error.start]:02x}"
        raise InputError(f"{path} is not UTF-8: {place}; save it as UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} cannot be unzipped: {error}; is the download complete?") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _delimited(path: Path, separator: str) -> Table:
    reader = csv.reader(_lines(path), delimiter=separator, strict=True)

    def cells() -> Iterator[list[str]]:
        try:
            yield from filter(None, reader)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}") from error

    def rows(_: Sequence[str] = ()) -> Iterator[Row]:
        for row in filled:
            if len(row) > len(columns):
                found = f"{path}, line {reader.line_num}: {len(row)} cells but {len(columns)} columns"
                raise InputError(f"{found}; quote cells that contain the separator")
            yield {name: cell or None for name, cell in zip(columns, row, strict=False)}

    filled = cells()
    columns = tuple(name.strip() for name in next(filled))
    if len(set(columns)) != len(columns):
        raise InputError(f"{path}: two columns have one name; it has {listed(columns)}")
    return Table(path, columns, rows)


def _parquet(path: Path) -> Table:
    import polars as pl

    try:
        frame = pl.scan_parquet(path)
        columns = tuple(frame.collect_schema().names())
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path} is not a parquet file that can be read: {error}") from error

    def rows(wanted: Sequence[str] = ()) -> Iterator[Row]:
        try:
            for batch in frame.select(wanted or columns).collect_batches(chunk_size=_BATCH, maintain_order=True):
                yield from batch.iter_rows(named=True)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise InputError(f"{path} is a parquet file with damaged pages: {error}") from error

    return Table(path, columns, rows)


def _has_json_lines(path: Path) -> bool:
    """Whether a json file holds one object or string a line, as many files of that name do."""
    filled = (line for line in _lines(path) if line.strip())
    first, second = next(filled, ""), next(filled, "")
    try:
        return bool(second) and isinstance(json.loads(first), dict | str)
    except json.JSONDecodeError:
        return False


def _json_lines(path: Path) -> Iterator[Row]:
    filled = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    for row, (number, line) in enumerate(filled):
        yield _record(path, row, _parsed(path, line.rstrip(), number))


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}"
        raise InputError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise InputError(f"{path}, line {line}: JSON that is nested too deeply; expected a list of prompts") from error


def _json(path: Path) -> Iterator[Row]:
    content = _parsed(path, "".join(_lines(path)))
    if isinstance(content, dict):
        content = _json_object(path, cast("dict[str, object]", content))
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a JSON list or object, found {_kind(content)}")
    return (_record(path, row, item) for row, item in enumerate(cast("list[object]", content)))


def _json_object(path: Path, content: dict[str, object]) -> Sequence[object]:
    """Records of an object of columns, of an object with one list of records, or of lists by category."""
    lists = {key: cast("list[object]", value) for key, value in content.items() if isinstance(value, list)}
    if len(lists) == len(content) > 1 and {key.casefold() for key in lists} & set(PROMPT_COLUMNS):
        if len({len(column) for column in lists.values()}) != 1:
            raise InputError(f"{path}: the columns {listed(lists)} have different lengths")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    records = [value for value in lists.values() if value and all(isinstance(item, dict) for item in value)]
    if len(records) == 1:
        return records[0]
    if len(content) == len(lists) == 1:
        return next(iter(lists.values()))
    return list(_by_category(path, content, ()))


def _by_category(path: Path, content: Mapping[str, object], outer: tuple[str, ...]) -> Iterator[Row]:
    for key, value in content.items():
        inner = (*outer, key.strip().rstrip(":"))
        items = cast("list[object]", value) if isinstance(value, list) else [None]
        if isinstance(value, dict):
            yield from _by_category(path, cast("dict[str, object]", value), inner)
        elif all(isinstance(item, str) for item in items):
            yield from ({"prompt": item, "category": " / ".join(inner)} for item in items)
        else:
            raise InputError(
                f"{path}: expected a list of strings under {' / '.join(inner)!r}, found {_kind(value)}. "
                "A JSON object may hold lists of prompts by category, columns, or one list of records"
            )


def _record(path: Path, number: int, item: object) -> Row:
    """An object as it is, a string as a row of one column."""
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, dict):
        return cast("dict[str, object]", item)
    raise InputError(f"{path}, row {number}: expected a string or an object, found {_kind(item)}")


def _gathered(path: Path, records: Iterable[Row]) -> Table:
    """The records as rows; the columns are the union of their keys, in order of first appearance."""
    rows = tuple(records)
    return Table(path, tuple(dict.fromkeys(name for row in rows for name in row)), lambda *_: iter(rows))


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {str: "a string", dict: "an object", list: "a list"}
    return names.get(type(value), "a number")
