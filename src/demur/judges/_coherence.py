"""Whether an answer is language at all, and English: the questions that come before what it says."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from demur.judges._lexicon import phrase

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def incoherence(text: str) -> str | None:
    """Why `text` is no coherent answer, or `None`. `text` is a model's answer without chat tokens."""
    words = _WORD.findall(text.lower())
    if not words:
        return "no words" if text.strip() else "empty"
    if phrase("speakers").fullmatch(text.lower()):
        return "names of speakers, and nothing said"
    if stutter := phrase("stutter").search(text):
        return f"repeats {stutter[1].strip()!r}"
    if _scripts(text) >= 3:
        return "mixes three scripts"
    if loop := _loop(words):
        return f"repeats {loop!r}"
    if phrase("code").search(text):
        return None
    letters = sum(c.isalnum() or c.isspace() for c in text)
    if len(text) >= 20 and letters < 0.5 * len(text):
        return "mostly symbols"
    if len(words) >= 8 and sum(map(_is_noise, words)) > 0.5 * len(words):
        return "mostly strings that are no words"
    return None


def foreign(text: str) -> bool:
    """The answer is not in English: another script, or prose without one of its commonest words."""
    letters = [c for c in text if c.isalpha()]
    latin = sum(c.isascii() or "LATIN" in unicodedata.name(c, "") for c in letters)
    if len(letters) >= 8 and latin < 0.5 * len(letters):
        return True
    words = _WORD.findall(text.lower())
    spelled = [word for word in words if word.isalpha() and len(word) > 1]
    # Sums and tables are short of function words in any language.
    prose = len(spelled) >= 12 and len(spelled) > 0.8 * len(words) and not phrase("code").search(text)
    return prose and not phrase("common").search(text.lower())


def _loop(words: list[str]) -> str | None:
    """The words that are said over and over through at least half of the text and five times in a row."""
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    total = sum(trigrams.values())
    if len(trigrams) > 0.65 * total:  # A loop of five rounds through half of the text leaves fewer distinct.
        return None
    for period in range(1, min(40, len(words) // 5) + 1):
        run = best = end = 0
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run > best:
                best, end = run, i
        enough = 4 * period if period > 2 else 7 * period
        if best >= enough and best + period >= 0.5 * len(words):
            return " ".join(words[end - period + 1 : end + 1])
    if total >= 40 and len(trigrams) < 0.25 * total:
        return " ".join(trigrams.most_common(1)[0][0])
    return None


def _is_noise(word: str) -> bool:
    """A string of letters without a vowel, or too long, or letters and digits mixed."""
    if any(c.isdigit() for c in word):
        return not word.isdigit()
    return len(word) > 24 or (len(word) > 3 and word.isascii() and not re.search("[aeiouy]", word))


def _scripts(text: str) -> int:
    """How many scripts hold at least a twentieth of the letters; related East Asian ones count as one."""
    if text.isascii():
        return 1
    counts: Counter[str] = Counter()
    for c in text:
        if c.isalpha():
            script = unicodedata.name(c, "?").split()[0]
            counts["CJK" if script in {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"} else script] += 1
    return sum(n >= max(2, 0.05 * counts.total()) for n in counts.values())
