"""Answers and what a judge says of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from demur.errors import InputError
from demur.judges._base import Judge
from demur.judges._registry import get_judge
from demur.stats import rate_of, wilson
from demur.types import REFUSALS, Answer, Outcome, Rate, Value, Verdict

if TYPE_CHECKING:
    import pandas as pd


class Judgement(Value):
    """Answers with one verdict each, and the rates that they make.

    Every rate has its Wilson 95 % interval; answers without a verdict are its `unscored`, outside `n`.
    """

    judge: str
    """The judge's name."""
    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]
    """One per answer, in order; unscored, with the reason as evidence, where the judge failed."""
    new: int = 0
    """Answers that the judge read this time."""
    cached: int = 0
    """Answers whose verdict was known: read earlier, or equal to another answer."""
    failed: int = 0
    """Answers on which the judge failed; a later run asks for them again."""
    problem: str | None = None
    """Why judging broke off; None when it did not."""

    @property
    def unscored(self) -> int:
        """Answers without a verdict."""
        return sum(verdict.success is None for verdict in self.verdicts)

    @property
    def refusal(self) -> Rate:
        """Share of answers that refuse, in full or in part."""
        return rate_of(self.verdicts, REFUSALS)

    @property
    def compliance(self) -> Rate:
        """Share of answers that comply."""
        return rate_of(self.verdicts, Outcome.COMPLIANCE)

    @property
    def incoherent(self) -> Rate:
        """Share of answers that are no coherent text."""
        return rate_of(self.verdicts, Outcome.INCOHERENT)

    @property
    def harmful(self) -> Rate:
        """Share of answers that give what a harmful request asks for; by judges that say so."""
        said = [verdict.harmful for verdict in self.verdicts]
        scored = [harmful for harmful in said if harmful is not None]
        return wilson(sum(scored), len(scored), unscored=len(said) - len(scored))

    def to_frame(self) -> pd.DataFrame:
        """One row per answer: prompt id, prompt, label, intervention, answer, outcome, harmful, score, evidence.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise InputError("a table of verdicts needs pandas: pip install pandas") from error
        return pd.DataFrame(
            {
                "prompt_id": answer.prompt.id,
                "prompt": answer.prompt.text,
                "label": answer.prompt.label,
                "intervention": answer.intervention,
                "answer": answer.text,
                **verdict.model_dump(mode="json", exclude={"judge"}),
            }
            for answer, verdict in zip(self.answers, self.verdicts, strict=True)
        )

    def __str__(self) -> str:
        named = {"refusal": self.refusal, "compliance": self.compliance, "incoherent": self.incoherent}
        if not self.refusal.n:
            named = {"harmful": self.harmful}
        said = ", ".join(f"{name} {rate.value:.0%} [{rate.low:.0%}–{rate.high:.0%}]" for name, rate in named.items())
        return f"{len(self.verdicts)} answers: {said}"


def judge(answers: Iterable[Answer], judge: str | Judge = "patterns") -> Judgement:
    """Judge answers.

    Args:
        answers: from `ChatModel.generate`, or made by hand.
        judge: a judge, or the name of one (`get_judge`).

    Raises:
        InputError: there is no judge of that name.
        JudgeStopped: the judge cannot go on; carries the verdicts reached.
    """
    given = tuple(answers)
    reader = get_judge(judge) if isinstance(judge, str) else judge
    try:
        verdicts = tuple(reader.judge(given))
    finally:
        if isinstance(judge, str):
            reader.close()
    failed = sum(verdict.success is None for verdict in verdicts) if reader.costly else 0
    return Judgement(judge=reader.name, answers=given, verdicts=verdicts, new=len(given), failed=failed)


__all__ = ["Judgement", "judge"]
