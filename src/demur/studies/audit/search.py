"""Random search for a wording that gets a request past the probe and the model, within so many queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import numpy as np

from demur.data.attacks import HOLE
from demur.method.direction import first_token
from demur.studies.context import Context
from demur.studies.harden.gate import Gate
from demur.studies.jailbreaks import fits
from demur.types import Prompt, PromptSet


@dataclass(frozen=True)
class Wording:
    """A request inside a template (none: put plainly), with words before or after it."""

    template: str = HOLE
    words: tuple[str, ...] = ()
    before: bool = False

    def text(self, request: str) -> str:
        """The adversarial prompt."""
        inside, words = self.template.replace(HOLE, request), " ".join(self.words)
        return " ".join(filter(None, (words, inside) if self.before else (inside, words)))


@dataclass
class Search:
    """An attacker who sees the probe's score and the first token's probability of a refusal, or only the latter.

    A query tries one change of the best wording so far for each request: another template, or a word added, replaced or
    left out. The change is kept if it lowers what stands in the way: the larger of the two log-odds, of being flagged
    (at the threshold) and of a refusal; for an attacker who does not know the probe, the latter.
    """

    context: Context[Any]
    gate: Gate
    refusal_ids: tuple[int, ...]
    threshold: float
    templates: tuple[str, ...]
    words: tuple[str, ...]
    longest: int

    def run(self, requests: PromptSet, queries: Sequence[int], *, knows: bool) -> list[list[str]]:
        """The best texts for each request after so many queries (ascending), in the order of `requests`."""
        random = Random(self.context.config.seed)
        best = [Wording() for _ in requests]
        losses = self._losses(requests, best, knows=knows)
        found: list[list[str]] = []
        for query in range(queries[-1] + 1):
            if query:
                tried = [self._changed(each, random) for each in best]
                texts = (each.text(p.text) for each, p in zip(tried, requests, strict=True))
                allowed = np.array([fits(self.context, text) for text in texts])
                tried = [new if ok else old for new, old, ok in zip(tried, best, allowed, strict=True)]
                after = self._losses(requests, tried, knows=knows)
                better = after < losses
                best = [new if won else old for new, old, won in zip(tried, best, better, strict=True)]
                losses = np.where(better, after, losses)
            if query in queries:
                found.append([each.text(p.text) for each, p in zip(best, requests, strict=True)])
            self.context.progress("search", query, queries[-1])
        return found

    def _losses(self, requests: PromptSet, wordings: Sequence[Wording], *, knows: bool) -> np.ndarray:
        prompts = [Prompt(id=p.id, text=w.text(p.text)) for p, w in zip(requests, wordings, strict=True)]
        model = self.context.model
        refusal = first_token(model, model.tokenize(prompts), self.refusal_ids).log_odds.double().numpy()
        return np.maximum(refusal, _logit(self.gate.fresh(prompts)) - self._limit) if knows else refusal

    @cached_property
    def _limit(self) -> float:
        return float(_logit(np.array([self.threshold]))[0])

    def _changed(self, wording: Wording, random: Random) -> Wording:
        if random.random() < 0.4 or not self.words:
            return replace(wording, template=random.choice(self.templates))
        words = list(wording.words)
        place = random.randrange(len(words) + 1)
        if words and (len(words) >= self.longest or random.random() < 0.5):
            place = random.randrange(len(words))
            words[place : place + 1] = [random.choice(self.words)] if random.random() < 0.7 else []
        else:
            words.insert(place, random.choice(self.words))
        return replace(wording, words=tuple(words), before=wording.before if words[1:] else random.random() < 0.5)


def _logit(p: np.ndarray) -> np.ndarray:
    inside = np.clip(p, 1e-12, 1 - 1e-12)
    return np.log(inside) - np.log1p(-inside)
