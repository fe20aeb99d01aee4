"""The refusal experiment on the bundled model: its direction, F*, and matched random features.

F*'s size and strengths are chosen on tuning prompts, its effects are measured on held-out ones. The rest of the recipe
calls `run_experiment` alone, so that another experiment can take its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

from demur.method.attribution import attribute
from demur.method.direction import Direction, find_direction
from demur.method.interventions import Compiled, Intervention, ScaleFeatures, SetFeatures
from demur.method.path import Metric
from demur.method.selection import cosine_pool, firing_rates, global_set, mean_max_activations, random_set
from demur.types import FeatureId, FeatureSet, Rate
from recipes.bundled.metrics import DirectionRow, FeatureSetRow
from recipes.bundled.subject import Judged, Subject, behaved

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
"""Choices whose specific effects differ by less count as equal: the tuning prompts cannot tell them apart."""
TUNING_SEEDS: Final = tuple(range(1000, 1020))
TEST_SEEDS: Final = tuple(range(20))
_FEWER: Final = 64
"""Tuning prompts of each class that the many random sets are tried on."""
_VALIDATION: Final = 32


def run_experiment(subject: Subject) -> tuple[DirectionRow, FeatureSetRow]:
    """Find the refusal direction and F* on training topics, and measure both on held-out ones."""
    direction = _find_direction(subject)
    return _measure_direction(subject, direction), _measure_features(subject, direction)


# The direction


def _find_direction(subject: Subject) -> Direction:
    harmful, harmless = behaved(subject.direction)
    checked_harmful, checked_harmless = (prompts[:_VALIDATION] for prompts in behaved(subject.selection))
    tokenize = subject.model.tokenize
    return find_direction(
        subject.model,
        (tokenize(harmful), tokenize(harmless)),
        (tokenize(checked_harmful), tokenize(checked_harmless)),
        subject.refusal_ids(),
    )


def _measure_direction(subject: Subject, direction: Direction) -> DirectionRow:
    ablated = subject.under(subject.sets.test_harmful.prompts, direction.ablate())
    row = DirectionRow(
        layer=direction.layer,
        position=direction.position,
        form=direction.form,
        note=direction.note,
        ablated_refusal=ablated.refusal,
        ablated_compliance=ablated.compliance,
        added_refusal=subject.under(subject.sets.test_harmless.prompts, direction.add()).refusal,
    )
    logger.info("direction: %s", row)
    return row


# F* and what it is compared with


@dataclass(frozen=True)
class Candidates:
    """F* at its largest; smaller sets are its first features. `sizes` are those that hold every needed feature,
    `maxima` the features' mean maximum activations on harmful prompts. The controls are matched random sets.
    """

    features: FeatureSet
    sizes: tuple[int, ...]
    maxima: tuple[float, ...]
    tuning_controls: tuple[FeatureSet, ...]
    test_controls: tuple[FeatureSet, ...]


def find_candidates(subject: Subject, direction: Direction) -> Candidates:
    """F* by attribution on the selection prompts, ordered by what suppression needs on the tuning prompts, and the
    random sets that it is compared with.
    """
    harmful, harmless = (subject.model.tokenize(prompts) for prompts in behaved(subject.selection))
    pool = cosine_pool(subject.suite, direction.vector, POOL)
    attribution = attribute(
        subject.model,
        subject.suite,
        harmful,
        pool.by_layer,
        patch=Compiled(subject.model, None, [direction.ablate()]),
        metric=Metric(subject.refusal_ids()),
        method=ESTIMATOR,
    )

    def suppressed(features: FeatureSet) -> float:
        return subject.under(subject.tuning[0].prompts, scaled(features, 0.0)).compliance.value

    ordered, count = needed_first(global_set(attribution, CANDIDATES), suppressed)
    logger.info("needed: %s", ", ".join(str(feature) for feature in ordered.features[:count]))
    ordered = ordered.head(max(SIZES))
    sizes = sorted({min(count, max(SIZES)), *(size for size in SIZES if size > count)})
    high, low = (firing_rates(subject.model, subject.suite, items) for items in (harmful, harmless))
    rates = {layer: (high[layer] + low[layer]) / 2 for layer in high}

    def controls(seeds: Sequence[int]) -> tuple[FeatureSet, ...]:
        return tuple(random_set(ordered, rates, exclude=pool.features, seed=seed) for seed in seeds)

    maxima = mean_max_activations(subject.model, subject.suite, harmful, ordered.features)
    return Candidates(ordered, tuple(sizes), tuple(maxima.tolist()), controls(TUNING_SEEDS), controls(TEST_SEEDS))


def needed_first(features: FeatureSet, effect: Callable[[FeatureSet], float]) -> tuple[FeatureSet, int]:
    """The same features, those first that are needed for `effect`, and how many these are.

    Features are left out one by one, from the earliest layer on and within a layer those of least attribution first; a
    feature stays out if the effect stays within `NEAR` of the best seen. A single score per feature, attribution
    included, cannot tell that two features do the same work. Early layers go first, because they act on more than
    refusal.
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


def scaled(features: FeatureSet, factor: float) -> ScaleFeatures:
    """F*, or a random set, scaled everywhere."""
    return ScaleFeatures(features.features, factor)


def set_to(features: FeatureSet, maxima: Sequence[float], multiple: float) -> SetFeatures:
    """Features set to `multiple` times the maximum activations of F*: a random feature gets the value of the feature
    at its place in F*.
    """
    # On the prompt alone: set while the model answers too, it repeats the refusal's first token without end.
    values = tuple(multiple * maximum for maximum in maxima[: len(features)])
    return SetFeatures(features.features, values, "prompt")


# Choosing size and strengths on tuning prompts


@dataclass(frozen=True)
class Effect:
    """What F* does on the tuning prompts, and the change of refusal under matched random features (fractions)."""

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
    """The first whose specific effect is within `NEAR` of the best: the smallest F*, at its mildest strengths."""
    best = max(each.specific for each in offered)
    return next(each for each in offered if each.specific >= best - NEAR)


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
    change = set_to(found.features.head(size), found.maxima, multiple)
    gained = subject.refusal_under(harmless.prompts, change).value - harmless.refusal.value
    controls = [set_to(each.head(size), found.maxima, multiple) for each in found.tuning_controls]
    random = _random_change(subject, harmless, controls)
    logger.info("%d features = %g x maximum: gain %.3f, random %+.3f", size, multiple, gained, random)
    return Effect(gained, random)


def _random_change(subject: Subject, clean: Judged, changes: Sequence[Intervention]) -> float:
    """Mean change of refusal over random sets."""
    base = mean(clean.refused[:_FEWER])
    return mean(subject.refusal_under(clean.prompts[:_FEWER], change).value - base for change in changes)


def _measure_features(subject: Subject, direction: Direction) -> FeatureSetRow:
    found = find_candidates(subject, direction)
    offered = choices(
        found.sizes,
        lambda size, factor: _suppression(subject, found, size, factor),
        lambda size, multiple: _induction(subject, found, size, multiple),
    )
    choice = best_choice(list(offered))
    logger.info("chosen: %s", choice)
    chosen = found.features.head(choice.size)
    harmful, harmless = subject.sets.test_harmful.prompts, subject.sets.test_harmless.prompts
    suppressed = subject.under(harmful, scaled(chosen, choice.factor))
    kept = subject.under(harmless, scaled(chosen, choice.factor))

    def suppressed_by(control: FeatureSet) -> Rate:
        return subject.refusal_under(harmful, scaled(control.head(choice.size), choice.factor))

    def induced_by(features: FeatureSet) -> Rate:
        return subject.refusal_under(harmless, set_to(features.head(choice.size), found.maxima, choice.multiple))

    row = FeatureSetRow(
        features=chosen.features,
        estimator=ESTIMATOR,
        factor=choice.factor,
        value=choice.multiple,
        suppressed_refusal=suppressed.refusal,
        suppressed_compliance=suppressed.compliance,
        induced_refusal=induced_by(found.features),
        harmless_unchanged=kept.unchanged(subject.test_harmless),
        harmless_compliance=kept.compliance,
        random_suppressed=tuple(suppressed_by(control) for control in found.test_controls),
        random_induced=tuple(induced_by(control) for control in found.test_controls),
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
    "needed_first",
    "run_experiment",
    "scaled",
    "set_to",
]
