"""The application: its commands, and what becomes of errors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from demur import __version__
from demur.cli import _benchmark, _commands, _console, _data, _doctor, _plan, _study
from demur.errors import DemurError

FAILED = 2
STOPPED = 130


class _Group(TyperGroup):
    """Turns errors that a user can act on into one message, and Ctrl-C into a plain stop."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DemurError as error:
            _console.complain(str(error))
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            _console.complain("interrupted", "stopped")
            raise typer.Exit(STOPPED) from None


app = typer.Typer(
    name="demur",
    cls=_Group,
    help="Find, prove and use the sparse-autoencoder features that make a chat model refuse.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of a defect should be whole, and must not print prompts held in local variables.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool | None) -> None:
    if wanted:
        _console.say(f"demur {__version__}")
        raise typer.Exit


@app.callback()
def _main(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop."),
    ] = None,
) -> None:
    """Find, prove and use the sparse-autoencoder features that make a chat model refuse."""


app.command("study")(_study.study)
app.command("benchmark")(_benchmark.benchmark)
app.command("show")(_commands.show)
app.command("report")(_commands.report)
app.command("judge")(_commands.judge)
app.add_typer(_data.app, name="data")
app.command("plan")(_plan.plan)
app.command("doctor")(_doctor.doctor)


def main() -> None:
    """Entry point of the `demur` command."""
    app()
