"""The column of a file that says which of its prompts are harmful, such as XSTest's `label`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demur.data.tables import Row, read_table
from demur.types import Label

_USUAL = ("label", "class", "safety", "harmfulness", "prompt_label", "prompt_harm_label", "data_type", "type")
_HARMLESS_WORDS = frozenset({"harmless", "unharmful", "benign", "safe", "nontoxic"})
_HARMFUL_WORDS = frozenset({"harmful", "unsafe", "malicious", "toxic", "jailbreak"})
_YES, _NO = frozenset({"true", "yes", "1"}), frozenset({"false", "no", "0"})
_HARMFUL_IF_YES = {"is_harmful": True, "harmful": True, "unsafe": True, "toxic": True, "is_safe": False, "safe": False}


@dataclass(frozen=True)
class ClassColumn:
    """A column whose values tell harmful prompts from harmless ones."""

    column: str
    labels: Mapping[str, Label | None]

    def label(self, row: Row) -> Label | None:
        """The class of a row; None where the cell is blank."""
        return self.labels.get(_value(row, self.column))


def find_class_column(path: Path, columns: Sequence[str], *, besides: str) -> ClassColumn | None:
    """The column that tells the classes apart; None where no column does.

    A column counts where its name is a usual one and each of its values names one class: a column of topics that
    happens to hold "harmful" does not.
    """
    usual = (*_USUAL, *_HARMFUL_IF_YES)
    known = [name for name in columns if name != besides and name.casefold() in usual]
    values: dict[str, set[str]] = {name: set() for name in sorted(known, key=lambda name: usual.index(name.casefold()))}
    for row in read_table(path).rows(known) if known else ():
        for name, found in values.items():
            found.add(_value(row, name))
    for name, found in values.items():
        # XSTest's types: those that begin with "contrast" are harmful, all others harmless.
        contrast = any(value.startswith("contrast_") for value in found)
        labels = {value: _label(name.casefold(), value, contrast) for value in found - {""}}
        if labels and all(labels.values()):
            return ClassColumn(name, labels)
    return None


def _label(column: str, value: str, contrast: bool) -> Label | None:
    if contrast:
        return "harmful" if value.startswith("contrast_") else "harmless"
    if column in _HARMFUL_IF_YES and value in _YES | _NO:
        return "harmful" if (value in _YES) == _HARMFUL_IF_YES[column] else "harmless"
    words = set(re.split(r"[^a-z]+", value))
    if bool(words & _HARMFUL_WORDS) == bool(words & _HARMLESS_WORDS):
        return None
    return "harmful" if words & _HARMFUL_WORDS else "harmless"


def _value(row: Row, column: str) -> str:
    cell = row.get(column)
    return "" if cell is None else str(cell).strip().casefold()
