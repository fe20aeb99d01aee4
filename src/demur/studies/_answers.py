"""Answers of a model to prompts, judged; computed once per run folder, and resumed where a kill left them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from demur.method.interventions import Compiled, Intervention, intervention_id
from demur.model import ChatModel, answer_batches
from demur.runs import Run
from demur.saes import Suite
from demur.stats import mcnemar, rate_of, wilson
from demur.studies._judging import Judging, Progress
from demur.studies.results import EffectRow, Kind, Method
from demur.types import REFUSALS, Answer, Outcome, Prompt, PromptSet, Rate, Verdict


@dataclass(frozen=True)
class Answers:
    """Answers to one prompt set under one intervention, in the set's order."""

    prompts: tuple[Prompt, ...]
    generations: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def refused(self) -> tuple[bool | None, ...]:
        """Per prompt: refused or not, None when unscored."""
        return tuple(None if v.outcome is None else v.outcome in REFUSALS for v in self.verdicts)

    @property
    def complied(self) -> tuple[bool | None, ...]:
        """Per prompt: complied or not by its outcome, whatever a judge says of harm besides; None when unscored."""
        return tuple(None if v.outcome is None else v.outcome is Outcome.COMPLIANCE for v in self.verdicts)

    @property
    def refusal(self) -> Rate:
        return rate_of(self.verdicts, REFUSALS)

    @property
    def compliance(self) -> Rate:
        return rate_of(self.verdicts, Outcome.COMPLIANCE)

    def counts(self) -> dict[Outcome, int]:
        """How many answers have each outcome."""
        return {outcome: sum(v.outcome == outcome for v in self.verdicts) for outcome in Outcome}

    def same_as(self, other: Answers) -> tuple[bool, ...]:
        """Per prompt: equal, letter for letter, to the other's answer."""
        return tuple(a.text == b.text for a, b in zip(self.generations, other.generations, strict=True))

    def unchanged(self, other: Answers) -> Rate:
        """Share of answers equal, letter for letter, to the other's."""
        return wilson(sum(self.same_as(other)), len(self.generations))

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Answers to several prompt sets as one."""
        return cls(
            tuple(p for part in parts for p in part.prompts),
            tuple(g for part in parts for g in part.generations),
            tuple(v for part in parts for v in part.verdicts),
        )

    def only(self, keep: Callable[[bool | None], bool]) -> PromptSet:
        """Prompts whose answer's `refused` satisfies `keep`."""
        kept = tuple(p for p, refused in zip(self.prompts, self.refused, strict=True) if keep(refused))
        return PromptSet(name="kept", prompts=kept)


class Answering:
    """Answers prompt sets within a run: every set under every intervention once."""

    def __init__(
        self,
        run: Run,
        model: ChatModel,
        suite: Suite,
        judging: Judging,
        *,
        identity: dict[str, Any],
        max_new_tokens: int,
        progress: Progress,
    ) -> None:
        self._run = run
        self._model = model
        self._suite = suite
        self.judging = judging
        self._identity = identity
        self._max_new_tokens = max_new_tokens
        self._progress = progress
        self.written = 0
        """Answers that this process has written."""
        self.found = 0
        """Answers that were there before it, and that it has used."""
        self._counted: set[str] = set()

    def answer(self, label: str, prompts: PromptSet, interventions: Sequence[Intervention] = ()) -> Answers:
        """Answers to `prompts`; `label` names the work in progress bars."""
        depends = {
            "model": self._identity,
            "saes": self._suite.identity if interventions else None,
            "prompts": prompts.digest,
            "intervention": intervention_id(interventions),
            "max_new_tokens": self._max_new_tokens,
        }
        stage = self._run.stage("answers", depends)
        known = len(prompts)
        if not stage.done:
            found = {row.prompt.id for row in stage.rows("answers", Answer)}
            known = len(found)
            # Compiled only now: it reads the features' rows.
            compiled = Compiled(self._model, self._suite, interventions)
            batches = answer_batches(
                self._model, prompts.prompts, compiled, max_new_tokens=self._max_new_tokens, done=frozenset(found)
            )
            for batch in batches:
                for answer in batch:
                    if answer.prompt.id not in found:
                        stage.append("answers", answer)
                        found.add(answer.prompt.id)
                self._progress(label, len(found), len(prompts))
            stage.finish()
        if stage.key not in self._counted:
            self._counted.add(stage.key)
            self.found += known
            self.written += len(prompts) - known
        rows = {row.prompt.id: row for row in stage.rows("answers", Answer)}
        generations = tuple(rows[prompt.id] for prompt in prompts.prompts)
        verdicts = self.judging.verdicts(prompts.texts, [generation.text for generation in generations])
        return Answers(prompts.prompts, generations, verdicts)


def effect_row(
    label: str,
    kind: Kind,
    method: Method,
    strength: float,
    answers: Answers,
    baseline: Answers | None = None,
    control: Answers | None = None,
    *,
    chosen: bool = False,
) -> EffectRow:
    """One row of the effects table.

    `baseline` gives what is unchanged and McNemar's test, `control` (matched random features) the second test; both on
    the same prompts.
    """
    return EffectRow.model_validate(
        {
            "prompts": label,
            "kind": kind,
            "method": method,
            "strength": strength,
            "refusal": answers.refusal,
            "compliance": answers.compliance,
            "outcomes": answers.counts(),
            "unscored": answers.refusal.unscored,
            "unchanged": None if baseline is None else answers.unchanged(baseline),
            "p_value": None if baseline is None else mcnemar(answers.refused, baseline.refused).p,
            "p_vs_random": None if control is None else mcnemar(answers.refused, control.refused).p,
            "chosen": chosen,
        }
    )


__all__ = ["Answering", "Answers", "effect_row"]
