"""The command line called in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from demur.cli import main


class Ran(NamedTuple):
    """What a command left: its exit status, and what it wrote."""

    code: int
    out: str
    error: str

    @property
    def words(self) -> str:
        """Standard output with white space made single, so that wrapped lines can be searched."""
        return " ".join(self.out.split())


def run(*arguments: object) -> Ran:
    """Run `demur` with these arguments."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = main([str(each) for each in arguments])
    return Ran(code, out.getvalue(), error.getvalue())
