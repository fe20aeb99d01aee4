"""The phrases of `formats/lexicon.toml`, and an answer cut into the sentences in which they are looked for."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Final

_ENTRIES: Final[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "formats/lexicon.toml").read_text("utf-8"))
_LONGEST: Final = 600
"""Characters of a sentence that are looked at: its opening is what counts."""


@cache
def phrase(name: str) -> re.Pattern[str]:
    """The pattern of that name, for text in lower case."""
    return re.compile(_written_out(_ENTRIES[name]))


def _written_out(entry: str | list[str]) -> str:
    if isinstance(entry, str):
        one_line = re.sub(r"\s*\n\s*", "", entry)
        return re.sub(r"\(\?&(\w+)\)", lambda name: _written_out(_ENTRIES[name[1]]), one_line)
    any_of = f"(?:{'|'.join(map(_written_out, entry))})"
    return f"(?:{any_of}|{_written_out(_ENTRIES['lead'])}{any_of})"


def clean(text: str) -> str:
    """`text` with plain quotes and without chat tokens, speaker names, or marks before the first word."""
    for pattern, instead in _ENTRIES["clean"]:
        text = re.sub(_written_out(pattern), instead, text)
    return text.strip()


def sentences(cleaned: str, limit: int) -> list[str]:
    """The first `limit` sentences, in lower case, without marks before their first words."""
    found: list[str] = []
    for part in phrase("sentence_end").split(cleaned.lower()):
        sentence = " ".join(phrase("marks").sub("", part[:_LONGEST]).replace("*", "").split())
        if sentence:
            found.append(sentence)
        if len(found) == limit:
            break
    return found
