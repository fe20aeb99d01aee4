"""Errors a user can act on.

Every message names the thing that is wrong (file, row, layer, option), what was expected, and what to do next. The
command line prints the message alone, without a traceback, and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DemurError(Exception):
    """Base of all errors raised on purpose."""


class InputError(DemurError):
    """A prompt file, an option or a configuration value cannot be used."""


class ModelError(DemurError):
    """The model cannot be loaded, or does not do what a study needs of it."""


class SaeError(DemurError):
    """An SAE file is missing, malformed, or does not fit the model."""


class RunError(DemurError):
    """A run folder cannot be written, read or resumed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """For a message: `" (nearest: 'goal')"` with the known name most like `name`, or nothing when none is like it."""
    folded = {item.casefold(): item for item in known}
    match = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    return f" (nearest: {folded[match[0]]!r})" if match else ""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """For a message: the names, quoted, at most `limit` of them."""
    names = tuple(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"
