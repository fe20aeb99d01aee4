"""Verdicts on a file of answers, one line per row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demur.data import PROMPT_COLUMNS, Table, read_table
from demur.errors import InputError, RunError
from demur.judges._base import Judge, JudgeStopped, without_surrogates
from demur.judges._judgement import CachedJudge, Judgement, Progress, opened
from demur.judges._judgement import judge as judge_answers
from demur.judges._likelihood import Coherence, CoherentJudge
from demur.runs import Run, write_text
from demur.types import Answer, Outcome, Prompt, Value, Verdict

if TYPE_CHECKING:
    from demur.model import ChatModel

_CALIBRATION = 128
"""Prompts of a file that the clean model answers itself, at most."""
_ANSWER_COLUMNS = (
    "response", "completion", "answer", "output", "generation", "generated_text", "model_output", "reply", "text",
)  # fmt: skip


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
    """Rows without a verdict, those without an answer among them."""
    without_answer: int
    failed: int = 0
    """Rows, of the unscored, on which the judge failed: the same command asks for them again."""
    cached: int = 0
    """Rows whose verdict was known from an earlier run, or from an equal row."""
    cache: str | None = None
    """Where the verdicts of a judge that costs time or money are kept."""
    usage: str | None = None
    """Requests, tokens and price of a judge behind an endpoint."""
    coherence: Coherence | None = None
    """The limits beyond which an answer is incoherent, where the clean model was given."""


def judge_file(
    path: str | Path,
    *,
    judge: str | Judge,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    out: str | Path,
    model: ChatModel | None = None,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> JudgeCounts:
    """Judge every row of a table (any format of `read_table`) and write one line per row, in order, to `out`.

    A line is `{"row": 0, "outcome": "refusal"}`; judges of harm add `harmful`, and `score` where they grade. A value is
    null where the judge cannot tell, where it failed on the row, and where there is no answer (an empty csv cell, a
    missing or null JSON entry; an empty JSON string is one). `out` appears whole or not at all. What a judge that costs
    time or money says is kept in the folder `OUT.cache`: the same call asks only for what is missing. Raises
    InputError: the file, a column, a cell or the judge's name cannot be used, or `out` is `path`; RunError: `out` or
    its cache cannot be written; JudgeStopped: the judge cannot go on, and `out` is not written.

    Args:
        path, out: the answers, and the file to write.
        judge: a judge, or its name (`get_judge`).
        prompt_column, answer_column: found by their usual names when not given.
        model, max_new_tokens: the one that wrote the answers, without intervention: what it would not write is
            incoherent (`CoherentJudge`, by its own answers, of that length, to at most 128 of the file's prompts).
        progress: called with (what, rows done, rows to do).
    """
    with opened(judge) as reader:
        path, out = Path(path), Path(out)
        if out.exists() and path.exists() and out.samefile(path):
            raise InputError(f"--out {out} is the file of answers itself; choose another name")
        answers = list(_answers(read_table(path), prompt_column, answer_column))
        if not answers:
            raise InputError(f"{path} has no rows to judge")
        given = tuple(answer for answer in answers if answer is not None)
        if not out.parent.is_dir():
            raise RunError(f"{out} cannot be written: there is no folder {out.parent}")
        if model is not None:
            reader = _with_likelihood(reader, model, given, max_new_tokens)
        cache = Path(f"{out}.cache") if reader.costly else None
        judged = _judged(reader, given, cache, progress)
    verdicts = iter(judged.verdicts)
    lines = [_line(row, answer and next(verdicts), reader.gives) for row, answer in enumerate(answers)]
    write_text(out, "".join(lines))
    return JudgeCounts(
        judge=reader.name,
        gives=reader.gives,
        rows=len(answers),
        outcomes={outcome: sum(v.outcome is outcome for v in judged.verdicts) for outcome in Outcome},
        harmful=judged.harmful.k,
        not_harmful=judged.harmful.n - judged.harmful.k,
        unscored=len(answers) - len(given) + judged.unscored,
        without_answer=len(answers) - len(given),
        failed=judged.failed,
        cached=judged.cached,
        cache=None if cache is None else str(cache),
        usage=str(reader.usage) if reader.usage else None,
        coherence=reader.coherence if isinstance(reader, CoherentJudge) else None,
    )


def _with_likelihood(judge: Judge, model: ChatModel, answers: Sequence[Answer], max_new_tokens: int) -> CoherentJudge:
    """The judge, with an eye on what the clean model would write; its own answers to the file's prompts tell that."""
    texts = list(dict.fromkeys(answer.prompt.text for answer in answers))
    step = -(-len(texts) // _CALIBRATION)
    return CoherentJudge.of(judge, model, list(model.generate(texts[::step], max_new_tokens=max_new_tokens)))


def _judged(judge: Judge, answers: Sequence[Answer], cache: Path | None, progress: Progress | None) -> Judgement:
    if cache is None:
        return judge_answers(answers, judge)
    with Run.open(cache, config={"command": "judge", "judge": judge.name}) as run:
        judged = CachedJudge(run, judge, progress).judge(answers)
        if judged.problem is not None:
            raise JudgeStopped(
                f"{judged.problem}\n{len(answers) - judged.failed} of {len(answers)} answers are judged and kept in "
                f"{cache}; the same command asks only for the others",
                judged.verdicts,
            )
    return judged


def _answers(table: Table, prompt_column: str | None, answer_column: str | None) -> Iterator[Answer | None]:
    asked = table.find_column(prompt_column, PROMPT_COLUMNS, what="a prompt", option="--prompt-column")
    said = table.find_column(answer_column, _ANSWER_COLUMNS, what="an answer", option="--answer-column")
    for number, row in enumerate(table.rows((asked, said))):
        texts: list[str | None] = []
        for column in (asked, said):
            cell: Any = row.get(column)
            cell = cell[0] if isinstance(cell, list) and cell else cell
            if not isinstance(cell, str | None):
                place = f"{table.path}, row {number}, column {column!r}"
                raise InputError(f"{place}: expected text, found {cell!r:.60}")
            texts.append(None if cell is None else without_surrogates(cell))
        prompt = Prompt(id=f"{table.path.name}:{number}", text=texts[0] or "")
        yield None if texts[1] is None else Answer(prompt=prompt, text=texts[1])


def _line(number: int, verdict: Verdict | None, gives: Sequence[str]) -> str:
    line: dict[str, Any] = {"row": number, "outcome": verdict and verdict.outcome}
    for field in ("harmful", "score"):
        if field in gives:
            line[field] = getattr(verdict, field, None)
    return json.dumps(line) + "\n"
