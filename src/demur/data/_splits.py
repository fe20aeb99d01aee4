"""Four disjoint splits from a harmful and a harmless set."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from demur.data._prompts import text_key
from demur.errors import InputError
from demur.types import PURPOSES, Prompt, PromptSet, Split, Splits, SplitSizes

logger = logging.getLogger("demur.data")

_MINIMA = {"direction": 8, "selection": 4, "tuning": 4, "test": 4}


@dataclass(frozen=True)
class SplitCount:
    """Splits, and how many prompts were dropped to make them disjoint."""

    splits: Splits
    repeated: int
    """Prompts that stood twice in one input."""
    moved_to_test: int
    """Training prompts dropped because a separate test set holds them."""


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

    Two prompts are one when they agree without case and spacing. A prompt's place depends on its text, the
    seed and the other prompts, not on the order of the files. A separate test set stands in as that class's
    test split, and its prompts are removed from training. Where a class has fewer prompts than wanted, every
    split first gets its minimum, then the rest is shared in proportion to what each still wants.

    Raises:
        InputError: a prompt is both harmful and harmless, or a class has too few prompts.
    """
    counted = split_counted(
        harmful, harmless, sizes=sizes, seed=seed, test_harmful=test_harmful, test_harmless=test_harmless
    )
    return counted.splits


def split_counted(
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    sizes: SplitSizes,
    seed: int,
    test_harmful: PromptSet | None = None,
    test_harmless: PromptSet | None = None,
) -> SplitCount:
    """As `make_splits`, with the count of dropped prompts (also logged on `demur.data`)."""
    bad, bad_test = _by_key(harmful), _by_key(test_harmful or ())
    good, good_test = _by_key(harmless), _by_key(test_harmless or ())
    _refuse_overlap(harmful, harmless, bad | bad_test, good | good_test)
    repeated = sum(
        len(given) - len(found) for given, found in ((harmful, bad), (harmless, good), (test_harmful or (), bad_test))
    ) + (len(test_harmless or ()) - len(good_test))
    moved = len(bad.keys() & bad_test.keys()) + len(good.keys() & good_test.keys())
    if moved:
        logger.warning("%d training prompts are also in the test files and were removed from training", moved)
    harmful_parts = _divide(harmful, bad, test_harmful, bad_test, sizes, seed)
    harmless_parts = _divide(harmless, good, test_harmless, good_test, sizes, seed)
    parts = {purpose: Split(harmful=harmful_parts[purpose], harmless=harmless_parts[purpose]) for purpose in PURPOSES}
    return SplitCount(Splits(**parts), repeated, moved)


def _by_key(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(text_key(prompt.text), prompt)
    return found


def _refuse_overlap(
    harmful: PromptSet, harmless: PromptSet, bad: Mapping[str, Prompt], good: Mapping[str, Prompt]
) -> None:
    both = [key for key in bad if key in good]
    if not both:
        return
    if len(both) == len(bad) == len(good):
        raise InputError(
            f"the harmful prompts ({harmful.name}) and the harmless prompts ({harmless.name}) are the same "
            f"{len(both)} prompts; was one file given twice?"
        )
    raise InputError(
        f"{len(both)} prompts are both harmful ({harmful.name}) and harmless ({harmless.name}), the first as "
        f"{bad[both[0]].id} and {good[both[0]].id}; remove them from one of the files"
    )


def _divide(
    given: PromptSet,
    prompts: Mapping[str, Prompt],
    given_test: PromptSet | None,
    test_prompts: Mapping[str, Prompt],
    sizes: SplitSizes,
    seed: int,
) -> dict[str, PromptSet]:
    """The four sets of one class."""
    wanted = sizes.wanted()
    parts: dict[str, PromptSet] = {}
    training = {key: prompt for key, prompt in prompts.items() if key not in test_prompts}
    if given_test is not None:
        test = _permuted(test_prompts, seed)
        size = _allot(given_test.name, len(test), {"test": wanted.pop("test")})["test"]
        parts["test"] = PromptSet(name=f"{given_test.name}/test", prompts=tuple(test[:size]))
    start, order = 0, _permuted(training, seed)
    for purpose, size in _allot(given.name, len(order), wanted).items():
        parts[purpose] = PromptSet(name=f"{given.name}/{purpose}", prompts=tuple(order[start : start + size]))
        start += size
    return parts


def _permuted(prompts: Mapping[str, Prompt], seed: int) -> list[Prompt]:
    """The prompts in an order that depends on each text and the seed alone."""

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed}\x00{key}".encode()).digest()

    return [prompts[key] for key in sorted(prompts, key=rank)]


def _allot(name: str, available: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Sizes that sum to at most `available`: minima first, the rest in proportion (largest remainders)."""
    if available >= sum(wanted.values()):
        return dict(wanted)
    sizes = {purpose: min(size, _MINIMA[purpose]) for purpose, size in wanted.items()}
    spare = available - sum(sizes.values())
    if spare < 0:
        needs = ", ".join(f"{size} for {purpose}" for purpose, size in sizes.items())
        raise InputError(
            f"{name} has {available} prompts that can be used; at least {sum(sizes.values())} are needed ({needs})"
        )
    open_for = {purpose: wanted[purpose] - sizes[purpose] for purpose in wanted}
    shares = {purpose: spare * room / sum(open_for.values()) for purpose, room in open_for.items()}
    for purpose, share in shares.items():
        sizes[purpose] += int(share)
    left = available - sum(sizes.values())
    by_remainder: Sequence[str] = sorted(shares, key=lambda purpose: int(shares[purpose]) - shares[purpose])
    for purpose in by_remainder[:left]:
        sizes[purpose] += 1
    logger.info("%s has %d prompts, fewer than wanted: %s", name, available, sizes)
    return sizes
