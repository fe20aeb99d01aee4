"""Write the reference pages that are made from the code: `python docs/make_reference.py [FOLDER]`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import click

from demur.cli.app import app
from demur.cli.options import ConfigCommand, Option

_WIDTH: Final = 110
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

CLI_INTRODUCTION = """# Command line

<!-- Made by `python docs/make_reference.py`; a test checks that it is up to date. -->

Results go to standard output; progress, warnings and errors to standard error. Exit status: 0 done; 1 `demur doctor`
found something broken; 2 an error that the message explains; 130 stopped by Ctrl-C, 143 by SIGTERM. A TOML file for
`--config` holds the same settings, with underscores for dashes: `max_new_tokens = 16`. Lists of numbers are written as
`0,-1,-3`, layers as `0-5,8,10`, both also in TOML.
"""

INTRODUCTION = """# Python

<!-- Made by `python docs/make_reference.py`; a test checks that it is up to date. -->

`import demur` loads nothing heavy; each name is imported when it is first used. What it offers comes first, in full.
Below are the public names of every room with the first sentence of their docstrings; `help(name)` has the rest.
"""


def cli_reference() -> str:
    """The page of commands, as Markdown, made from the commands themselves."""
    context = click.Context(app, info_name="demur")
    parts = [CLI_INTRODUCTION]
    shown: dict[tuple[Any, ...], str] = {}
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        if command is not None:
            parts += _command(command, click.Context(command, context, info_name=name), 2, shown)
    return "\n".join(parts).rstrip() + "\n"


def _command(
    command: click.Command, context: click.Context, level: int, shown: dict[tuple[Any, ...], str]
) -> Iterator[str]:
    """One command's heading, help, usage and options, then those of its own commands. `shown` remembers which command
    has shown a group of options, so that none is shown twice."""
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    yield f"{'#' * level} {context.command_path}\n\n{command.help or ''}\n\n```sh\n{usage}\n```\n"
    if isinstance(command, ConfigCommand):
        yield f"- **`{command.argument.upper()}`**: {command.argument_help}\n"
        # The options of a plan are those of the study that it plans.
        groups = {} if command.name == "plan" else command.groups
        for group, options in groups.items():
            rows = tuple(_row(option, context) for option in options)
            if shown.setdefault(rows, context.command_path) != context.command_path:
                yield f"**{group}**: as in `{shown[rows]}`.\n"
            else:
                yield _table(group, rows)
        yield _table("Other options", [_row(option, context) for option in command.own])
        return
    options = [each for each in command.params if isinstance(each, click.Option)]
    if options:
        yield _table("Options", [_row(option, context) for option in options])
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _command(inner, click.Context(inner, context, info_name=name), level + 1, shown)


def _row(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    """How an option is given, what it means, and its default."""
    given, meaning = option.get_help_record(context) or ("", "")
    return (given, option.meaning, option.written) if isinstance(option, Option) else (given, meaning, "")


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [f"**{title}**\n", "| option | meaning | default |", "|---|---|---|"]
    for given, meaning, default in rows:
        shown = f"`{default}`" if default else ""
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{given}`", meaning, shown)) + " |")
    return "\n".join(lines) + "\n"


def python_reference() -> str:
    """The page of public names, as Markdown."""
    parts = [INTRODUCTION, *_whole("demur")]
    for name in MODULES:
        parts += _listed(name)
    return "\n".join(parts).rstrip() + "\n"


def _names(module: ModuleType) -> list[str]:
    """The module's public names; without `__all__`, those that it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def _whole(place: str) -> Iterator[str]:
    """Every function and class of a module: signature and docstring."""
    module = import_module(place)
    yield f"## {place}\n"
    for name in _names(module):
        value = getattr(module, name)
        told = _markdown(inspect.getdoc(value) or "")
        yield f"### {place}.{name}\n\n```text\n{_signature(name, value)}\n```\n\n{told}\n"


def _listed(place: str) -> Iterator[str]:
    """The names of a module in a table."""
    module = import_module(place)
    yield f"## {place}\n\n{_first(inspect.getdoc(module) or '')}\n\n| name | what it is |\n|---|---|"
    for name in _names(module):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            told = _first(inspect.getdoc(value) or "").replace("|", "\\|")
            yield f"| `{name}` | {told} |"
    yield ""


def _first(docstring: str) -> str:
    """The first sentence."""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


def _signature(name: str, value: Any) -> str:
    """A function or class as it is called, annotations as they are written in the code."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    written = {
        key: text for cls in reversed(_classes(value)) for key, text in vars(cls).get("__annotations__", {}).items()
    }
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not {"*", "*args"} & {part[:5] for part in parts}:
            # Values of pydantic take keywords only, which their fields say already.
            parts += ["*"] if inspect.isfunction(value) else []
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation: object = written.get(parameter.name, parameter.annotation)
        annotation = getattr(annotation, "__forward_arg__", annotation)
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        parts.append(f"{stars}{parameter.name}: {annotation}{default}")
    result = f" -> {signature.return_annotation}" if inspect.isfunction(value) else ""
    whole = f"{name}({', '.join(parts)}){result}"
    return whole if len(whole) <= _WIDTH else f"{name}(\n    {(',' + chr(10) + '    ').join(parts)},\n){result}"


def _classes(value: object) -> tuple[type, ...]:
    return value.__mro__ if inspect.isclass(value) else ()


def _default(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float | tuple | None) else "…"


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


def main(folder: Path) -> None:
    """Write the pages into a folder."""
    (folder / "cli.md").write_text(cli_reference(), encoding="utf-8")
    (folder / "python.md").write_text(python_reference(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference")
