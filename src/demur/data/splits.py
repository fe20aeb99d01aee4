"""Four disjoint splits of harmful and harmless prompts."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demur.data.prompts import read_prompts
from demur.errors import InputError
from demur.types import PURPOSES, Label, Prompt, PromptSet, Split, Splits, SplitSizes, text_key

logger = logging.getLogger("demur.data")

_MINIMA = {"direction": 8, "selection": 4, "tuning": 4, "test": 4}
_MAX_SEED = 2**64 - 1

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
    """Read harmful and harmless prompts and split them, no prompt in two places.

    Args:
        harmful: files or public sets, `SOURCE` or `SOURCE::COLUMN` (see `demur.data.read_prompts`).
        harmless: likewise.
        test_harmful: harmful prompts of the test split (default: a part of `harmful`).
        test_harmless: harmless prompts of the test split (default: a part of `harmless`).
        n: prompts per split and class (default: 128 direction, 32 selection, 32 tuning, 100 test).
        seed: decides which prompt goes where.

    Raises:
        InputError: a source cannot be used, or see `make_splits`.
    """

    def read(sources: Sources | None, label: Label) -> PromptSet | None:
        return None if sources is None else read_prompts(sources, label=label)

    return make_splits(
        read_prompts(harmful, label="harmful"),
        read_prompts(harmless, label="harmless"),
        sizes=n or SplitSizes(),
        seed=seed,
        test_harmful=read(test_harmful, "harmful"),
        test_harmless=read(test_harmless, "harmless"),
    )


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

    Two prompts are one when they agree without case and spacing. A prompt's place depends on its text, the seed and
    the other prompts, not on the order of the files. Prompts that are nearly those of the test split (three quarters
    of their five-character sequences in common) do not choose anything: they are dropped from the other splits.
    Where a class has fewer prompts than wanted, every split first gets its minimum (8 direction, 4 of the others), then
    the rest is shared in proportion to what each still wants. What was dropped or fell short is in `Splits.warnings`,
    and logged on `demur.data`.

    Args:
        harmful: all harmful prompts.
        harmless: all harmless prompts.
        sizes: prompts wanted per split and class.
        seed: decides which prompt goes where.
        test_harmful: stands in as the harmful test split; its prompts are removed from the other splits.
        test_harmless: likewise.

    Raises:
        InputError: a prompt is both harmful and harmless, a class has too few prompts, or the seed is out of range.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise InputError(f"the seed is {seed}; expected a whole number from 0 to 2**64 - 1")
    bad, good = _Class(harmful, test_harmful, sizes, seed), _Class(harmless, test_harmless, sizes, seed)
    _refuse_overlap(bad, good)
    parts, others = bad.parts(), good.parts()
    warnings = tuple(dict.fromkeys((*bad.warnings, *good.warnings)))
    for warning in warnings:
        logger.warning(warning)
    splits = {purpose: Split(harmful=parts[purpose], harmless=others[purpose]) for purpose in PURPOSES}
    return Splits(**splits, warnings=warnings)


def _by_key(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(text_key(prompt.text), prompt)
    return found


@dataclass
class _Class:
    """The prompts of one class, on their way into four splits."""

    given: PromptSet
    given_test: PromptSet | None
    sizes: SplitSizes
    seed: int
    warnings: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.prompts = _by_key(self.given)
        self.test_prompts = _by_key(self.given_test or ())
        for given, found in ((self.given, self.prompts), (self.given_test, self.test_prompts)):
            if given is not None and len(found) < len(given):
                self.warnings.append(f"{given.name}: repeated prompts, each used once: {len(given) - len(found)}")

    def parts(self) -> dict[str, PromptSet]:
        """The four sets.

        Raises:
            InputError: there are too few prompts.
        """
        wanted = self.sizes.wanted()
        rest = {key: prompt for key, prompt in self.prompts.items() if key not in self.test_prompts}
        if len(rest) < len(self.prompts):
            moved = f"{len(self.prompts) - len(rest)} of {len(self.prompts)}"
            self.warnings.append(
                f"{self.given.name}: prompts taken out because {self._name('test')} holds them: {moved}"
            )
        order = self._permuted(rest)
        if self.given_test is None:
            sizes = self._allot(len(order), wanted)
            start = sum(sizes.values()) - sizes["test"]
            test = order[start : start + sizes["test"]]
            order = order[:start] + order[start + sizes["test"] :]
        else:
            size = self._allot(len(self.test_prompts), {"test": wanted.pop("test")})
            test = self._permuted(self.test_prompts)[: size["test"]]
            sizes = wanted
        choosing = {purpose: size for purpose, size in sizes.items() if purpose != "test"}
        chosen = self._unlike(order, test, choosing)
        found = {"test": test}
        for purpose, size in self._allot(len(chosen), choosing).items():
            found[purpose], chosen = chosen[:size], chosen[size:]
        self._warn_of_shortfall(found)
        return {
            purpose: PromptSet(name=f"{self._name(purpose)}/{purpose}", prompts=tuple(prompts))
            for purpose, prompts in found.items()
        }

    def _name(self, purpose: str) -> str:
        return self.given_test.name if purpose == "test" and self.given_test is not None else self.given.name

    def _permuted(self, prompts: Mapping[str, Prompt]) -> list[Prompt]:
        """The prompts in an order that depends on each text and the seed alone."""

        def rank(key: str) -> bytes:
            return hashlib.sha256(f"{self.seed}\x00{key}".encode()).digest()

        return [prompts[key] for key in sorted(prompts, key=rank)]

    def _unlike(self, prompts: Sequence[Prompt], test: Sequence[Prompt], sizes: Mapping[str, int]) -> list[Prompt]:
        """As many prompts as `sizes` want that are not nearly one of `test`.

        Where nearly all are, as where a template wrote them, they stay.
        """
        grams = [_grams(prompt.text) for prompt in test]
        found: list[Prompt] = []
        dropped: list[Prompt] = []
        for prompt in prompts:
            if len(found) == sum(sizes.values()):
                break
            (dropped if _is_near(_grams(prompt.text), grams) else found).append(prompt)
        if not dropped:
            return found
        number, first = f"{len(dropped)} of {len(dropped) + len(found)}", f"the first is {dropped[0].id}"
        near = "nearly prompts of the test split"
        if len(found) < min(len(prompts), sum(min(size, _MINIMA[purpose]) for purpose, size in sizes.items())):
            self.warnings.append(
                f"{self.given.name}: {number} prompts are {near} ({first}), too many to take "
                "out: results on the test split say little about other prompts"
            )
            return list(prompts)
        self.warnings.append(f"{self.given.name}: prompts taken out because they are {near}: {number} ({first})")
        return found

    def _allot(self, available: int, wanted: Mapping[str, int]) -> dict[str, int]:
        """Sizes that sum to at most `available`: minima first, the rest in proportion (largest remainders).

        Raises:
            InputError: there are fewer prompts than the minima.
        """
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
        for purpose, share in shares.items():
            sizes[purpose] += int(share)
        by_remainder: list[str] = sorted(shares, key=lambda purpose: int(shares[purpose]) - shares[purpose])
        for purpose in by_remainder[: available - sum(sizes.values())]:
            sizes[purpose] += 1
        return sizes

    def _warn_of_shortfall(self, found: Mapping[str, Sequence[Prompt]]) -> None:
        for purpose, wanted in self.sizes.wanted().items():
            if len(found[purpose]) < wanted:
                self.warnings.append(
                    f"{self._name(purpose)}: {wanted} prompts were wanted for the {purpose} split, and there are "
                    f"{len(found[purpose])}; give more prompts, or a smaller size with n"
                )


def _refuse_overlap(harmful: _Class, harmless: _Class) -> None:
    bad, good = harmful.prompts | harmful.test_prompts, harmless.prompts | harmless.test_prompts
    both = [key for key in bad if key in good]
    if not both:
        return
    names = f"({harmful.given.name})", f"({harmless.given.name})"
    if len(both) == len(bad) == len(good):
        raise InputError(
            f"the harmful prompts {names[0]} and the harmless prompts {names[1]} are the same {len(both)} prompts; "
            "was one file given twice?"
        )
    raise InputError(
        f"{len(both)} prompts are both harmful {names[0]} and harmless {names[1]}, the first as {bad[both[0]].id} and "
        f"{good[both[0]].id}; remove them from one of the files"
    )


def _grams(text: str) -> frozenset[str]:
    """The five-character sequences of a text, without case and punctuation."""
    plain = f" {' '.join(_WORD.findall(text.casefold()))} "
    return frozenset(plain[start : start + _GRAM] for start in range(len(plain) - _GRAM + 1))


def _is_near(mine: frozenset[str], others: Sequence[frozenset[str]]) -> bool:
    """Whether a text shares most of its sequences with one of the others (Jaccard index), neither of them short."""
    for other in others:
        small, large = sorted((len(mine), len(other)))
        if small >= _SHORTEST and small >= _OVERLAP * large:
            common = len(mine & other)
            if common >= _OVERLAP * (small + large - common):
                return True
    return False


__all__ = ["load_prompts", "make_splits"]
