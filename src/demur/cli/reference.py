"""The reference page of the command line, made from the commands themselves: `python -m demur.cli.reference [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from demur.cli.app import app
from demur.cli.command import ConfigCommand, spelling
from demur.cli.options import Option

INTRODUCTION = """# Command line

<!-- Made by `python -m demur.cli.reference docs/reference/cli.md`; a test checks that it is up to date. -->

Results go to standard output; progress, warnings and errors to standard error. Exit status: 0 done; 1 `demur doctor`
found something broken; 2 an error that the message explains; 130 stopped by Ctrl-C, 143 by SIGTERM. A TOML file for
`--config` holds the same settings, with underscores for dashes: `max_new_tokens = 16`. Lists of numbers are written as
`0,-1,-3`, layers as `0-5,8,10`, both also in TOML.
"""


def reference() -> str:
    """The page, as Markdown."""
    context = click.Context(app, info_name="demur")
    parts = [INTRODUCTION]
    shown: dict[tuple[Option, ...], str] = {}
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        if command is not None:
            parts += _command(command, click.Context(command, context, info_name=name), 2, shown)
    return "\n".join(parts).rstrip() + "\n"


def _command(
    command: click.Command, context: click.Context, level: int, shown: dict[tuple[Option, ...], str]
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
            if shown.setdefault(options, context.command_path) != context.command_path:
                yield f"**{group}**: as in `{shown[options]}`.\n"
            else:
                yield _table(group, [(spelling(option), option.help, option.default) for option in options])
        yield _table("Other options", _records(command.own, context))
        return
    options = [each for each in command.params if isinstance(each, click.Option)]
    if options:
        yield _table("Options", _records(options, context))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _command(inner, click.Context(inner, context, info_name=name), level + 1, shown)


def _records(options: list[click.Option] | tuple[click.Option, ...], context: click.Context) -> list[tuple[str, ...]]:
    records = (option.get_help_record(context) for option in options)
    return [(*record, "") for record in records if record is not None]


def _table(title: str, rows: list[tuple[str, ...]]) -> str:
    lines = [f"**{title}**\n", "| option | meaning | default |", "|---|---|---|"]
    for flag, meaning, default in rows:
        shown = f"`{default}`" if default else ""
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{flag}`", meaning, shown)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())
