"""A judge within a run: verdicts that cost something are kept, and what it failed on is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from demur.judges import CachedJudge, Judge
from demur.runs import Run
from demur.types import Answer, Prompt, Verdict

Progress = Callable[[str, int, int], None]
"""`(stage, done, total)`."""


class Judging(CachedJudge):
    """`CachedJudge` for callers that hold prompts and responses apart."""

    def __init__(self, run: Run, judge: Judge, progress: Progress, *, keep: bool = False) -> None:
        super().__init__(run, judge, progress, keep=keep or judge.costly)

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Verdict, ...]:
        """One verdict per response, in order; unscored where the judge fails."""
        pairs = zip(prompts, responses, strict=True)
        return self.judge([Answer(prompt=Prompt(id="", text=p), text=r) for p, r in pairs]).verdicts


__all__ = ["Judging", "Progress"]
