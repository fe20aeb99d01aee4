"""Canonical JSON for hashing, TOML for showing, and what must never be written to a run folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from demur.errors import RunError

if TYPE_CHECKING:
    from pydantic import JsonValue as JSON
else:
    JSON = Any  # Runtime type checkers cannot follow a type that holds itself.

HIDDEN = "(not recorded)"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SECRET_KEY = re.compile(
    r"^((hf|access|auth|api|bearer|hub|secret|private|id|refresh)_?)?token$"
    r"|(^|_)(api_?key|secret|secret_?key|private_?key|access_?key|password|passwd|credentials?|authorization)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{16})\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def to_json(value: object, where: str = "value") -> JSON:
    """Plain JSON data of mappings, sequences, strings, finite numbers and pydantic values. Raises RunError: something
    in it has no JSON form; `where` names the whole."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_plain))
    except (TypeError, ValueError) as error:
        raise RunError(f"{where} has no JSON form: {error}") from error


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(cast("Mapping[object, object]", value))
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def hash_of(value: object) -> str:
    """SHA-256, hex, of the canonical JSON: equal data have one text, keys sorted, no spaces."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_secrets(value: JSON) -> JSON:
    """`value` with tokens, keys and passwords blotted out, by the name of their key or by their form."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if item is not None and _SECRET_KEY.search(key) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return _SECRET_TEXT.sub(HIDDEN, value) if isinstance(value, str) else value


def as_toml(config: Mapping[str, Any]) -> str:
    """A configuration as TOML: top-level keys with inline values; None is left out, as TOML has no null."""
    return "".join(f"{entry}\n" for entry in _entries(config))


def _entries(table: Mapping[str, Any]) -> list[str]:
    names = {name: name if _BARE_KEY.fullmatch(name) else json.dumps(name) for name in table}
    return [f"{names[name]} = {_toml(value)}" for name, value in table.items() if value is not None]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_entries(cast('Mapping[str, Any]', value)))} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, cast('list[Any]', value)))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()  # TOML spells numbers, inf and nan as Python does.
    # A JSON string is a TOML basic string but for U+007F, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
