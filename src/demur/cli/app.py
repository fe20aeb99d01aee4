"""The application: its commands, each imported when it is called, and what becomes of errors and interruptions."""

from __future__ import annotations

import ast
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final, cast

import click

from demur import __version__
from demur.cli.console import complain
from demur.errors import DemurError
from demur.studies import STUDIES

FAILED: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143

_COMMANDS: Final = ("explain", "guard", "show", "report", "judge", "data", "saes", "plan", "doctor")
"""Commands besides studies: each is a module here, and its docstring its help."""

CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Terminated(KeyboardInterrupt):
    """SIGTERM: a stop like Ctrl-C, with the exit status of its own."""


class Commands(click.Group):
    """Studies and the commands beside them. Errors that a user can act on become one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return [*STUDIES, *_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name in _COMMANDS:
            return cast("click.Command", import_module(f"demur.cli.{cmd_name}").command)
        if cmd_name not in STUDIES:
            return None
        from demur.cli.studies import study_command

        return study_command(cmd_name, told(cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        if not name.startswith("-") and name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise click.UsageError(f"there is no command {name!r}; {hint}", ctx)
        if name == "plan" and args[1:] and args[1] in STUDIES:
            from demur.cli.plan import plan_command

            return name, plan_command(args[1]), args[2:]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, names in (("Studies", list(STUDIES)), ("Commands", _COMMANDS)):
            with formatter.section(title):
                formatter.write_dl([(name, told(name).partition("\n")[0]) for name in names])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DemurError as error:
            complain(str(error))
            ctx.exit(FAILED)
        except click.exceptions.Exit:
            raise
        except (MemoryError, RuntimeError) as error:
            from demur.model import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            complain(
                "memory ran out; use a smaller model, dtype or --max-batch-tokens, or another --device (`demur plan` "
                "says what a study holds). What a run folder has is kept: the same command goes on from there"
            )
            ctx.exit(FAILED)
        except KeyboardInterrupt as stop:
            complain(str(stop) or "nothing was written", "stopped")
            ctx.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)


def told(name: str) -> str:
    """What a command does: the docstring of its module, read without importing it; empty where it cannot be found."""
    place = f"demur.cli.{name}" if name in _COMMANDS else STUDIES.where(name)
    if place is None:
        # Registered in this process: its module is loaded.
        return cleandoc(sys.modules[STUDIES[name].run.__module__].__doc__ or "")
    try:
        spec = find_spec(place.partition(":")[0])
        source = "" if spec is None or spec.origin is None else Path(spec.origin).read_text(encoding="utf-8")
        return cleandoc(ast.get_docstring(ast.parse(source), clean=False) or "")
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""


@click.group("demur", cls=Commands, invoke_without_command=True, context_settings=CONTEXT)
@click.version_option(__version__, message="demur %(version)s", help="Print the version and stop.")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Find, prove and use the sparse-autoencoder features that make a chat model refuse."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on what follows `demur` (default: the process's own arguments); returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _terminable():
            status = app.main(args=given, obj=given, prog_name="demur", standalone_mode=False)
    except click.Abort:
        complain("nothing was written", "stopped")
        return INTERRUPTED
    except click.UsageError as error:
        path = "demur" if error.ctx is None else error.ctx.command_path
        complain(f"{error.format_message()}\nSee `{path} --help`")
        return FAILED
    return status if isinstance(status, int) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM a stop that is said, as Ctrl-C is, while the command line runs in the main thread."""

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
