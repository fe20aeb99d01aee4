"""Verdicts on a file of answers, one line per row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from demur.data import PROMPT_COLUMNS, Table, read_table
from demur.errors import InputError, RunError
from demur.judges._cached import JudgedRows, Progress, judge_rows
from demur.judges._local import ClassifierJudge
from demur.judges._names import get_judge
from demur.judges._protocol import Judge, JudgeStopped, Streaming
from demur.judges._rubric import LLMJudge
from demur.runs import Run, write_text
from demur.types import Outcome, Value, Verdict

RESPONSE_COLUMNS = (
    "response",
    "completion",
    "answer",
    "output",
    "generation",
    "generated_text",
    "model_output",
    "reply",
    "text",
)


class JudgeCounts(Value):
    """How many rows had which verdict."""

    judge: str
    gives: tuple[str, ...]
    """What the judge states: outcome, harmful, score."""
    rows: int
    outcomes: dict[Outcome, int]
    """Rows with each outcome; all 0 for a judge of harm alone."""
    harmful: int
    not_harmful: int
    unscored: int
    """Rows without a verdict, those without a response among them."""
    without_response: int
    failed: int = 0
    """Rows, of the unscored, on which the judge failed: the same command asks for them again."""
    kept: int = 0
    """Rows whose verdict was there from an earlier time."""
    cache: str | None = None
    """Where the verdicts of a judge that costs time or money are kept."""
    spent: str | None = None
    """Requests, tokens and price of a judge behind an endpoint."""


def judge_file(
    path: str | Path,
    *,
    judge: str | Judge,
    prompt_column: str | None = None,
    response_column: str | None = None,
    out: str | Path,
    progress: Progress | None = None,
) -> JudgeCounts:
    """Judge every row of a table (any format of `read_table`) and write one line per row, in order, to `out`.

    A line is `{"row": 0, "outcome": "refusal"}`; judges of harm add `harmful`, and `score` where they grade. A value is
    null where the judge cannot tell, where it failed on the row, and where there is no response (an empty csv cell, a
    missing or null JSON entry; an empty JSON string is one). `out` appears whole or not at all.

    The verdicts of a judge that costs time or money are kept in the folder `OUT.cache` as they come: the same call asks
    only for those that are missing.

    Args:
        path: the answers.
        judge: a judge, or its name (`get_judge`).
        prompt_column: found by its usual names when not given.
        response_column: found by its usual names when not given.
        out: the file to write.
        progress: called with (what, rows done, rows to do).

    Raises:
        InputError: the file, a column, a cell or the judge's name cannot be used, or `out` is `path`.
        RunError: `out` or its cache cannot be written.
        JudgeStopped: the judge cannot go on; what it judged is in the cache, and `out` is not written.
    """
    reader = get_judge(judge) if isinstance(judge, str) else judge
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise InputError(f"--out {out} is the file of answers itself; choose another name")
    table = read_table(path)
    prompts, responses = _columns(path, table, prompt_column, response_column)
    if not prompts:
        raise InputError(f"{path} has no rows to judge")
    if not out.parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {out.parent}")
    given = [row for row, text in enumerate(responses) if text is not None]
    cache = Path(f"{out}.cache") if isinstance(reader, Streaming) else None
    try:
        judged = _judged(reader, [prompts[r] for r in given], [responses[r] or "" for r in given], cache, progress)
    finally:
        if isinstance(judge, str) and isinstance(reader, ClassifierJudge):
            reader.close()
    by_row = dict(zip(given, judged.verdicts, strict=True))
    gives: tuple[str, ...] = getattr(reader, "gives", ("outcome",))
    write_text(out, "".join(_line(row, by_row.get(row), gives) for row in range(len(responses))))
    return JudgeCounts(
        judge=reader.name,
        gives=gives,
        rows=len(responses),
        outcomes={outcome: sum(v.outcome is outcome for v in judged.verdicts) for outcome in Outcome},
        harmful=sum(v.harmful is True for v in judged.verdicts),
        not_harmful=sum(v.harmful is False for v in judged.verdicts),
        unscored=len(responses) - len(given) + judged.unscored,
        without_response=len(responses) - len(given),
        failed=judged.failed,
        kept=judged.cached,
        cache=None if cache is None else str(cache),
        spent=str(reader.spent) if isinstance(reader, LLMJudge) else None,
    )


def _judged(
    judge: Judge, prompts: Sequence[str], responses: Sequence[str], cache: Path | None, progress: Progress | None
) -> JudgedRows:
    """Verdicts, through the cache where there is one.

    Raises:
        JudgeStopped: the judge cannot go on.
    """
    if cache is None:
        verdicts = tuple(judge.judge(prompts, responses))
        none = sum(verdict.success is None for verdict in verdicts)
        return JudgedRows(verdicts, new=len(verdicts), cached=0, unscored=none, failed=0, problem=None)
    with Run.open(cache, config={"command": "judge", "judge": judge.name}) as run:
        judged = judge_rows(run, judge, prompts, responses, progress)
        if judged.problem is not None:
            done = len(responses) - judged.failed
            raise JudgeStopped(
                f"{judged.problem}\n{done} of {len(responses)} answers are judged and kept in {cache}; the same "
                "command asks only for the others",
                judged.verdicts,
            )
        return judged


def _columns(
    path: Path, table: Table, prompt_column: str | None, response_column: str | None
) -> tuple[list[str], list[str | None]]:
    """Prompts and responses of every row."""
    prompt = table.find_column(prompt_column, PROMPT_COLUMNS, what="a prompt", option="--prompt-column")
    response = table.find_column(response_column, RESPONSE_COLUMNS, what="a response", option="--response-column")
    rows = list(table.rows((prompt, response)))
    prompts = [_text(path, i, row, prompt) or "" for i, row in enumerate(rows)]
    return prompts, [_text(path, i, row, response) for i, row in enumerate(rows)]


def _text(path: Path, number: int, row: Mapping[str, object], column: str) -> str | None:
    cell = row.get(column)
    if isinstance(cell, list) and cell:
        cell = cast("list[object]", cell)[0]
    if cell is None or isinstance(cell, str):
        return cell
    raise InputError(f"{path}, row {number}, column {column!r}: expected text, found {cell!r:.60}")


def _line(number: int, verdict: Verdict | None, gives: Sequence[str]) -> str:
    line: dict[str, Any] = {"row": number, "outcome": verdict.outcome if verdict else None}
    for field in ("harmful", "score"):
        if field in gives:
            line[field] = getattr(verdict, field) if verdict else None
    return json.dumps(line) + "\n"
