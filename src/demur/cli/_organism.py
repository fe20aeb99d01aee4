"""`demur organism`: the bundled model's own commands, loaded only when called."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer


def organism(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND ...", help="build, evaluate.", show_default=False)
    ] = None,
) -> None:
    """Build or evaluate the bundled model; `demur organism --help` lists the commands."""
    # Loaded here, so that other commands start without it; its options are its own and go on as they came.
    from demur.bundled import app

    code = app(args=list(arguments or []), prog_name="demur organism", standalone_mode=False)
    if isinstance(code, int) and code:
        raise typer.Exit(code)


PASS_ON: Final[dict[str, Any]] = {"ignore_unknown_options": True, "help_option_names": []}
"""Context settings that leave every argument, `--help` too, to the builder's own command line."""
