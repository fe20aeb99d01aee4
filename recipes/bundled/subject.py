"""The model that is measured: its SAEs, its prompts, and its judged answers, clean and under interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from demur.bundled import BundledJudge
from demur.judges import Judgement
from demur.method.direction import find_refusal_tokens
from demur.method.interventions import Compiled, Intervention
from demur.model import ChatModel
from demur.saes import Suite
from demur.stats import wilson
from demur.types import REFUSALS, Answer, Prompt, Rate
from recipes.bundled.prompts import draw_prompts

NEW_TOKENS: Final = 40
"""Room for every whole answer."""
OPENING_TOKENS: Final = 8
"""Enough to see whether an answer refuses: the judge reads that from its first words."""
_DIRECTION: Final = 128
_SELECTION: Final = 64
_TUNING: Final = 128


class Judged(Judgement):
    """Answers with their verdicts, in the order of the prompts. The bundled judge leaves none unscored."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(answer.prompt for answer in self.answers)

    @property
    def refused(self) -> tuple[bool, ...]:
        """Per answer."""
        return tuple(verdict.outcome in REFUSALS for verdict in self.verdicts)

    def unchanged(self, clean: Judged) -> Rate:
        """Share of answers that match the clean ones exactly."""
        same = [a.text == b.text for a, b in zip(self.answers, clean.answers, strict=True)]
        return wilson(sum(same), len(same))

    def where(self, refused: bool) -> tuple[Answer, ...]:
        """The answers that refuse, or those that do not."""
        return tuple(answer for answer, is_so in zip(self.answers, self.refused, strict=True) if is_so == refused)


def answered(
    model: ChatModel, prompts: Sequence[Prompt], change: Compiled | None = None, new_tokens: int = NEW_TOKENS
) -> Judged:
    """The model's answers, judged.

    Args:
        model: the bundled model, or one built like it.
        prompts: what to answer.
        change: what is done to the model meanwhile (None: nothing).
        new_tokens: limit on an answer's length.
    """
    with model.intervene(() if change is None else change):
        answers = tuple(model.generate(prompts, max_new_tokens=new_tokens))
    return Judged(judge=BundledJudge.kind, answers=answers, verdicts=tuple(BundledJudge().judge(answers)))


class Subject:
    """The model under measurement. `direction`, `selection` and `tuning` hold its clean answers to the harmful and to
    the harmless prompts of those purposes, on topics and in phrasings of the safety stage.
    """

    def __init__(self, model: ChatModel, suite: Suite, test_seed: int) -> None:
        self.model = model
        self.suite = suite
        self.sets = draw_prompts(test_seed=test_seed)
        ends = (_DIRECTION, _DIRECTION + _SELECTION, _DIRECTION + _SELECTION + _TUNING)
        self.direction = self._answered_part(0, ends[0])
        self.selection = self._answered_part(ends[0], ends[1])
        self.tuning = self._answered_part(ends[1], ends[2])
        self.test_harmful = answered(model, self.sets.test_harmful.prompts)
        self.test_harmless = answered(model, self.sets.test_harmless.prompts)

    def _answered_part(self, start: int, stop: int) -> tuple[Judged, Judged]:
        harmful, harmless = self.sets.harmful.prompts, self.sets.harmless.prompts
        return answered(self.model, harmful[start:stop]), answered(self.model, harmless[start:stop])

    def under(self, prompts: Sequence[Prompt], *changes: Intervention) -> Judged:
        """Answers under interventions."""
        return answered(self.model, prompts, Compiled(self.model, self.suite, changes))

    def refusal_under(self, prompts: Sequence[Prompt], *changes: Intervention) -> Rate:
        """The refusal rate under interventions, from the answers' openings alone."""
        return answered(self.model, prompts, Compiled(self.model, self.suite, changes), OPENING_TOKENS).refusal

    def refusal_ids(self) -> tuple[int, ...]:
        """First tokens of the model's own refusals."""
        harmful, harmless = self.direction
        refusals = [answer.text for answer in harmful.where(refused=True)]
        others = [answer.text for answer in harmless.answers]
        return tuple(token.token_id for token in find_refusal_tokens(self.model, refusals, others))


def behaved(answers: tuple[Judged, Judged]) -> tuple[list[Prompt], list[Prompt]]:
    """Harmful prompts that were refused, harmless ones that were not."""
    harmful, harmless = answers
    return [answer.prompt for answer in harmful.where(refused=True)], [
        answer.prompt for answer in harmless.where(refused=False)
    ]


__all__ = ["NEW_TOKENS", "OPENING_TOKENS", "Judged", "Subject", "answered", "behaved"]
