"""Progress on a terminal and off it."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from demur.cli.console import StageProgress


def report(console: Console) -> None:
    with StageProgress(console) as progress:
        progress("one [a]", 1, 2)
        logging.getLogger("demur.some.part").warning("mind [this]")
        progress("one [a]", 2, 2)
        progress("two", 1, 3)
        progress("three", 1, 1)


def lines(text: str) -> list[str]:
    return [line.split(",")[0].strip() for line in text.splitlines()]


def test_elsewhere_each_stage_leaves_one_line() -> None:
    console = Console(file=io.StringIO(), markup=False, highlight=False, width=80)
    report(console)
    assert isinstance(console.file, io.StringIO)
    assert lines(console.file.getvalue()) == ["warning: mind [this]", "one [a]: 2", "two: 3", "three: 1"]


def test_on_a_terminal_bars_go_and_the_lines_stay() -> None:
    console = Console(
        file=io.StringIO(), markup=False, highlight=False, width=80, force_terminal=True, color_system=None
    )
    report(console)
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "0/2 -:--:--" in written
    for line in ("warning: mind [this]", "one [a]: 2, ", "two: 3, ", "three: 1, "):
        assert line in written


def test_a_stage_that_was_cut_off_is_not_called_done() -> None:
    console = Console(file=io.StringIO(), markup=False, width=80)

    def fail() -> None:
        with StageProgress(console) as progress:
            progress("one", 1, 2)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
    assert logging.getLogger("demur").handlers == []
