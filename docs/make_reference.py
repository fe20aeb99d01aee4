"""Write the reference pages that are made from the code: `python docs/make_reference.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from demur.cli.reference import reference

FOLDER = Path(__file__).parent / "reference"
MODULES = (
    "demur.model",
    "demur.saes",
    "demur.saes.layouts",
    "demur.method.direction",
    "demur.method.attribution",
    "demur.method.selection",
    "demur.method.interventions",
    "demur.method.likelihood",
    "demur.capability",
    "demur.data",
    "demur.judges",
    "demur.runs",
    "demur.studies.base",
    "demur.studies.config",
    "demur.studies.context",
    "demur.studies.methods",
    "demur.studies.results",
    "demur.report",
    "demur.report.blocks",
    "demur.report.format",
    "demur.report.charts",
    "demur.stats",
    "demur.types",
    "demur.registry",
    "demur.errors",
    "demur.bundled",
    "demur.testing",
)
"""Public modules besides `demur` itself, in the order of the method."""

INTRODUCTION = """# Python

<!-- Made by `python docs/make_reference.py`; a test checks that it is up to date. -->

`import demur` loads nothing heavy; each name is imported when it is first used. What it offers comes first, in full.
Below are the public names of every room with the first sentence of their docstrings; `help(name)` has the rest.
"""


def python_reference() -> str:
    """The page of public names, as Markdown."""
    parts = [INTRODUCTION, *_whole("demur")]
    for name in MODULES:
        parts += _listed(name)
    return "\n".join(parts).rstrip() + "\n"


def _names(module: ModuleType) -> list[str]:
    """The module's public names; without `__all__`, those that it defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]


def _whole(place: str) -> Iterator[str]:
    """Every function and class of a module: signature and docstring."""
    module = import_module(place)
    yield f"## {place}\n"
    for name in _names(module):
        value = getattr(module, name)
        text = _markdown(inspect.getdoc(value) or "")
        yield f"### {place}.{name}\n\n```text\n{_signature(name, value)}\n```\n\n{text}\n"


def _listed(place: str) -> Iterator[str]:
    """The names of a module in a table."""
    module = import_module(place)
    yield f"## {place}\n\n{_first(inspect.getdoc(module) or '')}\n\n| name | what it is |\n|---|---|"
    for name in _names(module):
        value = getattr(module, name)
        told = inspect.getdoc(value) if inspect.isclass(value) or callable(value) else None
        yield f"| `{name}` | {_first(told or '').replace('|', chr(92) + '|')} |"
    yield ""


def _first(docstring: str) -> str:
    """The first sentence."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


def _signature(name: str, value: Callable[..., object]) -> str:
    try:
        return f"{name}{inspect.signature(value)}"
    except (TypeError, ValueError):
        return name


def _markdown(docstring: str) -> str:
    """A docstring with its sections as lists."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line in ("Args:", "Raises:", "Returns:", "Attributes:"):
            lines.append(f"**{line.removesuffix(':')}**\n")
            inside = True
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon else f"- {name}")
        elif inside and line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        else:
            inside = inside and not line
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "cli.md").write_text(reference(), encoding="utf-8")
    (FOLDER / "python.md").write_text(python_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
