"""Options of a study, read off its configuration class: names, groups, types, defaults and help."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import get_annotations
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from demur.errors import InputError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

Form = Literal["flag", "value", "values", "numbers"]
"""How an option is given: `--x/--no-x`; once; any number of times; as numbers with commas, any number of times."""


@dataclass(frozen=True)
class Option:
    """One field of a configuration as an option.

    Attributes:
        field: the field's name, also in a TOML file.
        group: heading in help pages: `group` of the class that declares the field.
        help: the docstring under the field.
        form: how it is given.
        metavar: what stands for the value in help pages; empty for a flag.
        default: as one would write it; empty where there is none.
    """

    field: str
    group: str
    help: str
    form: Form
    metavar: str
    default: str

    @property
    def flags(self) -> tuple[str, ...]:
        """How it is spelled, the usual way first."""
        name = self.field.replace("_", "-")
        if self.form == "flag":
            return (f"--{name}/--no-{name}",)
        return (f"-{name}", f"--{name}") if len(name) == 1 else (f"--{name}",)

    @property
    def text(self) -> str:
        """Help with the default."""
        return f"{self.help} [default: {self.default}]" if self.default else self.help


def options_of(config: type[BaseModel], argument: str = "model") -> dict[str, tuple[Option, ...]]:
    """The options of a configuration class, by group, groups and fields in the order of their declaration.

    `argument` is the field that is given without a name, and so is no option.
    """
    groups: dict[str, dict[str, Option]] = {}
    placed: set[str] = {argument}
    for cls in _bases_first(config):
        group = str(getattr(cls, "group", "Options"))
        # A class that only gives a field another default leaves it where it is.
        for name in get_annotations(cls):
            if name in config.model_fields and name not in placed:
                placed.add(name)
                groups.setdefault(group, {})[name] = _option(name, config.model_fields[name], group)
    return {group: tuple(members.values()) for group, members in groups.items()}


def _bases_first(cls: type) -> tuple[type, ...]:
    """The classes that `cls` is made of, each after its bases, bases in the order in which they are written."""
    return tuple(dict.fromkeys((*(each for base in cls.__bases__ for each in _bases_first(base)), cls)))


def _option(name: str, field: FieldInfo, group: str) -> Option:
    form, metavar = _form(field)
    help_text = " ".join((field.description or "").split())
    return Option(name, group, help_text, form, metavar, "" if "(default" in help_text else _default(field, form))


def _form(field: FieldInfo) -> tuple[Form, str]:
    """How a field of this type is given, and the word for its value."""
    kind = _without_none(field.annotation)
    if kind is bool:
        return "flag", ""
    if get_origin(kind) is Literal:
        return "value", "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        item = _without_none(get_args(kind)[0])
        if item in (int, float):
            return "numbers", "NUMBERS"
        return "values", "|".join(map(str, get_args(item))) if get_origin(item) is Literal else "TEXT"
    words: dict[Any, str] = {int: "INTEGER", float: "NUMBER"}
    return "value", words.get(kind, "TEXT" if kind is str else "SIZES" if _is_model(kind) else "VALUE")


def _without_none(annotation: Any) -> Any:
    """The type itself, of `X | None` and of `Annotated[X, …]`."""
    if get_origin(annotation) is Annotated:
        return _without_none(get_args(annotation)[0])
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return _without_none(kinds[0]) if NoneType in get_args(annotation) and len(kinds) == 1 else annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _default(field: FieldInfo, form: Form) -> str:
    """The default as one would write it."""
    value: Any = field.get_default(call_default_factory=True) if not field.is_required() else None
    if value is None or value == ():
        return ""
    if form == "flag":
        return "yes" if value else "no"
    if isinstance(value, BaseModel):
        value = tuple(value.model_dump().values())
    return ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in _parts(value))


def _parts(value: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)


def read_config(
    kind: type[ConfigT],
    file: Path | None,
    given: Mapping[str, Any],
    *,
    argument: str = "model",
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> ConfigT:
    """A configuration from a TOML file, if any, with the options that were given laid over it.

    Args:
        kind: the configuration class.
        file: TOML file whose keys are field names.
        given: field → text, texts, or whether a flag was set; None and () are not given.
        argument: the field that is given without a name.
        complete: fills in settings that may be left out.

    Raises:
        InputError: the file cannot be read, or a value does not fit; names the option or the file's setting.
    """
    forms = {option.field: option.form for members in options_of(kind, argument).values() for option in members}
    options = {
        # Numbers are one text with commas, which the configuration reads as it does in a TOML file.
        name: ",".join(value) if forms.get(name) == "numbers" else value
        for name, value in given.items()
        if value not in (None, ())
    }
    try:
        return kind.model_validate(complete(_read_toml(file) | options))
    except ValidationError as error:
        problems = [_problem(each, kind, file, options, argument) for each in error.errors()]
        raise InputError("\n  ".join(dict.fromkeys(problems))) from None


def _read_toml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {file}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is not valid TOML: {error}") from error


def _problem(
    error: ErrorDetails, kind: type[BaseModel], file: Path | None, options: Mapping[str, Any], argument: str
) -> str:
    """One of pydantic's messages in plain words, with the option or the file's setting that it is about."""
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    if name in options:
        value: Any = options[name]
        shown = name.upper() if name == argument else f"--{name.replace('_', '-')}"
        return f"{shown} {','.join(value) if isinstance(value, tuple) else value}: {message}"
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, kind.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{file}: there is no setting {name!r}{hint}"
    return f"{file or 'configuration'}: {'.'.join(map(str, error['loc']))}: {message}"


__all__ = ["Form", "Option", "options_of", "read_config"]
