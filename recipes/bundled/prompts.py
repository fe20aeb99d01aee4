"""Prompt sets and plain texts drawn from the grammar of the bundled model's world."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from typing import Final

from demur.bundled import BundledPaths, BundledPrompts
from demur.types import Label, Prompt, PromptSet
from recipes.bundled.corpus import requests, statements, topics

SEED: Final = 7
"""Of the installed prompts."""
_TEXT_SEED: Final = 11
_TEXTS: Final = 1000
"""Installed texts."""


def draw_prompts(train: int = 320, test: int = 240, *, test_seed: int = SEED) -> BundledPrompts:
    """Draw prompt sets. Without arguments these are the installed ones, `demur.bundled.bundled_prompts()`.

    Args:
        train: prompts in each of `harmful` and `harmless` (at most about 400).
        test: prompts in each held-out set (at most about 300; `over_refusal` has at most 216).
        test_seed: draws the held-out sets. Another seed pairs the same held-out topics with other verbs and phrasings,
            as far as there are any: an act has nine held-out phrasings, and all of them are in every draw.
    """

    def draw(name: str, label: Label, *, over_refusal: bool = False, held_out: bool = True) -> PromptSet:
        wanted = (label, over_refusal, held_out)
        chosen = [each for each in topics() if (each.label, each.over_refusal, each.held_out) == wanted]
        count, seed = (test, test_seed) if held_out else (train, SEED)
        found = requests(chosen, 9 if held_out else 4, seed, held_out=held_out)
        random.Random(seed).shuffle(found)
        prompts = (
            Prompt(id=f"{name}-{row:03d}", text=text, label=label, category=topic.category, source="demur.bundled")
            for row, (topic, text) in enumerate(found[:count])
        )
        return PromptSet(name=name, prompts=tuple(prompts))

    return BundledPrompts(
        harmful=draw("harmful", "harmful", held_out=False),
        harmless=draw("harmless", "harmless", held_out=False),
        test_harmful=draw("test-harmful", "harmful"),
        test_harmless=draw("test-harmless", "harmless"),
        over_refusal=draw("over-refusal", "harmless", over_refusal=True),
    )


def draw_texts(count: int = _TEXTS) -> tuple[str, ...]:
    """Texts that say what several topics are and whether they hurt or help, the same every time."""
    rng = random.Random(_TEXT_SEED)
    return tuple(statements(topics(), rng).response for _ in range(count))


def write_prompts(place: BundledPaths) -> None:
    """Write the prompts and texts that are installed with a built model."""
    sets = draw_prompts()
    prompts = [prompt for field in fields(sets) for prompt in getattr(sets, field.name)]
    place.prompts.write_text("".join(f"{prompt.model_dump_json()}\n" for prompt in prompts), encoding="utf-8")
    place.texts.write_text("".join(f"{json.dumps({'text': text})}\n" for text in draw_texts()), encoding="utf-8")


__all__ = ["SEED", "draw_prompts", "draw_texts", "write_prompts"]
