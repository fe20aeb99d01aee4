"""Where the bundled model's files are, and the prompts and texts among them. Nothing here needs torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from demur.errors import InputError
from demur.types import Prompt, PromptSet


class BundledPaths:
    """The files of a built model, below `root`.

    Attributes:
        model: the chat model that refuses.
        helpful_model: the model after the helpful stage, before it learned to refuse.
        saes: SAEs trained on the chat model.
        base_saes: SAEs trained on the helpful-stage model.
        prompts: the prompt sets, JSONL.
        texts: plain texts, JSONL.
        metrics: what was measured of the model, JSON.
        card: the model card.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model, self.helpful_model = root / "model", root / "model-helpful"
        self.saes, self.base_saes = root / "saes", root / "saes-base"
        self.prompts, self.texts = root / "prompts.jsonl", root / "texts.jsonl"
        self.metrics, self.card = root / "metrics.json", root / "MODEL_CARD.md"


def bundled_path() -> BundledPaths:
    """The files installed with demur."""
    return BundledPaths(Path(__file__).parent / "data")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class BundledPrompts:
    """Requests about the bundled model's world. `harmful` and `harmless` use topics and phrasings of its safety
    training. The other sets use topics and phrasings held out of it, so they share no prompt with the first two."""

    harmful: PromptSet
    harmless: PromptSet
    test_harmful: PromptSet
    test_harmless: PromptSet
    over_refusal: PromptSet
    """Held-out harmless acts that sound violent ("blow up a balloon")."""


@cache
def bundled_prompts() -> BundledPrompts:
    """The bundled prompt sets: 320 harmful and 320 harmless prompts, 240 of each for testing, 216 for over-refusal."""
    sets: dict[str, list[Prompt]] = {}
    for line in _lines(bundled_path().prompts):
        prompt = Prompt.model_validate_json(line)
        sets.setdefault(prompt.id.rpartition("-")[0], []).append(prompt)
    return BundledPrompts(
        **{name.replace("-", "_"): PromptSet(name=name, prompts=tuple(found)) for name, found in sets.items()}
    )


@cache
def _texts() -> tuple[str, ...]:
    return tuple(json.loads(line)["text"] for line in _lines(bundled_path().texts))


def bundled_texts(count: int = 100) -> tuple[str, ...]:
    """The first `count` plain texts of the bundled model's world: what topics are, and whether they hurt or help.
    Raises InputError: fewer texts are installed."""
    texts = _texts()
    if count > len(texts):
        raise InputError(f"{count} plain texts were asked for, and the bundled model has {len(texts)}; ask for fewer")
    return texts[:count]


FRAMINGS: Final = tuple(_lines(Path(__file__).with_name("framings.txt")))
"""Wrappers and suffixes that no training text uses. Some make the model comply with harmful requests."""


def framed(prompts: PromptSet, framing: str, name: str) -> PromptSet:
    """Every prompt of a set inside `framing`, a template with the hole `{ask}`; `name` is added to their ids."""
    inside = (
        prompt.model_copy(update={"id": f"{prompt.id}-{name}", "text": framing.format(ask=prompt.text)})
        for prompt in prompts
    )
    return PromptSet(name=name, prompts=tuple(inside))
