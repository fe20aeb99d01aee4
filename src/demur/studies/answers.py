"""Answers of a model to prompts, judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from demur.method.interventions import Intervention
from demur.stats import Estimate, rate_of
from demur.types import REFUSALS, Answer, Outcome, Prompt, PromptSet, Verdict

Change = tuple[Intervention, ...]
"""What is done to the model: interventions that apply together."""


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers to one prompt set under one change, with a verdict on each, in the set's order."""

    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(answer.prompt for answer in self.answers)

    def _has(self, outcomes: frozenset[Outcome]) -> tuple[bool | None, ...]:
        return tuple(None if v.outcome is None else v.outcome in outcomes for v in self.verdicts)

    @property
    def refused(self) -> tuple[bool | None, ...]:
        """Per prompt: refused, partly or wholly; None when unscored."""
        return self._has(REFUSALS)

    @property
    def complied(self) -> tuple[bool | None, ...]:
        """Per prompt: complied, whatever a judge of harm says besides; None when unscored."""
        return self._has(frozenset({Outcome.COMPLIANCE}))

    @property
    def incoherent(self) -> tuple[bool | None, ...]:
        """Per prompt: neither refused nor complied, because the answer makes no sense; None when unscored."""
        return self._has(frozenset({Outcome.INCOHERENT}))

    @property
    def refusal(self) -> Estimate:
        return Estimate.of(rate_of(self.verdicts, REFUSALS))

    @property
    def compliance(self) -> Estimate:
        return Estimate.of(rate_of(self.verdicts, Outcome.COMPLIANCE))

    def counts(self) -> dict[Outcome, int]:
        """How many answers have each outcome."""
        return {outcome: sum(v.outcome == outcome for v in self.verdicts) for outcome in Outcome}

    def matches(self, other: JudgedAnswers) -> tuple[bool, ...]:
        """Per prompt: exact match with the other's answer."""
        return tuple(a.text == b.text for a, b in zip(self.answers, other.answers, strict=True))

    def only(self, keep: Callable[[Outcome | None], bool]) -> PromptSet:
        """Prompts whose answer has an outcome that `keep` accepts."""
        pairs = zip(self.prompts, self.verdicts, strict=True)
        return PromptSet(name="kept", prompts=tuple(prompt for prompt, verdict in pairs if keep(verdict.outcome)))

    @classmethod
    def joined(cls, parts: Sequence[JudgedAnswers]) -> JudgedAnswers:
        """Answers to several prompt sets as one."""
        return cls(
            tuple(answer for part in parts for answer in part.answers),
            tuple(verdict for part in parts for verdict in part.verdicts),
        )
