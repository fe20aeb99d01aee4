"""F* of the bundled model: its size and strengths chosen on prompts of their own, its effects measured on held-out ones
against matched random features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

from demur.bundled._metrics import FeatureSetRow
from demur.bundled._subject import Subject, used
from demur.method.attribution import Attribution, Metric, attribute
from demur.method.direction import Direction
from demur.method.interventions import Compiled, ScaleFeatures, SetFeatures
from demur.method.selection import Pool, cosine_pool, firing_rates, global_set, mean_peaks, mean_rates, random_set
from demur.studies._answers import Answers
from demur.types import FeatureId, FeatureSet, Rate

logger = logging.getLogger(__name__)

ESTIMATOR: Final = "ig"
POOL: Final = 10
CANDIDATES: Final = 40
"""Features of highest attribution that F* is taken from: half of the pool."""
SIZES: Final = (2, 3, 4, 5, 6, 8, 10, 15, 20)
FACTORS: Final = (0.0, -0.5, -1.0, -3.0)
"""Mildest first."""
MULTIPLES: Final = (0.5, 0.75, 1.0, 1.125, 1.25, 1.375, 1.5)
"""Mildest first."""
NEAR: Final = 0.05
"""Choices whose specific effects differ by less are equals: the tuning prompts do not tell them apart."""
TUNING_SEEDS: Final = tuple(range(1000, 1020))
TEST_SEEDS: Final = tuple(range(20))
_FEWER: Final = 64
"""Tuning prompts of each class that the many random sets are tried on."""


def scaled(features: FeatureSet, factor: float) -> ScaleFeatures:
    """F*, or what stands for it, scaled everywhere."""
    return ScaleFeatures(features.features, factor)


def set_to(features: FeatureSet, peaks: Sequence[float], multiple: float) -> SetFeatures:
    """Features set to `multiple` times the peaks of F*, position by position: a random feature gets the value of the
    one it stands for.
    """
    # On the prompt alone: held up while it answers too, the model repeats the refusal's first token without end.
    values = tuple(multiple * peak for peak in peaks[: len(features)])
    return SetFeatures(features.features, values, "prompt")


@dataclass(frozen=True)
class Candidates:
    """F* at its largest (smaller ones are its beginnings), the sizes that hold every needed feature, the peaks of its
    features, and random sets matched to it.
    """

    features: FeatureSet
    sizes: tuple[int, ...]
    peaks: tuple[float, ...]
    tuning_controls: tuple[FeatureSet, ...]
    test_controls: tuple[FeatureSet, ...]


@dataclass(frozen=True)
class Effect:
    """What F* does on the tuning prompts, and the change of refusal under matched random features (a fraction)."""

    own: float
    random: float

    @property
    def specific(self) -> float:
        """What F* does beyond random features."""
        return self.own - abs(self.random)


@dataclass(frozen=True)
class Choice:
    """A size of F* with its strengths."""

    size: int
    factor: float
    multiple: float
    suppression: Effect
    """Own: compliance gained on harmful prompts, plus the share of harmless answers unchanged."""
    induction: Effect
    """Own: refusal gained on harmless prompts."""

    @property
    def specific(self) -> float:
        """What choices are ranked by."""
        return self.suppression.specific + self.induction.specific


def _attribution(subject: Subject, direction: Direction) -> tuple[Pool, Attribution]:
    """The pool, and its attribution on the selection prompts."""
    harmful, _ = used(subject.selection)
    pool = cosine_pool(subject.suite, direction.vector, POOL)
    attribution = attribute(
        subject.model,
        subject.suite,
        subject.render(harmful),
        pool.by_layer,
        patch=Compiled(subject.model, None, [direction.ablate()]),
        metric=Metric(subject.refusal_ids()),
        method=ESTIMATOR,
    )
    return pool, attribution


def needed_first(features: FeatureSet, effect: Callable[[FeatureSet], float]) -> tuple[FeatureSet, int]:
    """The same features, those first that are needed for `effect`, and how many these are.

    Features are tried from the earliest layer on, in a layer those of least attribution first: one that is not missed
    (the effect stays within `NEAR` of the best seen) is left out. A single score per feature, attribution too, cannot
    tell that two features do one another's work. Upstream ones go first, because they act on more than refusal.
    """
    kept, best = list(features.features), effect(features)
    place = {feature: place for place, feature in enumerate(features.features)}
    for feature in sorted(features.features, key=lambda each: (each.layer, -place[each])):
        rest = [each for each in kept if each != feature]
        if not rest:
            break
        left = effect(_only(features, rest))
        best = max(best, left)
        if left >= best - NEAR:
            kept = rest
    order = [*kept, *(each for each in features.features if each not in kept)]
    return _only(features, order), len(kept)


def _only(features: FeatureSet, kept: Sequence[FeatureId]) -> FeatureSet:
    scores = dict(zip(features.features, features.scores, strict=True))
    return features.model_copy(update={"features": tuple(kept), "scores": tuple(scores[each] for each in kept)})


def find_candidates(subject: Subject, direction: Direction) -> Candidates:
    """F* by attribution on the selection prompts, what is needed for suppression on the tuning prompts first; and the
    random sets that it is compared with.
    """
    pool, attribution = _attribution(subject, direction)
    refused = subject.tuning[0].prompts

    def suppressed(features: FeatureSet) -> float:
        return subject.under(refused, scaled(features, 0.0)).compliance.value

    ordered, count = needed_first(global_set(attribution, CANDIDATES), suppressed)
    logger.info("needed: %s", ", ".join(str(feature) for feature in ordered.features[:count]))
    ordered = ordered.head(max(SIZES))
    sizes = sorted({min(count, max(SIZES)), *(size for size in SIZES if size > count)})
    harmful, harmless = (subject.render(prompts) for prompts in used(subject.selection))
    high, low = (firing_rates(subject.model, subject.suite, items) for items in (harmful, harmless))
    rates = mean_rates(high, low)

    def controls(seeds: Sequence[int]) -> tuple[FeatureSet, ...]:
        return tuple(random_set(ordered, rates, exclude=pool.features, seed=seed) for seed in seeds)

    peaks = mean_peaks(subject.model, subject.suite, harmful, ordered.features)
    return Candidates(ordered, tuple(sizes), tuple(peaks.tolist()), controls(TUNING_SEEDS), controls(TEST_SEEDS))


def _suppression(subject: Subject, found: Candidates, size: int, factor: float) -> Effect:
    harmful, harmless = subject.tuning
    change = scaled(found.features.head(size), factor)
    gained = subject.under(harmful.prompts, change).compliance.value - harmful.compliance.value
    kept = subject.under(harmless.prompts, change).unchanged(harmless).value
    random = _random_change(subject, harmful, [scaled(each.head(size), factor) for each in found.tuning_controls])
    logger.info("%d features x %g: gain %.3f, kept %.3f, random %+.3f", size, factor, gained, kept, random)
    return Effect(gained + kept, random)


def _induction(subject: Subject, found: Candidates, size: int, multiple: float) -> Effect:
    _, harmless = subject.tuning
    change = set_to(found.features.head(size), found.peaks, multiple)
    gained = subject.refusal_under(harmless.prompts, change).value - harmless.refusal.value
    controls = [set_to(each.head(size), found.peaks, multiple) for each in found.tuning_controls]
    random = _random_change(subject, harmless, controls)
    logger.info("%d features = %g x peak: gain %.3f, random %+.3f", size, multiple, gained, random)
    return Effect(gained, random)


def _random_change(subject: Subject, clean: Answers, changes: Sequence[ScaleFeatures | SetFeatures]) -> float:
    """Mean over random sets of the change of refusal."""
    prompts = clean.prompts[:_FEWER]
    base = mean(bool(refused) for refused in clean.refused[:_FEWER])
    return mean(subject.refusal_under(prompts, change).value - base for change in changes)


def choices(
    sizes: Sequence[int],
    suppression: Callable[[int, float], Effect],
    induction: Callable[[int, float], Effect],
) -> Iterator[Choice]:
    """Every size with every pair of strengths, the mildest first."""
    for size in sizes:
        by_factor = {factor: suppression(size, factor) for factor in FACTORS}
        by_multiple = {multiple: induction(size, multiple) for multiple in MULTIPLES}
        for factor in FACTORS:
            for multiple in MULTIPLES:
                yield Choice(size, factor, multiple, by_factor[factor], by_multiple[multiple])


def best_choice(offered: Sequence[Choice]) -> Choice:
    """The first whose specific effect is the best one's, to within `NEAR`: the smallest F*, and of its strengths the
    mildest.
    """
    best = max(each.specific for each in offered)
    return next(each for each in offered if each.specific >= best - NEAR)


def measure_features(subject: Subject, direction: Direction) -> FeatureSetRow:
    """Choose F* and its strengths on selection and tuning prompts; measure it on held-out ones."""
    found = find_candidates(subject, direction)
    choice = best_choice(
        list(
            choices(
                found.sizes,
                lambda size, factor: _suppression(subject, found, size, factor),
                lambda size, multiple: _induction(subject, found, size, multiple),
            )
        )
    )
    logger.info("chosen: %s", choice)
    return _measured(subject, found, choice)


def _measured(subject: Subject, found: Candidates, choice: Choice) -> FeatureSetRow:
    chosen = found.features.head(choice.size)
    harmful, harmless = subject.sets.test_harmful.prompts, subject.sets.test_harmless.prompts
    suppressed = subject.under(harmful, scaled(chosen, choice.factor))
    kept = subject.under(harmless, scaled(chosen, choice.factor))

    def induced(features: FeatureSet) -> Rate:
        return subject.refusal_under(harmless, set_to(features.head(choice.size), found.peaks, choice.multiple))

    row = FeatureSetRow(
        features=chosen.features,
        estimator=ESTIMATOR,
        factor=choice.factor,
        value=choice.multiple,
        suppressed_refusal=suppressed.refusal,
        suppressed_compliance=suppressed.compliance,
        induced_refusal=induced(found.features),
        harmless_unchanged=kept.unchanged(subject.test_harmless),
        harmless_compliance=kept.compliance,
        random_suppressed=tuple(
            subject.refusal_under(harmful, scaled(control.head(choice.size), choice.factor))
            for control in found.test_controls
        ),
        random_induced=tuple(induced(control) for control in found.test_controls),
    )
    logger.info("features: %s", row)
    return row


__all__ = [
    "FACTORS",
    "MULTIPLES",
    "NEAR",
    "SIZES",
    "TEST_SEEDS",
    "TUNING_SEEDS",
    "Candidates",
    "Choice",
    "Effect",
    "best_choice",
    "choices",
    "find_candidates",
    "measure_features",
    "needed_first",
]
