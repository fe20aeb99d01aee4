"""What a study shows: texts, tables, charts and answers, drawn alike on a terminal, in HTML and in Markdown.

A study's `sections(result)` returns these values; nothing here imports torch or a charting library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from demur.report.format import cell_text, token_text

if TYPE_CHECKING:
    from demur.stats import Estimate
    from demur.types import Rate


@dataclass(frozen=True)
class Text:
    """A paragraph. `verdict` is the study's finding in one or two sentences, `warning` a reason to doubt it."""

    text: str
    role: Literal["plain", "verdict", "warning", "note"] = "plain"


@dataclass(frozen=True)
class Column:
    """A column of a table. `help` explains the heading (unit, direction) in a few words."""

    name: str
    numeric: bool = False
    help: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text, one cell per column. `strong` lists the rows to emphasise (the study's own method). A `folded`
    table opens on a click where that is possible: long lists, and numbers that would tempt the reader to choose by test
    results."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    strong: frozenset[int] = frozenset()
    folded: bool = False

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: row {number} has {len(row)} cells for {len(self.columns)} columns")

    @classmethod
    def of(
        cls,
        title: str,
        columns: str | Sequence[str | Column],
        rows: Iterable[Sequence[str | int | Rate | Estimate | None]],
        *,
        caption: str = "",
        strong: Sequence[int] = (),
        folded: bool = False,
    ) -> Table:
        """A table from plain lists. Raises ValueError: a row with too few or too many cells.

        Args:
            title: what the table holds.
            columns: columns, or their text: `"name"`, `"> name"` for a numeric one (right-aligned), `"name: help"`;
                several in one text are parted by `" | "`.
            rows: cells, as many as there are columns: text, whole numbers, rates (in percent), or None.
            caption: how to read it.
            strong: indices of rows to emphasise.
            folded: open only on a click.
        """
        made = tuple(_column(each) for each in (columns.split(" | ") if isinstance(columns, str) else columns))
        return cls(title, made, tuple(tuple(map(cell_text, row)) for row in rows), caption, frozenset(strong), folded)


def _column(column: str | Column) -> Column:
    if isinstance(column, Column):
        return column
    name, _, text = column.removeprefix("> ").partition(": ")
    return Column(name, column.startswith("> "), text)


@dataclass(frozen=True)
class Chart:
    """A chart that is drawn only where charts can be shown: in the HTML report and by `result.chart()`. `draw` returns
    an altair chart, or None where there is nothing to draw, which leaves the block out."""

    title: str
    draw: Callable[[], Any]
    caption: str = ""


@dataclass(frozen=True)
class Transcript:
    """One prompt and the answers to it as `(tag, answer)`; the tag says under which condition it was written."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Transcripts:
    """Generated answers. Those to harmful prompts stay collapsed behind a notice, wherever they are shown."""

    title: str
    transcripts: tuple[Transcript, ...]
    harmful: bool


@dataclass(frozen=True)
class Token:
    """A token as it reads, and how strongly each of two kinds of features is active on it, from 0 to 1."""

    text: str
    upper: float = 0.0
    lower: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """Texts token by token, each token coloured by two activities: `names` says which. The upper half of a token shows
    the first, the lower half the second, so that they can be told apart without colours. `lines` are a label and its
    tokens."""

    title: str
    names: tuple[str, str]
    lines: tuple[tuple[str, tuple[Token, ...]], ...]
    caption: str = ""

    def strongest(self, line: int, which: int, count: int = 5) -> tuple[tuple[str, float], ...]:
        """The tokens of a line on which one of the two activities is highest, for where colours cannot be shown."""
        tokens = self.lines[line][1]
        ranked = sorted(
            ((t.text.strip() or token_text(t.text), (t.upper, t.lower)[which]) for t in tokens), key=lambda e: -e[1]
        )
        return tuple((text, value) for text, value in ranked[:count] if value >= WEAKEST)


WEAKEST = 0.05
"""Activities below this share of the strongest are not worth a word."""

Block = Text | Table | Chart | Transcripts | Tokens


@dataclass(frozen=True)
class Section:
    """A titled group of blocks. `brief` sections are what the terminal shows without `--full`; `intro` says in one or
    two sentences what is shown and how to read it."""

    title: str
    blocks: tuple[Block, ...]
    brief: bool = False
    intro: str = ""


@dataclass(frozen=True)
class Page:
    """A study's result as sections, with what it takes to run it again.

    Attributes:
        title, sections: what is shown.
        command, config: the command that made it, and its configuration as TOML.
        facts: name and value of what was studied and with what: model, SAEs, judge, versions, seconds, date.
    """

    title: str
    sections: tuple[Section, ...]
    command: str = ""
    config: str = ""
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The findings, which every view puts first."""
        return self._texts("verdict")

    @property
    def warnings(self) -> tuple[str, ...]:
        """The reasons to doubt them, which every view puts next; each once."""
        return tuple(dict.fromkeys(self._texts("warning")))

    @property
    def body(self) -> tuple[Section, ...]:
        """The sections without verdicts and warnings; those that hold nothing else are left out."""
        first = ("verdict", "warning")
        kept = (
            replace(each, blocks=tuple(b for b in each.blocks if not (isinstance(b, Text) and b.role in first)))
            for each in self.sections
        )
        return tuple(section for section in kept if section.blocks)

    def _texts(self, role: str) -> tuple[str, ...]:
        blocks = (block for section in self.sections for block in section.blocks)
        return tuple(block.text for block in blocks if isinstance(block, Text) and block.role == role)
