"""A configuration as TOML text, so that what a report prints can be saved and run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast


def as_toml(config: Mapping[str, Any]) -> str:
    """`config` as top-level keys with inline values; None is left out, as TOML has no null."""
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in config.items() if value is not None)


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in table.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in cast("list[Any]", value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # TOML spells these as Python does, and wants a digit on both sides of a point, as repr gives.
        return repr(value)
    if isinstance(value, int):
        return str(value)
    # A JSON string is a TOML basic string but for U+007F, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
