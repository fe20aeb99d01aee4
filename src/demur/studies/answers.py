"""Answers of a model to prompts, judged: computed once per run folder, and resumed where a kill left them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from demur.method.interventions import Compiled, Intervention, intervention_id
from demur.model import ChatModel, answer_batches
from demur.runs import Run
from demur.saes import Suite
from demur.stats import Estimate, rate_of
from demur.types import REFUSALS, Answer, Outcome, Prompt, PromptSet, Value, Verdict

Progress = Callable[[str, int, int], None]
"""`(what is done, done, total)`."""

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


class _Row(Value):
    """An answer as it is stored: the stage's key holds the prompts and the intervention."""

    prompt_id: str
    text: str
    finished: bool


class Answering:
    """Writes answers within a run: every prompt set under every change once.

    Args:
        run: where answers are kept.
        model, suite: what answers, and the SAEs that changes refer to.
        identity: content of the model, part of every key.
        max_new_tokens: length of an answer.
        progress: called as answers are written.
    """

    def __init__(
        self,
        run: Run,
        model: ChatModel,
        suite: Suite,
        *,
        identity: dict[str, Any],
        max_new_tokens: int,
        progress: Progress,
    ) -> None:
        self._run = run
        self._model = model
        self._suite = suite
        self._identity = identity
        self._max_new_tokens = max_new_tokens
        self._progress = progress

    def answer(self, label: str, prompts: PromptSet, change: Change = ()) -> tuple[Answer, ...]:
        """Answers to `prompts`, in their order; `label` names the work in progress bars."""
        name = intervention_id(change)
        depends = {
            "model": self._identity,
            "saes": self._suite.identity if change else None,
            "prompts": prompts.digest,
            "intervention": name,
            "max_new_tokens": self._max_new_tokens,
        }

        def compute(done: frozenset[str]) -> Iterator[list[_Row]]:
            # Compiled only now: it reads the features' rows.
            compiled = Compiled(self._model, self._suite, change)
            batches = answer_batches(
                self._model, prompts.prompts, compiled, max_new_tokens=self._max_new_tokens, done=done
            )
            for batch in batches:
                yield [_Row(prompt_id=each.prompt.id, text=each.text, finished=each.finished) for each in batch]

        rows = self._run.mapped(
            "answers",
            depends,
            _Row,
            prompts.ids,
            compute,
            key=lambda row: row.prompt_id,
            progress=lambda done, total: self._progress(label, done, total),
        )
        return tuple(
            Answer(prompt=prompt, text=row.text, intervention=name, finished=row.finished)
            for prompt, row in zip(prompts.prompts, rows, strict=True)
        )


__all__ = ["Answering", "Change", "JudgedAnswers", "Progress"]
