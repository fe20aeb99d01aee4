"""From the sources that a person names (files, public sets) to prompts and texts, and which of them are harmful."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

from demur.data.named_sets import Kind, NamedSet, cache_path, fetch, find_set, prompt_sets, split_source
from demur.data.tables import COLUMNS, KINDS, PROMPT_COLUMNS, Row, Table, file_digest, kind_of, read_table
from demur.errors import InputError, listed, nearest
from demur.types import Label, Prompt, PromptSet, text_key

logger = logging.getLogger("demur.data")

_TEXT_COLUMNS = (*COLUMNS["text"], *PROMPT_COLUMNS)
_HARMFUL_IF_YES: dict[str, bool] = COLUMNS["harmful_if_yes"]
_CLASS_COLUMNS: tuple[str, ...] = (*COLUMNS["class"], *_HARMFUL_IF_YES)
_WORDS: dict[str, list[str]] = COLUMNS["words"]
_COLUMN_HINT = "SOURCE::COLUMN"


@dataclass(frozen=True)
class Reading:
    """The prompts of one source, and why the other of its rows were dropped: `rows == len(prompts) + empty + duplicates
    + left_out + beyond_limit`."""

    prompts: PromptSet
    column: str
    rows: int
    empty: int
    """Rows whose prompt is absent or blank."""
    duplicates: int
    """Rows whose prompt stood in an earlier row (compared without case and spacing)."""
    left_out: int
    """Rows of another class, or of another set that is kept in the same file."""
    beyond_limit: int
    """Rows after the first `limit` prompts: not looked at."""


def read_prompts(
    source: str | Path | Sequence[str | Path], *, label: Label | None, limit: int | None = None
) -> PromptSet:
    """Prompts of one or several sources: files (csv, tsv, json, jsonl, txt, parquet) or public sets by name.

    A source is `FILE`, `NAME` or either with `::COLUMN`, the column (key, in JSON) of the prompt, otherwise found by
    its usual names. A file wins over a set of the same name. Ids are file stem, six digits of the file's hash, and row
    from 0; with several sources, behind the source's number. Texts are stripped. Blank and repeated prompts and, where
    a column tells the classes apart, rows of another class than `label` are dropped, and counted in warnings on
    `demur.data`. `limit` is per source. Raises InputError: a source, a column or a cell cannot be used, or no row has
    this label.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise InputError("no prompts: the list of sources is empty; name a file or a set")
    sets = [read_counted(each, label=label, limit=limit).prompts for each in sources]
    if len(sets) == 1:
        return sets[0]
    kept: dict[str, Prompt] = {}
    for number, prompts in enumerate(sets, start=1):
        for prompt in prompts:
            kept.setdefault(text_key(prompt.text), prompt.model_copy(update={"id": f"{number}/{prompt.id}"}))
    repeated = sum(len(each) for each in sets) - len(kept)
    if repeated:
        logger.warning("%d prompts stand in more than one source and are used once", repeated)
    return PromptSet(name="+".join(each.name for each in sets), prompts=tuple(kept.values()))


def read_counted(source: str | Path, *, label: Label | None, limit: int | None = None) -> Reading:
    """As `read_prompts` for one source, with the count of rows that were dropped, and why."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 prompt")
    path, named = _resolve(source, ("prompts", "questions"), label)
    table = read_table(path)
    column = table.find_column(named.column, PROMPT_COLUMNS, what="a prompt", option=_COLUMN_HINT)
    told = label is None or named.label is not None or bool(named.keep)
    classes = None if told else _class_column(path, table.columns, besides=column)
    reading = _collect(table, named, column, classes, label, limit)
    if not len(reading.prompts):
        raise InputError(
            f"{path}: no usable prompt in {reading.rows} rows of column {column!r} ({reading.empty} are blank, "
            f"{reading.left_out} of another class or set)"
        )
    dropped = {"have no prompt and were dropped": reading.empty}
    dropped["repeat an earlier prompt and were dropped"] = reading.duplicates
    if classes is not None:
        dropped[f"are not {label} by column {classes.column!r} and were left out"] = reading.left_out
    for what, number in dropped.items():
        if number:
            logger.warning("%s: %d of %d rows %s", path, number, reading.rows, what)
    return reading


def read_texts(source: str | Path, *, limit: int | None = None) -> tuple[str, ...]:
    """The documents of a file (txt, json, jsonl, csv, tsv, parquet; zipped or not), or of a set by name.

    A source is named as for `read_prompts`. A document is a line of a txt file, elsewhere a cell of one column,
    stripped; blank ones are dropped, repeated ones kept. Little more of the file is read than the first `limit` take,
    but a json file that does not hold one value a line is read whole. Raises InputError: the source, the column or a
    cell cannot be used, or there is no document.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 document")
    path, named = _resolve(source)
    table = read_table(path, later_columns=False)
    column = table.find_column(named.column, _TEXT_COLUMNS, what="text", option=_COLUMN_HINT)
    rows = table.rows(tuple(dict.fromkeys((column, *named.keep))))
    cells = (_cell(path, number, row, column) for number, row in enumerate(rows) if named.holds(row))
    texts = tuple(islice(filter(None, cells), limit))
    if not texts:
        raise InputError(f"{path}: no text in column {column!r}: its rows are blank")
    return texts


def _resolve(source: str | Path, kinds: Sequence[Kind] = (), label: Label | None = None) -> tuple[Path, NamedSet]:
    """A local file as it is, or that of a public set, fetched into the cache; the set names the column asked for."""
    text, column = split_source(source)
    path, named = Path(text).expanduser(), find_set(source)
    if named is not None:
        if kinds and named.kind not in kinds:
            fitting = [name for name, item in prompt_sets().items() if item.kind in kinds]
            raise InputError(
                f"{named.name!r} is a set of {named.kind}, not of {' or '.join(kinds)}; those are {listed(fitting, 40)}"
            )
        if label is not None and named.label not in (None, label):
            raise InputError(
                f"{named.name!r} is a set of {named.label} prompts, and {label} ones are asked for; to use it "
                f"nevertheless, give the path of its file, {cache_path(named)}"
            )
        return fetch(named), named.model_copy(update={"column": column or named.column})
    if isinstance(source, str) and "/" not in text and kind_of(path) not in KINDS and not path.exists():
        known = prompt_sets()
        raise InputError(
            f"{text!r} is neither a file nor a known prompt set{nearest(text, known)}; the sets are {listed(known, 40)}"
        )
    return path, NamedSet(name=path.stem, file=str(path), column=column)  # The reader says what is wrong with it.


def _collect(
    table: Table, named: NamedSet, column: str, classes: _ClassColumn | None, label: Label | None, limit: int | None
) -> Reading:
    category = table.optional_column(COLUMNS["category"], besides=column)
    # A set may be one column, and a part of the rows, of a file of hundreds of megabytes.
    needed = dict.fromkeys((column, category, *named.keep, classes and classes.column))
    stem = f"{table.path.stem}-{file_digest(table.path)[:6]}"
    kept: dict[str, Prompt] = {}
    counts = dict.fromkeys(("rows", "empty", "duplicates", "left_out", "beyond_limit"), 0)
    for number, row in enumerate(table.rows([name for name in needed if name is not None])):
        counts["rows"] += 1
        if limit is not None and len(kept) >= limit:
            counts["beyond_limit"] += 1
            continue
        if not named.holds(row) or (classes is not None and classes.labels.get(_value(row, classes.column)) != label):
            counts["left_out"] += 1
            continue
        text = _cell(table.path, number, row, column, turns=True)
        key = text_key(text)
        if not key or key in kept:
            counts["duplicates" if key else "empty"] += 1
            continue
        cell = row.get(category) if category else None
        group = str(cell).strip() or None if isinstance(cell, str | int) else None
        kept[key] = Prompt(id=f"{stem}:{number}", text=text, label=label, category=group, source=named.name)
    return Reading(PromptSet(name=named.name, prompts=tuple(kept.values())), column, **counts)


def _cell(path: Path, number: int, row: Row, column: str, *, turns: bool = False) -> str:
    """The text of one row without outer white space; `""` when absent. With `turns`, the first of a list of turns."""
    cell = row.get(column)
    if turns and isinstance(cell, list):
        cell = next(iter(cast("list[object]", cell)), None)
    where = f"{path}, row {number}, column {column!r}"
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise InputError(f"{where}: expected text, found {cell!r:.60}; name the column of the text as {_COLUMN_HINT}")
    if "\0" in cell:
        raise InputError(f"{where}: character {cell.index(chr(0))} is NUL, which no text has; is the file UTF-8?")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is half of a surrogate pair; repair it") from error
    return cell.strip()


class _ClassColumn(NamedTuple):
    """A column whose values tell harmful prompts from harmless ones. A blank cell has no class."""

    column: str
    labels: Mapping[str, Label | None]


def _class_column(path: Path, columns: Sequence[str], *, besides: str) -> _ClassColumn | None:
    """The column that tells the classes apart; None where no column does. A column counts where its name is a usual one
    and each of its values names one class: a column of topics that happens to hold "harmful" does not."""
    known = [name for name in columns if name != besides and name.casefold() in _CLASS_COLUMNS]
    known.sort(key=lambda name: _CLASS_COLUMNS.index(name.casefold()))
    values: dict[str, set[str]] = {name: set() for name in known}
    for row in read_table(path).rows(known) if known else ():
        for name, found in values.items():
            found.add(_value(row, name))
    for name, found in values.items():
        # XSTest's types: those that begin with "contrast" are harmful, all others harmless.
        contrast = any(value.startswith("contrast_") for value in found)
        labels: dict[str, Label | None] = {value: _label(name.casefold(), value, contrast) for value in found - {""}}
        if labels and all(labels.values()):
            return _ClassColumn(name, labels)
    return None


def _label(column: str, value: str, contrast: bool) -> Label | None:
    if contrast:
        return "harmful" if value.startswith("contrast_") else "harmless"
    if column in _HARMFUL_IF_YES and value in _WORDS["yes"] + _WORDS["no"]:
        return "harmful" if (value in _WORDS["yes"]) == _HARMFUL_IF_YES[column] else "harmless"
    words = set(re.split(r"[^a-z]+", value))
    named: list[Label] = [label for label in ("harmful", "harmless") if not words.isdisjoint(_WORDS[label])]
    return named[0] if len(named) == 1 else None


def _value(row: Row, column: str) -> str:
    cell = row.get(column)
    return "" if cell is None else str(cell).strip().casefold()
