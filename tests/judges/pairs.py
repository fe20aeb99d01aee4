"""Answers made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from demur.types import Answer, Prompt


def pairs(prompts: Sequence[str], responses: Sequence[str]) -> list[Answer]:
    """`responses[i]` as the answer to `prompts[i]`."""
    rows = enumerate(zip(prompts, responses, strict=True))
    return [Answer(prompt=Prompt(id=str(row), text=prompt), text=response) for row, (prompt, response) in rows]
