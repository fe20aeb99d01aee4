"""Reports as files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from demur.errors import RunError
from demur.report._html import render_html
from demur.report._markdown import render_markdown
from demur.report.blocks import Page


def write_report(pages: Sequence[Page], path: Path) -> Path:
    """Write one report of one or more results: Markdown if `path` ends in `.md`, else HTML; returns its path.

    In a folder the report is called `report.html`. The file appears whole or not at all.

    Raises:
        RunError: the file cannot be written.
        ValueError: no page is given.
    """
    path = path / "report.html" if path.is_dir() else path
    text = render_markdown(pages) if path.suffix == ".md" else render_html(pages)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise RunError(f"cannot write the report to {path}: {why}; name another place with --out") from error
    return path


__all__ = ["write_report"]
