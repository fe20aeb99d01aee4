"""The column of a file that says which of its prompts are harmful, such as XSTest's `label`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from demur.data.tables import Row, read_table
from demur.types import Label

_COLUMNS = [
    "label",
    "labels",
    "class",
    "safety",
    "harmfulness",
    "prompt_label",
    "prompt_harm_label",
    "data_type",
    "type",
]
_YES_NO = {"is_harmful": True, "harmful": True, "unsafe": True, "toxic": True, "is_safe": False, "safe": False}
"""Columns of yes and no, and whether yes means harmful."""
_HARMLESS = frozenset({"harmless", "unharmful", "benign", "safe", "nontoxic"})
_HARMFUL = frozenset({"harmful", "unsafe", "malicious", "toxic", "jailbreak"})
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class ClassColumn:
    """A column whose values tell harmful prompts from harmless ones."""

    column: str
    contrast: bool = False
    """XSTest's types: those that begin with "contrast" are harmful, all others harmless."""

    @classmethod
    def of(cls, path: Path, columns: Sequence[str], *, besides: str) -> ClassColumn | None:
        """The column that tells the classes apart; None where no column does.

        A column counts where its name is a usual one and each of its values names a class: a column of topics that
        happens to hold "harmful" does not.
        """
        usual = (*_COLUMNS, *_YES_NO)
        ranked = sorted(
            (name for name in columns if name != besides and name.casefold() in usual),
            key=lambda name: usual.index(name.casefold()),
        )
        if not ranked:
            return None
        values: dict[str, set[str]] = {name: set() for name in ranked}
        for row in read_table(path).rows(ranked):
            for name in ranked:
                values[name].add(_text(row, name))
        return next(cls._candidates(values), None)

    @classmethod
    def _candidates(cls, values: dict[str, set[str]]) -> Iterator[ClassColumn]:
        for name, found in values.items():
            if any(value.startswith("contrast_") for value in found):
                yield cls(name, contrast=True)
            elif found - {""} and all(cls(name)._class(value) for value in found - {""}):
                yield cls(name)

    def label(self, row: Row) -> Label | None:
        """The class of a row; None where the cell is blank."""
        return self._class(_text(row, self.column))

    def _class(self, value: str) -> Label | None:
        if self.contrast:
            return "harmful" if value.startswith("contrast_") else "harmless" if value else None
        harmful = _YES_NO.get(self.column.casefold())
        if harmful is not None and value in _BOOLEANS:
            return "harmful" if _BOOLEANS[value] == harmful else "harmless"
        words = set(re.split(r"[^a-z]+", value))
        classes: set[Label] = {"harmful"} if words & _HARMFUL else set()
        classes |= {"harmless"} if words & _HARMLESS else set()
        return classes.pop() if len(classes) == 1 else None


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip().casefold()


__all__ = ["ClassColumn"]
