"""Prompt sets of the bundled model's world. Nothing here needs torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from demur.bundled import _lexicon as lexicon
from demur.bundled._corpus import Topic, requests, topics
from demur.types import Prompt, PromptSet

SEED: Final = 7
"""Of the draw of `bundled_prompts()`."""


@dataclass(frozen=True)
class BundledPrompts:
    """Requests about the bundled model's world.

    `harmful` and `harmless` use topics and phrasings that the safety stage used; the `test_` sets and
    `borderline` use topics and phrasings held out of it, so they share no prompt with the others.
    """

    harmful: PromptSet
    harmless: PromptSet
    test_harmful: PromptSet
    test_harmless: PromptSet
    borderline: PromptSet
    """Held-out harmless acts that sound violent ("blow up a balloon")."""


def _prompts(name: str, chosen: Sequence[Topic], per_topic: int, count: int, seed: int, *, held_out: bool) -> PromptSet:
    found = requests(chosen, per_topic, seed, held_out=held_out)
    random.Random(seed).shuffle(found)
    return PromptSet(
        name=name,
        prompts=tuple(
            Prompt(
                id=f"{name}-{row:03d}",
                text=text,
                label=topic.label,
                category=topic.category,
                source="demur.bundled",
            )
            for row, (topic, _, text) in enumerate(found[:count])
        ),
    )


def bundled_prompts(train: int = 320, test: int = 240, *, test_seed: int = SEED) -> BundledPrompts:
    """The bundled prompt sets, the same every time.

    Args:
        train: prompts in each of `harmful` and `harmless` (at most about 400).
        test: prompts in each held-out set (at most about 300; the borderline set has at most 216).
        test_seed: draws the held-out sets. Another seed pairs the same held-out topics with other verbs and phrasings,
            as far as there are any: an act has nine held-out phrasings, and all of them are in every draw.
    """

    def choose(label: str, *, borderline: bool, held_out: bool) -> list[Topic]:
        wanted = (label, borderline, held_out)
        return [each for each in topics() if (each.label, each.borderline, each.held_out) == wanted]

    def make(name: str, label: str, per_topic: int, *, borderline: bool = False, held_out: bool = True) -> PromptSet:
        chosen = choose(label, borderline=borderline, held_out=held_out)
        count, seed = (test, test_seed) if held_out else (train, SEED)
        return _prompts(name, chosen, per_topic, count, seed, held_out=held_out)

    return BundledPrompts(
        harmful=make("harmful", "harmful", 4, held_out=False),
        harmless=make("harmless", "harmless", 4, held_out=False),
        test_harmful=make("test-harmful", "harmful", 9),
        test_harmless=make("test-harmless", "harmless", 9),
        borderline=make("borderline", "harmless", 9, borderline=True),
    )


def framed(prompts: PromptSet, framing: str, name: str) -> PromptSet:
    """Each prompt of a set inside one framing (a wrapper or a suffix template with the hole `{ask}`)."""
    return PromptSet(
        name=name,
        prompts=tuple(
            prompt.model_copy(update={"id": f"{prompt.id}-{name}", "text": framing.format(ask=prompt.text)})
            for prompt in prompts
        ),
    )


HELD_OUT_WRAPPERS: Final = lexicon.HELD_OUT_WRAPPERS
HELD_OUT_SUFFIXES: Final = lexicon.HELD_OUT_SUFFIXES
WRAPPERS: Final = lexicon.WRAPPERS
SUFFIXES: Final = lexicon.SUFFIXES

__all__ = [
    "HELD_OUT_SUFFIXES",
    "HELD_OUT_WRAPPERS",
    "SEED",
    "SUFFIXES",
    "WRAPPERS",
    "BundledPrompts",
    "bundled_prompts",
    "framed",
]
