"""Pages as GitHub-flavoured Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from demur.report._html import HARMFUL_NOTICE
from demur.report.blocks import Block, Chart, Page, Table, Text, Transcripts


def render_markdown(pages: Sequence[Page]) -> str:
    """The results of one or more studies as Markdown; charts are named, not drawn.

    Raises:
        ValueError: no page is given.
    """
    if not pages:
        raise ValueError("nothing to report: give at least one page")
    return "\n\n".join(part for page in pages for part in _page(page)) + "\n"


def _page(page: Page) -> list[str]:
    parts = [f"# {_line(page.title)}", *(f"**{_line(verdict)}**" for verdict in page.verdicts)]
    if page.warnings:
        parts.append("\n".join(["> **Before you rely on this**", ">", *(f"> - {_line(w)}" for w in page.warnings)]))
    for section in page.body:
        parts.append(f"## {_line(section.title)}")
        if section.intro:
            parts.append(_paragraphs(section.intro))
        for block in section.blocks:
            parts += _block(block, section.title)
    if page.facts or page.command:
        parts.append("## What was run, and how to repeat it")
    if page.facts:
        parts.append("\n".join(f"- {_line(name)}: {_line(value)}" for name, value in page.facts))
    parts += [_fenced(text, kind) for text, kind in ((page.command, "sh"), (page.config, "toml")) if text]
    return parts


def _block(block: Block, section: str) -> list[str]:
    match block:
        case Text():
            return [_paragraphs(block.text)]
        case Chart():
            return [f"*Chart “{_line(block.title)}”: see the HTML report.*"]
        case Table():
            parts = [_table(block), *([_paragraphs(block.caption)] if block.caption else [])]
            if block.folded:
                return _folded(f"{block.title}: {len(block.rows)} rows", parts)
            return [f"### {_line(block.title)}", *parts] if block.title not in {"", section} else parts
        case Transcripts():
            parts = [part for each in block.transcripts for part in _transcript(each.prompt, each.answers)]
            if block.harmful:
                parts = _folded(HARMFUL_NOTICE, parts)
            return [f"### {_line(block.title)}", *parts]


def _table(table: Table) -> str:
    lines = [
        [_line(column.name) for column in table.columns],
        ["---:" if column.numeric else "---" for column in table.columns],
    ]
    for number, row in enumerate(table.rows):
        cells = [_line(cell) for cell in row]
        lines.append([f"**{cell}**" if cell and number in table.strong else cell for cell in cells])
    explained = [f"- {_line(column.name)}: {_line(column.help)}" for column in table.columns if column.help]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([text, "\n".join(explained)]) if explained else text


def _transcript(prompt: str, answers: Sequence[tuple[str, str]]) -> list[str]:
    parts = [f"**Prompt**\n\n{_fenced(prompt)}"]
    return parts + [f"*{_line(tag)}*\n\n{_fenced(answer)}" for tag, answer in answers]


def _folded(summary: str, parts: Sequence[str]) -> list[str]:
    return [f"<details><summary>{html.escape(summary)}</summary>", *parts, "</details>"]


def _fenced(text: str, kind: str = "") -> str:
    """Text as it is, in a fence longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


def _line(text: str) -> str:
    """Text within a line or a cell."""
    return re.sub(r"\s*\n\s*", "<br>", _inline(text.strip()))


def _paragraphs(text: str) -> str:
    """Text by itself, in which no line begins a list, a heading or a rule."""
    plain = re.sub(r"^(\s*)([#+-])", r"\1\\\2", _inline(text), flags=re.MULTILINE)
    return re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", plain, flags=re.MULTILINE)


def _inline(text: str) -> str:
    """Text that Markdown and HTML take literally."""
    plain = re.sub(r"([\\`*_|~])", r"\\\1", html.escape(text, quote=False))
    # Brackets only make a link where one of these follows.
    return re.sub(r"\](?=[(\[:])", r"\\]", plain)


__all__ = ["render_markdown"]
