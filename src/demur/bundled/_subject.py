"""What the parts of the acceptance table share: the model with its SAEs, its prompts, and its clean answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from demur.bundled._judge import BundledJudge
from demur.bundled._prompts import bundled_prompts
from demur.method.direction import find_refusal_tokens
from demur.method.interventions import Compiled, Intervention
from demur.model import ChatModel, TokenizedPrompt, generate
from demur.saes import Suite
from demur.studies._answers import Answers
from demur.types import REFUSALS, Prompt, PromptSet, Rate

NEW_TOKENS: Final = 40
"""Room for every whole answer."""
OPENING_TOKENS: Final = 8
"""Enough to see whether an answer refuses: the judge reads that off its first words."""
_DIRECTION: Final = 128
_SELECTION: Final = 64
_TUNING: Final = 128


def answered(
    model: ChatModel, prompts: Sequence[Prompt], change: Compiled | None = None, new_tokens: int = NEW_TOKENS
) -> Answers:
    """The model's answers, judged."""
    generations = generate(model, prompts, change, max_new_tokens=new_tokens)
    verdicts = BundledJudge().judge([p.text for p in prompts], [each.text for each in generations])
    return Answers(tuple(prompts), tuple(generations), tuple(verdicts))


class Subject:
    """The model under measurement. `direction`, `selection` and `tuning` hold its clean answers to harmful and
    to harmless prompts of those purposes, on topics and in phrasings that the safety stage used.
    """

    def __init__(self, model: ChatModel, suite: Suite, test_seed: int) -> None:
        self.model = model
        self.suite = suite
        self.sets = bundled_prompts(test_seed=test_seed)
        ends = (_DIRECTION, _DIRECTION + _SELECTION, _DIRECTION + _SELECTION + _TUNING)
        self.direction = self._answered_part(0, ends[0])
        self.selection = self._answered_part(ends[0], ends[1])
        self.tuning = self._answered_part(ends[1], ends[2])
        self.test_harmful = answered(model, self.sets.test_harmful.prompts)
        self.test_harmless = answered(model, self.sets.test_harmless.prompts)

    def _answered_part(self, start: int, stop: int) -> tuple[Answers, Answers]:
        harmful, harmless = self.sets.harmful.prompts, self.sets.harmless.prompts
        return answered(self.model, harmful[start:stop]), answered(self.model, harmless[start:stop])

    def under(self, prompts: Sequence[Prompt], *changes: Intervention) -> Answers:
        """Answers under interventions."""
        return answered(self.model, prompts, Compiled(self.model, self.suite, changes))

    def refusal_under(self, prompts: Sequence[Prompt], *changes: Intervention) -> Rate:
        """The refusal rate under interventions, from the answers' openings alone."""
        return answered(self.model, prompts, Compiled(self.model, self.suite, changes), OPENING_TOKENS).refusal

    def render(self, prompts: PromptSet) -> list[TokenizedPrompt]:
        """Prompts as tokens."""
        return self.model.tokenize(prompts)

    def refusal_ids(self) -> tuple[int, ...]:
        """First tokens of the model's own refusals."""
        harmful, harmless = self.direction
        refusals = [
            each.text for each, v in zip(harmful.generations, harmful.verdicts, strict=True) if v.outcome in REFUSALS
        ]
        others = [each.text for each in harmless.generations]
        return tuple(token.token_id for token in find_refusal_tokens(self.model, refusals, others))


def used(answers: tuple[Answers, Answers]) -> tuple[PromptSet, PromptSet]:
    """Harmful prompts that were refused, harmless ones that were not."""
    harmful, harmless = answers
    return harmful.only(lambda refused: refused is True), harmless.only(lambda refused: refused is False)


__all__ = ["NEW_TOKENS", "OPENING_TOKENS", "Subject", "answered", "used"]
