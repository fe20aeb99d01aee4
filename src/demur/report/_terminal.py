"""Pages on a terminal: the finding, the doubts and the main table first, the rest on request.

No cell is ever cut: a table that is too wide is wrapped, and where that does not suffice, continued below itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from demur.report.blocks import Chart, Page, Section, Table, Text, Token, Tokens, Transcripts

if TYPE_CHECKING:
    from rich.console import RenderableType

WARNINGS: Final = 4
"""Warnings that a short screen shows; it says how many more there are."""

WEAK: Final = 0.15
"""Tokens on which both activities are weaker have no colour."""

_CONTROLS: Final = {code: None for code in (*range(32), 127, *range(128, 160)) if code not in {9, 10}}
"""Control characters, which could rewrite the screen from within an answer; tabs and line feeds are kept."""


def render_terminal(page: Page, *, full: bool, width: int | None = None) -> list[RenderableType]:
    """A page for rich's `console.print`, one item after another. With `full` every section; without it the findings,
    the first warnings and the `brief` sections, and a last line that names what was left out. `width` is the terminal's
    in columns, by default that of rich's own console."""
    from rich.console import Console

    room = Console().width if width is None else width
    warnings = page.warnings if full else page.warnings[:WARNINGS]
    more = len(page.warnings) - len(warnings)
    hidden = [f"{more} more warnings"] if more else []
    parts: list[RenderableType] = [_text(page.title, "bold")] if full else []
    parts += [_text(verdict, "bold") for verdict in page.verdicts]
    parts += [_text(f"warning: {warning}", "yellow") for warning in warnings]
    for section in page.body:
        if full or section.brief:
            parts += _section(section, full=full, room=room)
        else:
            hidden.append(section.title)
    if full:
        return parts + _repeat(page)
    return [*parts, _text(""), _text(f"--full also shows: {', '.join(hidden)}.", "dim")] if hidden else parts


def _section(section: Section, *, full: bool, room: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_text(""), _text(section.title, "bold underline")] if full else []
    if full and section.intro:
        parts.append(_text(section.intro))
    for block in section.blocks:
        match block:
            case Text():
                parts.append(_text(block.text, "dim" if block.role == "note" else ""))
            case Table():
                title = "" if full and block.title == section.title else block.title
                parts += render_table(block, title, full=full, width=room)
            case Transcripts():
                parts += _transcripts(block)
            case Tokens():
                parts += _tokens(block)
            case Chart():
                pass
    return parts


def _tokens(block: Tokens) -> list[RenderableType]:
    """Tokens on a ground of the colour of the stronger activity, and the strongest in words."""
    from rich.text import Text as Plain

    parts: list[RenderableType] = [_text(""), _text(block.title, "bold")]
    for number, (label, tokens) in enumerate(block.lines):
        line = Plain()
        for token in tokens:
            line.append(_clean(token.text.replace("\n", "⏎")), _ground(token))
        parts += [_text(label, "dim"), line]
        for which, name in enumerate(block.names):
            found = ", ".join(f"{text} {value:.2f}" for text, value in block.strongest(number, which))
            parts.append(Plain.assemble(_text(name, _GROUNDS[which]), _text(f": {found or 'none'}", "dim")))
    return [*parts, _text(block.caption, "dim")] if block.caption else parts


_GROUNDS: Final = ("black on #ffb27a", "black on #8cc4f2")
"""Of the first and the second activity."""


def _ground(token: Token) -> str:
    strongest = max(token.upper, token.lower)
    if strongest < WEAK:
        return ""
    return _GROUNDS[token.lower > token.upper] + (" bold underline" if strongest >= 0.5 else "")


def _transcripts(block: Transcripts) -> list[RenderableType]:
    if block.harmful:
        count = len(block.transcripts)
        prompts = f"{count} harmful prompt{'' if count == 1 else 's'}"
        return [_text(""), _text(f"{block.title}: answers to {prompts}, only in the report, collapsed.", "dim")]
    parts: list[RenderableType] = [_text(""), _text(block.title, "bold")]
    for each in block.transcripts:
        parts += [_text(""), _text(each.prompt, "bold")]
        for tag, answer in each.answers:
            parts += [_text(tag, "dim"), _text(answer)]
    return parts


def _repeat(page: Page) -> list[RenderableType]:
    lines = [f"{name}: {value}" for name, value in page.facts]
    lines += [f"command: {page.command}"] if page.command else []
    heading = [_text(""), _text("What was run, and how to repeat it", "bold underline")] if lines else []
    return [*heading, *map(_text, lines), *([_text(page.config)] if page.config else [])]


def render_table(table: Table, title: str = "", *, full: bool = False, width: int) -> list[RenderableType]:
    """A table for rich's `console.print`, in several pieces where it is wider than `width` columns. With `full` its
    columns are explained."""
    parts: list[RenderableType] = [_text(""), _text(title, "bold")] if title else []
    widths = [_widths(table, place) for place in range(len(table.columns))]
    parts += [_grid(table, places, [widths[place] for place in places], width) for places in _pieces(widths, width)]
    notes = [f"{column.name}: {column.help}" for column in table.columns if column.help] if full else []
    caption = "; ".join(filter(None, (table.caption.rstrip("."), *notes)))
    return [*parts, _text(f"{caption}.", "dim")] if caption else parts


def _widths(table: Table, place: int) -> tuple[int, int]:
    """What a column takes where words may wrap, and where nothing does."""
    from rich.cells import cell_len

    cells = [_clean(cell) for cell in (table.columns[place].name, *(row[place] for row in table.rows))]
    words = [word for cell in cells for word in cell.split()]
    lines = [line for cell in cells for line in cell.splitlines()]
    return max(map(cell_len, words), default=1), max(map(cell_len, lines), default=1)


def _pieces(widths: Sequence[tuple[int, int]], room: int) -> list[list[int]]:
    """The columns of each piece: one if they fit with words wrapped, else as many as fit without. Each piece after the
    first begins with the first column again."""
    every = list(range(len(widths)))
    if sum(least + 1 for least, _ in widths) - 1 <= room:
        return [every]
    pieces = [every[:1]]
    for place in every[1:]:
        taken = sum(widths[each][1] + 1 for each in pieces[-1])
        if taken + widths[place][1] > room and len(pieces[-1]) > 1:
            pieces.append(every[:1])
        pieces[-1].append(place)
    return pieces


def _grid(table: Table, places: Sequence[int], both: Sequence[tuple[int, int]], room: int) -> RenderableType:
    """Some columns of a table, with what `_widths` says of each."""
    from rich.table import Table as Grid

    gap = 2 if sum(natural + 2 for _, natural in both) - 2 <= room else 1
    grid = Grid(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for place, width in zip(places, _shared(both, room - gap * (len(places) - 1)), strict=True):
        column = table.columns[place]
        justify = "right" if column.numeric else "left"
        grid.add_column(_text(column.name), justify=justify, width=width, overflow="fold")
    for number, row in enumerate(table.rows):
        grid.add_row(*(_text(row[place]) for place in places), style="bold" if number in table.strong else "")
    return grid


def _shared(both: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Widths of columns that together keep within `room`: what is left beyond the least goes to as many as possible."""
    widths = [least for least, _ in both]
    # Where not even words fit, they are folded: the widest columns give way.
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    wanted = [natural - width for (_, natural), width in zip(both, widths, strict=True)]
    for place in sorted(range(len(widths)), key=wanted.__getitem__):
        widths[place] += max(min(wanted[place], room - sum(widths)), 0)
    return widths


def _clean(text: str) -> str:
    return text.translate(_CONTROLS)


def _text(text: str, style: str = "") -> Any:
    """Text as it is: nothing in it is taken for markup or a control sequence."""
    from rich.text import Text as Plain

    return Plain(_clean(text), style)
