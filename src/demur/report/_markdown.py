"""Pages as GitHub-flavoured Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from demur.report._html import HARMFUL_NOTICE, template
from demur.report.blocks import Page


def render_markdown(pages: Sequence[Page]) -> str:
    """The results of one or more studies as Markdown; charts are named, not drawn.

    Raises:
        ValueError: no page is given.
    """
    if not pages:
        raise ValueError("nothing to report: give at least one page")
    filters = {"line": _line, "paragraphs": _paragraphs, "fenced": _fenced, "kind": lambda block: type(block).__name__}
    text: str = template("report.md.j2", autoescape=False, **filters).render(pages=pages, notice=HARMFUL_NOTICE)
    return text.rstrip("\n") + "\n"


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
