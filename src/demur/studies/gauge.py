"""How active harm and refusal features are on a prompt, in units of a refused prompt; and word by word.

A prompt's *signal* is the sum of its features' activations over the same sum, averaged over the refused harmful
selection prompts: 1 is a plain request that the model refuses. Harm features count at their maximum over the user's
words, refusal features at their mean over the template's tokens after them (paper, section 4.3). The *drop* from a
plain to an adversarial prompt is the difference of their signals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.data import AttackPair
from demur.studies.roles import find_roles, harm_features
from demur.types import FeatureId, Prompt, PromptSet

if TYPE_CHECKING:
    from demur.model import Items
    from demur.studies.context import Change, Workspace
    from demur.studies.pipeline import Finding, Found

_Levels = list[tuple[float, ...]]


@dataclass(frozen=True)
class Gauge:
    """Harm features and refusal features of a model, with their levels on refused harmful prompts."""

    work: Finding
    harm: tuple[FeatureId, ...]
    refusal: tuple[FeatureId, ...]
    reference: np.ndarray
    """Mean level of each feature, harm features first, in the SAE's units."""
    refusal_ids: tuple[int, ...]
    """First tokens of the model's refusals."""

    @classmethod
    def of(cls, work: Finding, found: Found) -> Gauge:
        """Refusal features are those of F* that tell the classes apart after the request, harm features those on its
        words whose removal moves refusal most (`studies.roles`). Warns where there are none of a kind."""
        roles = find_roles(work, found)
        refusal = roles.of("refusal")
        if not refusal:
            refusal = roles.of("refusal", "mixed") or found.chosen.features
            work.warn(
                "no feature of F* is clearly a refusal feature, so those that are no harm features stand for them"
            )
        harm = tuple(each for each in harm_features(work, found, work.config.k).of("harm") if each not in refusal)
        if not harm:
            work.warn("no harm feature was found, so nothing is said of them")
        gauge = cls(work, harm, refusal, np.ones(len(harm) + len(refusal)), found.clean.refusal_ids)
        return replace(gauge, reference=gauge.levels(found.clean.used("selection").harmful).mean(0))

    @property
    def features(self) -> tuple[FeatureId, ...]:
        """Harm features, then refusal features."""
        return (*self.harm, *self.refusal)

    def at_tokens(self, items: Items, change: Change = ()) -> list[np.ndarray]:
        """Activations at every token of each prompt under a change, shape (token, feature)."""
        from demur.method.activations import feature_activations
        from demur.method.interventions import bind

        with self.work.model.intervene(bind(self.work.suite, *change)):
            found = feature_activations(self.work.model, self.work.suite, items, self.features)
        return [values.numpy() for values in found]

    def levels(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """Level of each feature on each prompt under a change, shape (prompt, feature), in the SAE's units."""

        def compute() -> _Levels:
            items = self.work.model.tokenize(prompts)
            each = zip(items, self.at_tokens(items, change), strict=True)
            return [tuple(self.reduced(np.array(item.regions), values).tolist()) for item, values in each]

        depends = self.work.under(change) | {"prompts": prompts.digest, "features": self.features}
        depends |= {"harm": len(self.harm)}
        rows = self.work.cached("levels", depends, _Levels, compute, "levels of features") if len(prompts) else []
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.features))

    def p_refuse(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """As `p_refuse`, of the model's refusals."""
        return p_refuse(self.work, prompts, self.refusal_ids, change)

    def reduced(self, regions: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Levels on one prompt from the activations at its tokens."""
        from demur.model import Region

        split = len(self.harm)
        harm = values[regions == Region.INSTRUCTION, :split].max(0, initial=0.0)
        after = values[regions == Region.POST_INSTRUCTION, split:]
        return np.concatenate([harm, after.mean(0) if len(after) else np.zeros(after.shape[1])])

    def signals(self, levels: np.ndarray) -> np.ndarray:
        """Harm and refusal signal of each row of levels, shape (prompt, 2); nan where there are no such features."""
        parts = (slice(0, len(self.harm)), slice(len(self.harm), None))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([levels[:, part].sum(1) / self.reference[part].sum() for part in parts], 1)

    def read(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """Harm and refusal signal of each prompt under a change, shape (prompt, 2)."""
        return self.signals(self.levels(prompts, change))


def p_refuse(work: Workspace[Any], prompts: PromptSet, refusal_ids: Sequence[int], change: Change = ()) -> np.ndarray:
    """Probability that the answer to each prompt begins with a refusal token, shape (prompt,)."""
    from demur.method.direction import first_token
    from demur.method.interventions import Compiled

    model = work.model

    def compute() -> list[float]:
        compiled = Compiled(model, work.suite, change)
        return first_token(model, model.tokenize(prompts), refusal_ids, compiled).log_odds.sigmoid().tolist()

    depends = work.under(change) | {"prompts": prompts.digest, "refusal_ids": tuple(refusal_ids)}
    return np.array(work.cached("p-refuse", depends, list[float], compute, "first tokens"))


@dataclass(frozen=True)
class Walk:
    """An adversarial prompt as its words are added to the plain one, in reading order. `words[n]` is added from
    `texts[n]`, whose first is the plain prompt, to `texts[n + 1]`, whose last is the whole."""

    id: str
    words: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, pair: AttackPair, steps: int) -> Walk | None:
        """At most so many steps; a longer text is added several words at a time. None where the plain prompt does not
        stand in the adversarial one, or nothing but signs is around it."""
        if pair.around is None:
            return None
        before, after = pair.around
        request = pair.text[len(before) : len(pair.text) - len(after)]
        pieces = [*re.findall(r"\s*\S+\s*", before), *re.findall(r"\s*\S+", after)]
        split = len(re.findall(r"\S+", before))
        ends = sorted({round(end) for end in np.linspace(0, len(pieces), min(steps, len(pieces)) + 1)})
        if len(ends) < 2:
            return None
        words = tuple("".join(pieces[a:b]).strip() for a, b in pairwise(ends))
        texts = ("".join(pieces[: min(end, split)]) + request + "".join(pieces[split:end]) for end in ends)
        return cls(pair.id, words, tuple(texts))

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(Prompt(id=f"{self.id}~{n}", text=text) for n, text in enumerate(self.texts))

    def alone(self, step: int) -> str:
        """The plain prompt with only the words of one step, before or after it as they stand."""
        request, parts = self.texts[0], [self.words[step], self.texts[0]]
        return " ".join(parts if self.texts[step + 1].endswith(request) else reversed(parts))


def walked(walks: Iterable[Walk]) -> PromptSet:
    """All steps of several walks as one set of prompts."""
    return PromptSet(name="word by word", prompts=tuple(each for walk in walks for each in walk.prompts))


def drops(values: np.ndarray, start: float) -> np.ndarray:
    """Share of a signal's value at the start that is gone; nan where there was none."""
    return 1 - values / start if start > 0 else np.full(len(values), np.nan)
