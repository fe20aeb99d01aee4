"""The prompts of the study: what trains and calibrates, and the sets that are measured."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from demur import data
from demur.data import AttackPair, adversarial_prompts
from demur.errors import InputError
from demur.studies.context import Context
from demur.studies.jailbreaks import configured_attacks, fits, offered_attacks, used_texts
from demur.studies.pipeline import Found
from demur.studies.probes.results import Kind
from demur.studies.side_effects import over_refusal_prompts
from demur.types import Prompt, PromptSet, text_key

_LONG_SHARE = 0.6
"""Share of the context that long inputs fill, at most."""
_LOUD_WORDS = 6
"""Harmful words that a long benign text is given."""
BEFORE, MIDDLE, AFTER = "request before long text", "request in long text", "request after long text"
LONG_BENIGN, LONG_WORDS = "benign request in long text", "long text with harmful words"


@dataclass(frozen=True)
class Chosen:
    """Plain prompts of the choosing splits with both targets' labels: `refuse` is nan where the answer is unscored."""

    prompts: PromptSet
    harmful: np.ndarray
    refuse: np.ndarray

    @classmethod
    def of(cls, found: Found, purpose: str) -> Chosen:
        """The prompts of one split, as the clean model answered them."""
        parts = list(zip((True, False), found.clean.answers[purpose], strict=True))
        prompts = tuple(
            answer.prompt.model_copy(update={"id": f"{label}/{answer.prompt.id}"})
            for label, judged in parts
            for answer in judged.answers
        )
        labels = [label for label, judged in parts for _ in judged.answers]
        refused = [np.nan if r is None else float(r) for _, judged in parts for r in judged.refused]
        return cls(PromptSet(name=purpose, prompts=prompts), np.array(labels), np.array(refused))

    @property
    def texts(self) -> tuple[str, ...]:
        return self.prompts.texts


@dataclass(frozen=True)
class Group:
    """A set of test prompts. `family` is what attacks of one kind share: `GCG` of `GCG/vicuna`. `requests` name, for
    each prompt, the plain request in it."""

    name: str
    kind: Kind
    positive: bool
    prompts: PromptSet
    family: str = ""
    requests: tuple[str, ...] = ()


class Sets(tuple[Group, ...]):
    """All test sets."""

    __slots__ = ()

    def of(self, *kinds: Kind) -> tuple[Group, ...]:
        """Those of some kinds."""
        return tuple(each for each in self if each.kind in kinds)

    @property
    def families(self) -> tuple[str, ...]:
        """Families of attacks, in their order."""
        return tuple(dict.fromkeys(each.family for each in self.of("attack")))

    def negatives(self, family: str | None = None) -> tuple[Group, ...]:
        """Plain benign prompts, and wrapped ones of a family (None: of all)."""
        plain = tuple(each for each in self.of("plain") if not each.positive)
        return (*plain, *(each for each in self.of("wrapped") if family in (None, each.family)))

    def positives(self, family: str | None = None) -> tuple[Group, ...]:
        """Adversarial harmful prompts of a family (None: of all)."""
        return tuple(each for each in self.of("attack") if family in (None, each.family))


def measured_sets(context: Context[Any]) -> Sets:
    """Plain prompts, attacks, the same wrappers around benign requests, over-refusal prompts, other benign prompts,
    long inputs; none of them chose anything."""
    test = context.splits.test
    return Sets(
        (
            Group("plain harmful", "plain", True, test.harmful),
            Group("plain benign", "plain", False, test.harmless),
            *_attack_sets(context),
            *_benign_sets(context),
            *_long_sets(context),
        )
    )


def _attack_sets(context: Context[Any]) -> Iterator[Group]:
    attacks, splits = configured_attacks(context.config.attacks), context.splits
    for attack, _, _, pairs in offered_attacks(context, attacks, splits.test.harmful, used_texts(splits.choosing)):
        if not pairs:
            continue
        family = attack.name.partition("/")[0]
        requests = tuple(text_key(pair.plain or pair.text) for pair in pairs)
        prompts = adversarial_prompts(pairs, attack.name)
        yield Group(attack.name, "attack", True, prompts, family, requests)
        wrapped = _wrapped(context, pairs)
        if wrapped:
            benign = PromptSet(name=f"wrapped {attack.name}", prompts=tuple(prompt for prompt, _ in wrapped))
            requests = tuple(request for _, request in wrapped)
            yield Group(f"benign in {attack.name}", "wrapped", False, benign, family, requests)


def _wrapped(context: Context[Any], pairs: Sequence[AttackPair]) -> list[tuple[Prompt, str]]:
    """The same texts around benign test requests, with the request in each."""
    requests = cycle(context.splits.test.harmless.prompts)
    found: list[tuple[Prompt, str]] = []
    for pair, request in zip(pairs, requests, strict=False):
        if pair.around is None:
            continue
        text = pair.with_request(request.text)
        if fits(context, text):
            found.append((Prompt(id=f"benign:{pair.id}", text=text, label="harmless"), text_key(request.text)))
    return found


def _benign_sets(context: Context[Any]) -> Iterator[Group]:
    config = context.config
    used = {text_key(p.text) for _, split in context.splits.choosing for _, each in split for p in each.prompts}
    if (over := over_refusal_prompts(config, context)) is not None:
        yield Group("over-refusal", "over-refusal", False, over)
    for source in config.benign:
        read = data.read_prompts(source, label="harmless")
        free = [p for p in read.prompts if text_key(p.text) not in used and fits(context, p.text)]
        if not free:
            raise InputError(f"--benign {source}: every prompt chose something or does not fit the model's context")
        if len(free) > config.n_benign:
            free = random.Random(config.seed).sample(free, config.n_benign)
        yield Group(read.name, "benign", False, PromptSet(name=read.name, prompts=tuple(free)))


def _long_sets(context: Context[Any]) -> Iterator[Group]:
    """A request before, in the middle of and after long benign text; a benign request in it; and long benign text with
    harmful words. The text is made of benign test prompts, or of `--long-text`."""
    config, test = context.config, context.splits.test
    if not config.n_long:
        return
    source = [text for name in config.long_text for text in data.read_texts(name, limit=500)]
    words = [word for text in source or test.harmless.texts for word in text.split()]
    length = _long_words(context, words)
    rng = random.Random(config.seed)
    loud = _loud_words(context)
    made: dict[str, list[Prompt]] = {name: [] for name in (BEFORE, MIDDLE, AFTER, LONG_BENIGN, LONG_WORDS)}
    pairs = zip(test.harmful.head(config.n_long), cycle(test.harmless.prompts), strict=False)
    for n, (harmful, benign) in enumerate(pairs):
        start = rng.randrange(len(words))
        text = list(islice(cycle(words), start, start + length))
        half = length // 2
        middle = (*text[:half], "{ask}", *text[half:])
        for name, frame, ask in (
            (BEFORE, ("{ask}", *text), harmful.text),
            (MIDDLE, middle, harmful.text),
            (AFTER, (*text, "{ask}"), harmful.text),
            (LONG_BENIGN, middle, benign.text),
        ):
            made[name].append(Prompt(id=f"{name}:{n}", text=" ".join(frame).replace("{ask}", ask)))
        for word in rng.sample(loud, min(_LOUD_WORDS, len(loud))):
            text.insert(rng.randrange(len(text)), word)
        made[LONG_WORDS].append(Prompt(id=f"{LONG_WORDS}:{n}", text=" ".join(text)))
    for name, prompts in made.items():
        kept = tuple(prompt for prompt in prompts if fits(context, prompt.text))
        if kept:
            positive = name in (BEFORE, MIDDLE, AFTER)
            yield Group(name, "long", positive, PromptSet(name=name, prompts=kept))


def _long_words(context: Context[Any], words: Sequence[str]) -> int:
    """Words of long inputs: as configured, and no more than a part of the context holds."""
    wanted = context.config.long_words
    limit = context.model.max_context
    if limit is None:
        return wanted
    sample = " ".join(islice(cycle(words), 200))
    per_word = len(context.model.chat.tokenize(sample)) / 200
    return max(1, min(wanted, int(_LONG_SHARE * limit / per_word)))


def _loud_words(context: Context[Any]) -> list[str]:
    """Words that harmful prompts of the choosing splits hold and harmless ones do not, the most frequent first."""
    counts: dict[str, int] = {}
    split = context.splits.direction
    ordinary = {word for text in split.harmless.texts for word in text.casefold().split()}
    for text in split.harmful.texts:
        for word in set(text.casefold().strip(".?!").split()) - ordinary:
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda word: (-counts[word], word))[:40]
