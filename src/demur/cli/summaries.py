"""What a command does, in the words of its module's docstring, read from the file without importing it."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path

from demur.studies import STUDIES


def docstring(module: str) -> str:
    """The docstring of a module; empty where it cannot be found."""
    try:
        spec = find_spec(module)
        source = "" if spec is None or spec.origin is None else Path(spec.origin).read_text(encoding="utf-8")
        return cleandoc(ast.get_docstring(ast.parse(source), clean=False) or "")
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""


def of_study(name: str) -> str:
    """The docstring of the module that holds a study."""
    place = STUDIES.where(name)
    if place is not None:
        return docstring(place.partition(":")[0])
    # Registered in this process: its module is loaded.
    return cleandoc(sys.modules[STUDIES[name].run.__module__].__doc__ or "")


__all__ = ["docstring", "of_study"]
