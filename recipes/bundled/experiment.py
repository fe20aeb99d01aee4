"""The experiment of `demur study` on the bundled model, with the smallest F* that suppression needs.

Direction, pool, attribution, strengths, side effects and random controls are the package's own. The recipe adds one
step: of the features of highest attribution, those that suppression on the tuning prompts can do without are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from demur.bundled import BundledJudge, BundledPrompts
from demur.method.interventions import ScaleFeatures
from demur.method.selection import global_set
from demur.model import ChatModel
from demur.saes import Suite
from demur.stats import Estimate
from demur.studies import STUDIES
from demur.studies.compare import Experiment
from demur.studies.config import MAIN
from demur.studies.context import open_context
from demur.studies.inputs import Inputs
from demur.studies.pipeline import find
from demur.studies.results import CompareResult, EffectRow, Kind, Prompts
from demur.studies.study import Config
from demur.types import FeatureId, FeatureSet, PromptSet, Split, Splits
from recipes.bundled.metrics import DirectionRow, FeatureSetRow

logger = logging.getLogger(__name__)

NEW_TOKENS: Final = 40
"""Room for every whole answer."""
CANDIDATES: Final = 40
"""Features of highest attribution that F* is taken from: half of the pool."""
NEAR: Final = 0.05
"""Shares of the tuning prompts that differ by less count as equal."""
CONFIG: Final = Config(
    estimator="ig",
    k0=10,
    k=CANDIDATES,
    n_exact=0,
    suppress=(0.0, -0.5, -1.0, -3.0),
    induce_multiples=(0.5, 0.75, 1.0, 1.125, 1.25, 1.375, 1.5),
    methods=(MAIN, "random", "direction", "direction-affine"),
    random_sets=20,
    max_new_tokens=NEW_TOKENS,
)
_SIZES: Final = (128, 64, 128)
"""Prompts of each class that estimate the direction, that choose, and that tune."""


@dataclass(frozen=True)
class Measured:
    """The clean model's refusal of held-out prompts, the direction's effects and those of F*."""

    harmful: Estimate
    harmless: Estimate
    direction: DirectionRow
    features: FeatureSetRow


def splits_of(drawn: BundledPrompts) -> Splits:
    """Training topics in three parts that choose; held-out topics, phrasings and all, to be measured on."""
    ends = [sum(_SIZES[:place]) for place in range(4)]

    def part(place: int) -> Split:
        def cut(prompts: PromptSet) -> PromptSet:
            return PromptSet(name=prompts.name, prompts=prompts.prompts[ends[place] : ends[place + 1]])

        return Split(harmful=cut(drawn.harmful), harmless=cut(drawn.harmless))

    test = Split(harmful=drawn.test_harmful, harmless=drawn.test_harmless)
    return Splits(direction=part(0), selection=part(1), tuning=part(2), test=test)


def run_experiment(model: ChatModel, suite: Suite, drawn: BundledPrompts) -> Measured:
    """Find the refusal direction and F* on training topics, and measure both on held-out ones."""
    inputs = Inputs("the bundled model", "the bundled SAEs", model, suite, splits_of(drawn), BundledJudge())
    with (
        TemporaryDirectory() as folder,
        open_context(STUDIES["study"], CONFIG, Path(folder) / "run", inputs=inputs) as context,
    ):
        found = find(context, context.splits.choosing)
        tuning = context.splits.choosing.tuning.harmful

        def suppressed(features: FeatureSet) -> float:
            return context.answer("needed", tuning, (ScaleFeatures(features.features, 0.0),)).compliance.value

        needed = needed_features(global_set(found.attribution, CANDIDATES), suppressed)
        logger.info("needed: %s", ", ".join(map(str, needed.features)))
        experiment = Experiment(context)
        return _measured(experiment, experiment.run(replace(found, chosen=needed)))


def needed_features(features: FeatureSet, effect: Callable[[FeatureSet], float]) -> FeatureSet:
    """The features that are needed for `effect`, best first.

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
    return _only(features, kept)


def _only(features: FeatureSet, kept: Sequence[FeatureId]) -> FeatureSet:
    scores = dict(zip(features.features, features.scores, strict=True))
    return features.model_copy(update={"features": tuple(kept), "scores": tuple(scores[each] for each in kept)})


def _measured(experiment: Experiment, result: CompareResult) -> Measured:
    def row(prompts: Prompts, kind: Kind, method: str) -> EffectRow:
        found = result.effect(prompts, kind, method)
        assert found is not None
        return found

    def of_random(prompts: Prompts, kind: Kind) -> tuple[Estimate, ...]:
        """Refusal under each random set, at the strength chosen for F*."""
        wanted = ("random", kind, prompts)
        (condition,) = [c for c in experiment.conditions if (c.method.name, c.kind, c.prompts) == wanted]
        return tuple(run.refusal for run in condition.runs)

    chosen = result.direction.chosen
    ablated = row("harmful", "suppress", "direction" if chosen.form == "linear" else "direction-affine")
    suppressed, kept = row("harmful", "suppress", MAIN), row("harmless", "suppress", MAIN)
    induced = row("harmless", "induce", MAIN)
    assert kept.exact_match is not None
    return Measured(
        harmful=row("harmful", "none", "none").refusal,
        harmless=row("harmless", "none", "none").refusal,
        direction=DirectionRow(
            layer=chosen.layer,
            position=chosen.position,
            form=chosen.form,
            note=result.direction.note,
            ablated_refusal=ablated.refusal,
            ablated_compliance=ablated.compliance,
            added_refusal=row("harmless", "induce", "direction").refusal,
        ),
        features=FeatureSetRow(
            features=tuple(each.feature for each in result.features),
            estimator=CONFIG.estimator,
            factor=suppressed.strength,
            value=induced.strength,
            suppressed_refusal=suppressed.refusal,
            suppressed_compliance=suppressed.compliance,
            induced_refusal=induced.refusal,
            harmless_unchanged=kept.exact_match,
            harmless_compliance=kept.compliance,
            random_suppressed=of_random("harmful", "suppress"),
            random_induced=of_random("harmless", "induce"),
        ),
    )
