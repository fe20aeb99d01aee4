"""How active harm and refusal features are on a prompt, in units of a refused prompt; and word by word.

A prompt's *signal* is the sum of its features' activations over the same sum, averaged over the refused harmful
selection prompts: 1 is a plain request that the model refuses. Harm features count at their maximum over the user's
words, refusal features at their mean over the template's tokens after them (paper, section 4.3). The *drop* from a
plain to an adversarial prompt is the difference of their signals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np

from demur.data import AttackPair
from demur.studies.roles import find_roles, harm_features
from demur.types import FeatureId, Prompt, PromptSet

if TYPE_CHECKING:
    from torch import Tensor

    from demur.model import Items
    from demur.studies.context import Change, Workspace
    from demur.studies.pipeline import Finding, Found

_Levels = list[tuple[float, ...]]
ByGradient = Literal["gradient", "ig"]
BY_GRADIENT: Final[tuple[ByGradient, ...]] = ("gradient", "ig")
"""How what a token does is estimated (`method.tokens`)."""


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

    def at_tokens(self, items: Items, change: Change = ()) -> list[Tensor]:
        """Activations at every token of each prompt under a change, shape (token, feature)."""
        from demur.method.activations import feature_activations
        from demur.method.interventions import bind

        with self.work.model.intervene(bind(self.work.suite, *change)):
            return feature_activations(self.work.model, self.work.suite, items, self.features)

    def levels(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """Level of each feature on each prompt under a change, shape (prompt, feature), in the SAE's units."""

        def compute() -> _Levels:
            items = self.work.model.tokenize(prompts)
            return [tuple(row) for row in self.reduced(items, self.at_tokens(items, change)).tolist()]

        depends = self.work.under(change) | {"prompts": prompts.digest, "features": self.features}
        depends |= {"harm": len(self.harm)}
        rows = self.work.cached("levels", depends, _Levels, compute, "levels of features") if len(prompts) else []
        return np.array(rows, dtype=np.float64).reshape(-1, len(self.features))

    def p_refuse(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """As `p_refuse`, of the model's refusals."""
        return p_refuse(self.work, prompts, self.refusal_ids, change)

    def reduced(self, items: Items, values: Sequence[Tensor]) -> np.ndarray:
        """Levels on prompts, shape (prompt, feature), from the activations at their tokens."""
        from demur.method.activations import over_regions
        from demur.model import Region

        harm = over_regions(items, values, [Region.INSTRUCTION])[:, : len(self.harm)]
        return np.hstack([harm, over_regions(items, values, [Region.POST_INSTRUCTION], "mean")[:, len(self.harm) :]])

    def signals(self, levels: np.ndarray) -> np.ndarray:
        """Harm and refusal signal of each row of levels, shape (prompt, 2); nan where there are no such features."""
        parts = (slice(len(self.harm)), slice(len(self.harm), None))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.stack([levels[:, part].sum(1) / self.reference[part].sum() for part in parts], 1)

    def read(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """Harm and refusal signal of each prompt under a change, shape (prompt, 2)."""
        return self.signals(self.levels(prompts, change))

    def token_effects(self, texts: Mapping[str, Parts], method: ByGradient) -> list[np.ndarray]:
        """What each part of each text (by id) takes from the refusal signal; an estimate by gradients with respect to
        the tokens of the parts (`method.tokens`)."""
        import torch

        from demur.method.tokens import token_effects
        from demur.model import Region

        work, unit = self.work, self.reference[len(self.harm) :].sum()

        def compute() -> _Levels:
            items = work.model.tokenize(Prompt(id=name, text=each.text) for name, each in texts.items())
            owners = [each.owners(work.model.chat.ends(each.text)) for each in texts.values()]
            varied: dict[str, Tensor] = {}
            for item, own in zip(items, owners, strict=True):
                varied[item.prompt_id] = torch.zeros(len(item), dtype=torch.bool)
                words = torch.tensor(item.regions) == Region.INSTRUCTION
                varied[item.prompt_id][words] = torch.from_numpy(own >= 0)
            scores = token_effects(work.model, work.suite, items, self.refusal, varied=varied, method=method)
            taken: _Levels = []
            for item, own, each, parts in zip(items, owners, scores, texts.values(), strict=True):
                known = each[torch.tensor(item.regions) == Region.INSTRUCTION].numpy()
                taken.append(tuple(float(-known[own == n].sum()) for n in range(len(parts.words))))
            return taken

        depends = {"texts": [(each.text, each.owner) for each in texts.values()], "features": self.refusal}
        depends |= {"method": method, "ids": list(texts)}
        rows = work.cached("token-effects", depends, _Levels, compute, f"tokens: {method}") if texts else []
        return [np.array(row) / unit for row in rows]


@dataclass(frozen=True)
class Parts:
    """A text in parts, words or several together, that can be left out. `owner[n]` is the part of the text's character
    `n`; −1: of none, it always stays."""

    text: str
    words: tuple[str, ...]
    owner: tuple[int, ...]

    @classmethod
    def of(cls, text: str, most: int) -> Parts:
        """At most so many parts, whole words; no part where the text is a single one."""
        pieces = re.findall(r"\s*\S+\s*", text)
        return cls.joined([pieces], most) if len(pieces) > 1 else cls(text, (), (-1,) * len(text))

    @classmethod
    def joined(cls, pieces: Sequence[Sequence[str]], most: int, between: str = "") -> Parts:
        """Pieces of text put together into at most so many parts; `between`, which always stays, stands after the first
        of several lists of pieces."""
        flat = [piece for each in pieces for piece in each]
        ends = sorted({round(end) for end in np.linspace(0, len(flat), min(most, len(flat)) + 1)})
        part = [n for n, (a, b) in enumerate(pairwise(ends)) for _ in range(a, b)]
        words = tuple("".join(flat[a:b]).strip() for a, b in pairwise(ends))
        split = len(pieces[0])
        owned = [(piece, n) for piece, n in zip(flat, part, strict=True)]
        owned.insert(split, (between, -1))
        return cls("".join(piece for piece, _ in owned), words, tuple(n for piece, n in owned for _ in piece))

    def first(self, count: int) -> str:
        """The text with only the first so many parts."""
        return "".join(c for c, n in zip(self.text, self.owner, strict=True) if n < count)

    def without(self, part: int) -> str:
        """The text with one part left out."""
        return "".join(c for c, n in zip(self.text, self.owner, strict=True) if n != part).strip()

    def owners(self, ends: Sequence[int]) -> np.ndarray:
        """The part of each token, of which `ends` has the places of the last characters."""
        return np.array([self.owner[min(end, len(self.owner) - 1)] for end in ends], dtype=int)


class WordEffects(NamedTuple):
    """What each part of a text takes from the signals, one row a part: the exact change of the harm and of the refusal
    signal and of P(refuse) when it is left out, and what gradients promise of the refusal signal's."""

    left_out: np.ndarray
    gradient: np.ndarray
    ig: np.ndarray


def word_effects(gauge: Gauge, texts: Mapping[str, Parts]) -> dict[str, WordEffects]:
    """What each part of each text (by id) does: measured by leaving it out, and estimated."""
    whole = PromptSet(name="whole", prompts=tuple(Prompt(id=name, text=each.text) for name, each in texts.items()))
    less = [
        Prompt(id=f"{name}~without {n}", text=each.without(n))
        for name, each in texts.items()
        for n in range(len(each.words))
    ]
    tables = [
        np.hstack([gauge.read(prompts), gauge.p_refuse(prompts)[:, None]]) if len(prompts) else np.zeros((0, 3))
        for prompts in (whole, PromptSet(name="words left out", prompts=tuple(less)))
    ]
    rows = np.split(tables[1], np.cumsum([len(each.words) for each in texts.values()])[:-1]) if texts else []
    gradient, ig = (gauge.token_effects(texts, method) for method in BY_GRADIENT)
    return {name: WordEffects(rows[n] - tables[0][n], gradient[n], ig[n]) for n, name in enumerate(texts)}


def p_refuse(work: Workspace[Any], prompts: PromptSet, refusal_ids: Sequence[int], change: Change = ()) -> np.ndarray:
    """Probability that the answer to each prompt begins with a refusal token, shape (prompt,)."""
    import torch

    return np.array(torch.tensor(log_odds(work, prompts, refusal_ids, change)).sigmoid().tolist())


def log_odds(work: Workspace[Any], prompts: PromptSet, refusal_ids: Sequence[int], change: Change = ()) -> list[float]:
    """Log-odds (nats) that the answer to each prompt begins with a refusal token; once per run folder."""
    from demur.method.direction import first_token
    from demur.method.interventions import Compiled

    model = work.model

    def compute() -> list[float]:
        compiled = Compiled(model, work.suite, change)
        return first_token(model, model.tokenize(prompts), refusal_ids, compiled).log_odds.tolist()

    depends = work.under(change) | {"prompts": prompts.digest, "refusal_ids": tuple(refusal_ids)}
    return work.cached("log-odds", depends, list[float], compute, "first tokens")


@dataclass(frozen=True)
class Walk:
    """An adversarial prompt as its words are added to the plain one, in reading order. `words[n]` is added from
    `texts[n]`, whose first is the plain prompt, to `texts[n + 1]`, whose last is the whole."""

    id: str
    parts: Parts

    @property
    def words(self) -> tuple[str, ...]:
        return self.parts.words

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.parts.first(count) for count in range(len(self.words) + 1))

    @classmethod
    def of(cls, pair: AttackPair, steps: int) -> Walk | None:
        """At most so many steps; a longer text is added several words at a time. None where the plain prompt does not
        stand in the adversarial one, or nothing is around it."""
        if pair.around is None:
            return None
        before, after = pair.around
        request = pair.text[len(before) : len(pair.text) - len(after)]
        pieces = [re.findall(r"\s*\S+\s*", before), re.findall(r"\s*\S+", after)]
        return cls(pair.id, Parts.joined(pieces, steps, request))

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
