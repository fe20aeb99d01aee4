"""A judge within a run: verdicts that cost something are kept, and what it failed on is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from demur.judges import CachedJudge, ClassifierJudge, Judge, LLMJudge, Streaming
from demur.runs import Run
from demur.types import Verdict

Progress = Callable[[str, int, int], None]
"""`(stage, done, total)`."""


class Judging:
    """One judge of a study.

    Args:
        run: where verdicts are kept.
        judge: whose verdicts. Those of one that costs time or money are kept, others are cheaper to reach anew.
        progress: of a judge that takes long.
        keep: keep the verdicts of any judge.
    """

    def __init__(self, run: Run, judge: Judge, progress: Progress, *, keep: bool = False) -> None:
        self.judge = judge
        self.made = 0
        """Verdicts given by this process."""
        self.found = 0
        """Verdicts that were there."""
        self._failed: dict[int, int] = {}
        self._problem: str | None = None
        self._progress = progress
        self._cached = CachedJudge(run, judge) if keep or isinstance(judge, Streaming) else None

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[Verdict, ...]:
        """One verdict per response, in order; unscored where the judge fails."""
        if self._cached is None:
            return tuple(self.judge.judge(prompts, responses))
        judged = self._cached.judge_rows(prompts, responses, self._progress)
        self.made += judged.new
        self.found += judged.cached
        # By what was asked, since the same answers may be read again.
        self._failed[hash((tuple(prompts), tuple(responses)))] = judged.failed
        self._problem = judged.problem or self._problem
        return judged.verdicts

    @property
    def complaint(self) -> str | None:
        """What a report must say of a judge that failed; None where it did not."""
        failed = sum(self._failed.values())
        if not failed:
            return None
        why = self._problem or "the verdicts in the run folder say why"
        return (
            f"the judge {self.judge.name} failed on {failed} answers, which count as unscored, never as a score "
            f"({why}); run the same command again to ask for them anew"
        )

    @property
    def spent(self) -> str | None:
        """Requests, tokens and price of a judge behind an endpoint, in words; None where nothing was asked."""
        if isinstance(self.judge, LLMJudge) and self.judge.spent.requests:
            return str(self.judge.spent)
        return None

    def close(self) -> None:
        """Free the model of a local judge."""
        if isinstance(self.judge, ClassifierJudge):
            self.judge.close()


__all__ = ["Judging", "Progress"]
