"""Scores for every row of a file of prompts, one line per row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demur.data import PROMPT_COLUMNS, Table, read_table
from demur.errors import InputError, RunError
from demur.guard.artifact import Guard, GuardScore, Verdicts
from demur.model import Progress
from demur.runs import write_text
from demur.types import Prompt, Value


class ScoreCounts(Value):
    """How many rows had which verdict, and how many held no prompt."""

    rows: int
    verdicts: dict[Verdicts, int]
    flagged: int
    empty: int


def score_file(
    guard: Guard, path: str | Path, *, out: str | Path, prompt_column: str | None = None, progress: Progress = None
) -> ScoreCounts:
    """Score every row of a table (any format of `read_table`) and write one line per row, in order, to `out`.

    A line is `{"row": 0, "harmful": 0.98, "refuse": 0.03, "flagged": true, "verdict": "jailbreak"}`; a row without a
    prompt (an empty csv cell, a missing or null JSON entry) has null for all but `row`. `out` appears whole or not at
    all. Raises InputError: the file, a column or a cell cannot be used, or a prompt does not fit the model's context
    (file and row are named), or `out` is `path`; RunError: `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise InputError(f"--out {out} is the file of prompts itself; choose another name")
    if not out.parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {out.parent}")
    rows = list(_prompts(read_table(path), prompt_column))
    if not rows:
        raise InputError(f"{path} has no rows to score")
    given = [prompt for prompt in rows if prompt is not None]
    scores = iter(guard.score(given, progress))
    lines = [(number, None if prompt is None else next(scores)) for number, prompt in enumerate(rows)]
    write_text(out, "".join(_line(*line) for line in lines))
    found = [score for _, score in lines if score is not None]
    counts = Counter(score.verdict for score in found)
    return ScoreCounts(
        rows=len(rows),
        verdicts={name: counts[name] for name in ("harmless", "refused", "jailbreak", "over-refusal")},
        flagged=sum(score.flagged for score in found),
        empty=len(rows) - len(found),
    )


def _prompts(table: Table, prompt_column: str | None) -> Iterator[Prompt | None]:
    column = table.find_column(prompt_column, PROMPT_COLUMNS, what="a prompt", option="--prompt-column")
    for number, row in enumerate(table.rows((column,))):
        cell: Any = row.get(column)
        cell = cell[0] if isinstance(cell, list) and cell else cell  # The first turn.
        if not isinstance(cell, str | None):
            raise InputError(f"{table.path}, row {number}, column {column!r}: expected text, found {cell!r:.60}")
        yield None if not (cell and cell.strip()) else Prompt(id=f"{table.path.name}, row {number}", text=cell)


def _line(number: int, score: GuardScore | None) -> str:
    known = dict.fromkeys(GuardScore.model_fields) if score is None else score.model_dump()
    return json.dumps({"row": number, **known}) + "\n"
