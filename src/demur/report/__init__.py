"""Reports: what studies show, as one HTML page, as Markdown, in a notebook and on a terminal.

A study gives `blocks`; their numbers are written by `format` and drawn by `charts`. Importing this loads neither torch
nor the charting libraries.
"""

from demur.report._pages import notebook_html, render_html, render_markdown, write_report
from demur.report._terminal import render_table, render_terminal

__all__ = ["notebook_html", "render_html", "render_markdown", "render_table", "render_terminal", "write_report"]
