"""A command whose options are the fields of a configuration class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from pydantic import BaseModel

from demur.cli.options import Option, options_of


class ConfigCommand(click.Command):
    """A command made from a configuration class; its help shows the options under the groups of that class.

    Args:
        name: of the command.
        config: the configuration class.
        help: what the command does; the first line stands in the list of commands.
        run: called with the argument, the options and the command's own parameters by name, None or () where a value
            was not given.
        argument: the field that is given without a name.
        required: the argument must be given.
        own: parameters that are not part of the configuration, shown last.
    """

    def __init__(
        self,
        name: str,
        config: type[BaseModel],
        *,
        help: str,
        run: Callable[..., None],
        argument: str,
        required: bool = False,
        own: Sequence[click.Option] = (),
    ) -> None:
        self.config = config
        self.argument = argument
        self.argument_help = " ".join((config.model_fields[argument].description or "").split())
        self.groups = options_of(config, argument)
        self.own = tuple(own)
        params = [_click_option(option) for members in self.groups.values() for option in members]
        first = click.Argument([argument], required=required)
        super().__init__(name, params=[first, *params, *own], callback=run, help=help)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the argument, each group of options, and the command's own options."""
        with formatter.section("Argument"):
            formatter.write_dl([(self.argument.upper(), self.argument_help)])
        for group, members in self.groups.items():
            with formatter.section(group):
                formatter.write_dl([(spelling(option), option.text) for option in members])
        records = [parameter.get_help_record(ctx) for parameter in (*self.own, self.get_help_option(ctx)) if parameter]
        with formatter.section("Other options"):
            formatter.write_dl([record for record in records if record])


def spelling(option: Option) -> str:
    """How an option is given, as in a help page."""
    return " ".join(filter(None, (", ".join(option.flags).replace("/", " / "), option.metavar)))


def _click_option(option: Option) -> click.Option:
    if option.form == "flag":
        return click.Option([*option.flags, option.field], default=None, help=option.text)
    many = option.form in ("values", "numbers")
    return click.Option([*option.flags, option.field], metavar=option.metavar, multiple=many, help=option.text)


def path_option(flag: str, help: str, *, required: bool = False) -> click.Option:
    """An option whose value is a path."""
    return click.Option([flag], type=click.Path(path_type=Path), metavar="PATH", required=required, help=help)


__all__ = ["ConfigCommand", "path_option", "spelling"]
