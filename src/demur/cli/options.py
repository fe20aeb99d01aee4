"""Commands whose options are the fields of a configuration class: names, groups, types, defaults and help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import get_annotations
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, cast, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from demur.studies.config import KindT, load_config
from demur.types import SplitSizes

Form = Literal["flag", "value", "values", "numbers"]
"""How an option is given: `--x/--no-x`; once; any number of times; as numbers with commas, any number of times."""

_WORDS: Final[dict[Any, str]] = {int: "INTEGER", float: "NUMBER", str: "TEXT", SplitSizes: "SIZES"}


class Option(click.Option):
    """One field of a configuration. What is given goes to the configuration as text. `meaning` is the docstring under
    the field, `written` its default as one would write it, empty where there is none."""

    def __init__(self, field: str, info: FieldInfo) -> None:
        self.field = field
        self.form, metavar = _form(_without_none(info.annotation))
        self.meaning = " ".join((info.description or "").split())
        self.written = "" if "(default" in self.meaning else _written(info, self.form)
        name = field.replace("_", "-")
        spelled = [f"--{name}/--no-{name}"] if self.form == "flag" else [f"--{name}"]
        short = [f"-{name}"] if len(name) == 1 else []
        text = f"{self.meaning} [default: {self.written}]" if self.written else self.meaning
        # A flag takes no metavar.
        more: dict[str, Any] = {"metavar": metavar} if metavar else {"default": None}
        many = self.form in ("values", "numbers")
        super().__init__([*short, *spelled, field], multiple=many, help=text, **more)


def options_of(config: type[BaseModel], argument: str = "model") -> dict[str, tuple[Option, ...]]:
    """The options of a configuration class by group (`group` of the class that declares the field), groups and fields
    in the order of their declaration. `argument` is the field that is given without a name, and so is no option."""
    groups: dict[str, dict[str, Option]] = {}
    placed: set[str] = {argument}
    for cls in _bases_first(config):
        # A class that only gives a field another default leaves it where it is.
        for name in get_annotations(cls):
            if name in config.model_fields and name not in placed:
                placed.add(name)
                group = groups.setdefault(str(getattr(cls, "group", "Options")), {})
                group[name] = Option(name, config.model_fields[name])
    return {group: tuple(members.values()) for group, members in groups.items()}


def _bases_first(cls: type) -> tuple[type, ...]:
    """The classes that `cls` is made of, each after its bases, bases in the order in which they are written."""
    return tuple(dict.fromkeys((*(each for base in cls.__bases__ for each in _bases_first(base)), cls)))


def _form(kind: Any) -> tuple[Form, str]:
    """How a field of this type is given, and the word for its value."""
    if kind is bool:
        return "flag", ""
    if get_origin(kind) is not tuple:
        return "value", _word(kind)
    item = _without_none(get_args(kind)[0])
    return ("numbers", "NUMBERS") if item in (int, float) else ("values", _word(item))


def _word(kind: Any) -> str:
    return "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else _WORDS.get(kind, "VALUE")


def _without_none(annotation: Any) -> Any:
    """The type itself, of `X | None` and of `Annotated[X, …]`."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return _without_none(kinds[0]) if NoneType in get_args(annotation) and len(kinds) == 1 else annotation


def _written(field: FieldInfo, form: Form) -> str:
    value: Any = None if field.is_required() else field.get_default(call_default_factory=True)
    if value is None or form == "flag":
        return "" if value is None else "yes" if value else "no"
    if isinstance(value, BaseModel):
        value = tuple(value.model_dump().values())
    parts = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
    return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


class ConfigCommand(click.Command):
    """A command made from a configuration class; its help shows the options under the groups of that class.

    Args:
        name: of the command.
        config: the configuration class.
        help: what the command does; the first line stands in the list of commands.
        run: called with argument, options and the command's own parameters by name, None or () where nothing was given.
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
        argument: str = "model",
        required: bool = False,
        own: Sequence[click.Option] = (),
    ) -> None:
        self.config, self.argument, self.own = config, argument, tuple(own)
        self.argument_help = " ".join((config.model_fields[argument].description or "").split())
        self.groups = options_of(config, argument)
        options = [option for members in self.groups.values() for option in members]
        first = click.Argument([argument], required=required)
        super().__init__(name, params=[first, *options, *own], callback=run, help=help)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the argument, each group of options, and the command's own options."""
        with formatter.section("Argument"):
            formatter.write_dl([(self.argument.upper(), self.argument_help)])
        last = [option for option in (*self.own, self.get_help_option(ctx)) if option]
        for group, members in (*self.groups.items(), ("Other options", last)):
            with formatter.section(group):
                formatter.write_dl(list(filter(None, (option.get_help_record(ctx) for option in members))))


def read_config(
    kind: type[KindT],
    file: Path | None,
    given: Mapping[str, Any],
    argument: str = "model",
    *,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> KindT:
    """What was given on the command line laid over a TOML file, if any; None and () are not given. Errors are those of
    `load_config`, in which fields are spelled as options, and `argument`, given without a name, in capitals. `complete`
    fills in settings that may be left out."""
    forms = {option.field: option.form for members in options_of(kind, argument).values() for option in members}
    options = {
        # Numbers are one text with commas, which the configuration reads as it does in a TOML file.
        name: ",".join(value) if forms.get(name) == "numbers" else value
        for name, value in given.items()
        if value not in (None, ())
    }

    def spelled(name: str) -> str:
        value = options[name]
        flag = name.upper() if name == argument else f"--{name.replace('_', '-')}"
        return f"{flag} {','.join(value) if isinstance(value, tuple) else value}"

    return load_config(file, options, kind, spelled=spelled, complete=complete)
