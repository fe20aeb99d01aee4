"""Four disjoint splits of harmful and harmless prompts."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demur.data.prompts import read_prompts
from demur.errors import InputError
from demur.types import PURPOSES, Prompt, PromptSet, Split, Splits, SplitSizes, text_key

logger = logging.getLogger("demur.data")

_MINIMA = {"direction": 8, "selection": 4, "tuning": 4, "test": 4}

# Of AdvBench and JailbreakBench, this overlap finds the six pairs that differ in a word of no weight and not the next
# one ("a secure network", "a corporate network"). In a shorter prompt one changed word is another request.
_GRAM = 5
_OVERLAP = 0.75
_SHORTEST = 25
_WORD = re.compile(r"[^\W_]+")

Sources = str | Path | Sequence[str | Path]
"""`FILE`, `NAME` or either with `::COLUMN`; one or several."""


def load_prompts(
    harmful: Sources,
    harmless: Sources,
    *,
    test_harmful: Sources | None = None,
    test_harmless: Sources | None = None,
    n: SplitSizes | None = None,
    seed: int = 0,
) -> Splits:
    """Read harmful and harmless prompts and split them, no prompt in two places. Raises InputError: a source cannot be
    used, or see `make_splits`.

    Args:
        harmful, harmless: files or public sets, `SOURCE` or `SOURCE::COLUMN` (see `demur.data.read_prompts`).
        test_harmful, test_harmless: prompts of the test split (default: a part of the others).
        n: prompts per split and class (default: 128 direction, 32 selection, 32 tuning, 100 test).
        seed: decides which prompt goes where.
    """
    bad, good = read_prompts(harmful, label="harmful"), read_prompts(harmless, label="harmless")
    bad_test = None if test_harmful is None else read_prompts(test_harmful, label="harmful")
    good_test = None if test_harmless is None else read_prompts(test_harmless, label="harmless")
    sizes = n or SplitSizes()
    return make_splits(bad, good, sizes=sizes, seed=seed, test_harmful=bad_test, test_harmless=good_test)


def make_splits(
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    sizes: SplitSizes,
    seed: int,
    test_harmful: PromptSet | None = None,
    test_harmless: PromptSet | None = None,
) -> Splits:
    """Split both classes into direction / selection / tuning / test, no prompt in two places.

    Two prompts are one when they agree without case and spacing. A prompt's place does not depend on the order of the
    files. Prompts that are nearly those of the test split (three quarters of their five-character sequences in common)
    are dropped from the others, unless nearly all are, as where a template wrote them. With fewer prompts than wanted
    every split gets its minimum (8 direction, 4 of the others), then a share of the rest. What was dropped or fell
    short is in `Splits.warnings`, and logged on `demur.data`. Raises InputError: a prompt is both harmful and harmless,
    a class has too few prompts, or the seed is out of range.

    Args:
        harmful, harmless: all prompts of a class.
        sizes: prompts wanted per split and class.
        seed: decides which prompt goes where.
        test_harmful, test_harmless: stand in as the test split, and are removed from the other splits.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"the seed is {seed}; expected a whole number from 0 to 2**64 - 1")
    bad, good = _Class(harmful, test_harmful, sizes, seed), _Class(harmless, test_harmless, sizes, seed)
    _refuse_overlap(bad, good)
    parts, others = bad.parts(), good.parts()
    warnings = tuple(dict.fromkeys((*bad.warnings, *good.warnings)))
    for warning in warnings:
        logger.warning(warning)
    splits = {purpose: Split(harmful=parts[purpose], harmless=others[purpose]) for purpose in PURPOSES}
    return Splits(**splits, warnings=warnings)


@dataclass
class _Class:
    """The prompts of one class, on their way into four splits."""

    given: PromptSet
    given_test: PromptSet | None
    sizes: SplitSizes
    seed: int
    warnings: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.prompts = self._by_key(self.given)
        self.test_prompts = self._by_key(self.given_test) if self.given_test is not None else {}

    def _by_key(self, given: PromptSet) -> dict[str, Prompt]:
        found: dict[str, Prompt] = {}
        for prompt in given:
            found.setdefault(text_key(prompt.text), prompt)
        if len(found) < len(given):
            self.warnings.append(f"{given.name}: repeated prompts, each used once: {len(given) - len(found)}")
        return found

    def parts(self) -> dict[str, PromptSet]:
        """The four sets; InputError where there are too few prompts."""
        wanted = self.sizes.wanted()
        sizes = dict(wanted)
        rest = {key: prompt for key, prompt in self.prompts.items() if key not in self.test_prompts}
        if len(rest) < len(self.prompts):
            moved = f"{len(self.prompts) - len(rest)} of {len(self.prompts)}"
            self._warn(f"prompts taken out because {self._name('test')} holds them: {moved}")
        order = self._permuted(rest)
        if self.given_test is None:
            sizes = self._allot(len(order), wanted)
            end = sum(sizes.values())
            start = end - sizes["test"]
            test, order = order[start:end], order[:start] + order[end:]
        else:
            size = self._allot(len(self.test_prompts), {"test": wanted["test"]})
            test = self._permuted(self.test_prompts)[: size["test"]]
        del sizes["test"]
        chosen = self._unlike(order, test, sizes)
        found = {"test": test}
        for purpose, size in self._allot(len(chosen), sizes).items():
            found[purpose], chosen = chosen[:size], chosen[size:]
        for purpose, size in wanted.items():
            if len(found[purpose]) < size:
                self.warnings.append(
                    f"{self._name(purpose)}: {size} prompts were wanted for the {purpose} split, and there are "
                    f"{len(found[purpose])}; give more prompts, or a smaller size with n"
                )
        return {
            purpose: PromptSet(name=f"{self._name(purpose)}/{purpose}", prompts=tuple(prompts))
            for purpose, prompts in found.items()
        }

    def _warn(self, what: str) -> None:
        self.warnings.append(f"{self.given.name}: {what}")

    def _name(self, purpose: str) -> str:
        return self.given_test.name if purpose == "test" and self.given_test is not None else self.given.name

    def _permuted(self, prompts: Mapping[str, Prompt]) -> list[Prompt]:
        """The prompts in an order that depends on each text and the seed alone."""
        ranks = {hashlib.sha256(f"{self.seed}\x00{key}".encode()).digest(): key for key in prompts}
        return [prompts[ranks[rank]] for rank in sorted(ranks)]

    def _unlike(self, prompts: Sequence[Prompt], test: Sequence[Prompt], sizes: Mapping[str, int]) -> list[Prompt]:
        """As many prompts as `sizes` want, none of which is nearly one of `test`; all, if too few are left."""
        grams = [_grams(prompt.text) for prompt in test]
        found: list[Prompt] = []
        dropped: list[Prompt] = []
        for prompt in prompts:
            if len(found) == sum(sizes.values()):
                break
            mine = _grams(prompt.text)
            (dropped if any(_is_near(mine, other) for other in grams) else found).append(prompt)
        if not dropped:
            return found
        number, first = f"{len(dropped)} of {len(dropped) + len(found)}", f"the first is {dropped[0].id}"
        near = "nearly prompts of the test split"
        if len(found) < min(len(prompts), sum(min(size, _MINIMA[purpose]) for purpose, size in sizes.items())):
            little = "results on the test split say little about other prompts"
            self._warn(f"{number} prompts are {near} ({first}), too many to take out: {little}")
            return list(prompts)
        self._warn(f"prompts taken out because they are {near}: {number} ({first})")
        return found

    def _allot(self, available: int, wanted: Mapping[str, int]) -> dict[str, int]:
        """Sizes that sum to at most `available`: minima, else InputError, then in proportion (largest remainders)."""
        if available >= sum(wanted.values()):
            return dict(wanted)
        sizes = {purpose: min(size, _MINIMA[purpose]) for purpose, size in wanted.items()}
        spare = available - sum(sizes.values())
        if spare < 0:
            needs = ", ".join(f"{size} for {purpose}" for purpose, size in sizes.items())
            raise InputError(
                f"{self._name(next(iter(wanted)))} has {available} prompts that can be used; at least "
                f"{sum(sizes.values())} are needed ({needs})"
            )
        room = {purpose: wanted[purpose] - sizes[purpose] for purpose in wanted}
        shares = {purpose: spare * each / sum(room.values()) for purpose, each in room.items()}
        sizes = {purpose: size + int(shares[purpose]) for purpose, size in sizes.items()}
        by_remainder: list[str] = sorted(shares, key=lambda purpose: int(shares[purpose]) - shares[purpose])
        for purpose in by_remainder[: available - sum(sizes.values())]:
            sizes[purpose] += 1
        return sizes


def _refuse_overlap(harmful: _Class, harmless: _Class) -> None:
    bad, good = harmful.prompts | harmful.test_prompts, harmless.prompts | harmless.test_prompts
    both = [key for key in bad if key in good]
    if not both:
        return
    names = f"({harmful.given.name})", f"({harmless.given.name})"
    if len(both) == len(bad) == len(good):
        same = f"the harmful prompts {names[0]} and the harmless prompts {names[1]} are the same {len(both)} prompts"
        raise InputError(f"{same}; was one file given twice?")
    raise InputError(
        f"{len(both)} prompts are both harmful {names[0]} and harmless {names[1]}, the first as {bad[both[0]].id} and "
        f"{good[both[0]].id}; remove them from one of the files"
    )


def _grams(text: str) -> frozenset[str]:
    """The five-character sequences of a text, without case and punctuation."""
    plain = f" {' '.join(_WORD.findall(text.casefold()))} "
    return frozenset(plain[start : start + _GRAM] for start in range(len(plain) - _GRAM + 1))


def _is_near(mine: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two texts share most of their sequences (Jaccard index), neither of them short."""
    small, large = sorted((len(mine), len(other)))
    long_enough = small >= max(_SHORTEST, _OVERLAP * large)
    return long_enough and (1 + _OVERLAP) * len(mine & other) >= _OVERLAP * (small + large)
