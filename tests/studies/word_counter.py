"""A chat endpoint that labels features by counting words: what tells the strong examples of a request from its weak
ones. It reads a label by looking for its words. All it knows is what stands in the request."""

from __future__ import annotations

import re
from collections import defaultdict

WORD = re.compile(r"[^\W\d_]{3,}")


def _listed(block: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", block, re.MULTILINE)


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.replace("«", "").replace("»", "").casefold()))


def label(asked: str) -> str:
    """The words by whose presence the strong messages are told best from the weak ones: one after another, each that
    adds more to the share of strong messages found than to that of weak ones."""
    strong, weak = ([_words(text) for text in _listed(part)] for part in asked.split("It is weak on these:"))
    chosen: list[str] = []
    while len(chosen) < 12:
        left = [[words for words in side if not words & set(chosen)] for side in (strong, weak)]
        gains: dict[str, float] = defaultdict(float)
        for sign, side, whole in ((1, left[0], strong), (-1, left[1], weak)):
            for word in (word for words in side for word in words):
                gains[word] += sign / max(1, len(whole))
        best = max(gains, key=lambda word: (gains[word], word), default="")
        if not best or gains[best] <= 0:
            break
        chosen.append(best)
    return "messages that say " + ", ".join(chosen)


def read(asked: str) -> str:
    """Numbers of the messages that hold a word of the description."""
    description, messages = asked.split("Messages:")
    wanted = _words(description) - {"description", "messages", "that", "say"}
    fits = [str(n) for n, text in enumerate(_listed(messages), 1) if _words(text) & wanted]
    return ", ".join(fits) or "none"


def answer(asked: str) -> str:
    return read(asked) if asked.startswith("Description:") else label(asked)
