"""F* of the bundled model: which features suppression needs, and what it is measured on."""

from __future__ import annotations

from demur.bundled import bundled_prompts
from demur.types import FeatureId, FeatureSet
from recipes.bundled.evaluate import held_out_sets
from recipes.bundled.experiment import needed_features, splits_of
from recipes.bundled.metrics import HeldOutSet
from recipes.bundled.prompts import draw_prompts


def _features(*layers: int) -> FeatureSet:
    return FeatureSet(
        features=tuple(FeatureId(layer, 0) for layer in layers),
        scores=tuple(1.0 / (1 + place) for place in range(len(layers))),
        scope="global",
        method="by hand",
    )


def test_what_nothing_else_can_do_is_needed():
    # Layer 4 is needed; layers 1 and 2 do one another's work, so one of them is; layers 0 and 3 do nothing.
    def effect(features: FeatureSet) -> float:
        layers = {layer for layer, _ in features.features}
        return 0.6 * (4 in layers) + 0.3 * bool({1, 2} & layers)

    needed = needed_features(_features(1, 0, 4, 3, 2), effect)
    # From the earliest layer on: 0 goes, 1 goes (2 does its work), 2 stays, 3 goes, 4 stays.
    assert [layer for layer, _ in needed.features] == [4, 2]
    assert needed.scores == (1 / 3, 1 / 5)


def test_a_feature_that_hinders_goes_and_raises_what_must_be_kept():
    # Without layer 0 the effect is 0.9; from there a loss of 0.04 is within reach, and a second one of 0.04 is not.
    losses = {0: -0.2, 1: 0.04, 2: 0.04, 3: 0.5}

    def effect(features: FeatureSet) -> float:
        return 0.7 - sum(loss for layer, loss in losses.items() if FeatureId(layer, 0) not in features.features)

    assert [layer for layer, _ in needed_features(_features(3, 2, 1, 0), effect).features] == [3, 2]


def test_known_prompts_are_counted():
    sizes = [(each.name, each.known) for each in held_out_sets(bundled_prompts())]
    assert sizes == [("test-harmful", 240), ("test-harmless", 240), ("over-refusal", 216)]
    drawn, installed = draw_prompts(test_seed=5), bundled_prompts().test_harmful.texts
    known = sum(text in installed for text in drawn.test_harmful.texts)
    assert held_out_sets(drawn)[0] == HeldOutSet(name="test-harmful", prompts=240, known=known)


def test_the_prompts_that_choose_are_the_training_draw_in_order():
    drawn = draw_prompts(test_seed=5)
    splits = splits_of(drawn)
    for label in ("harmful", "harmless"):
        parts = [getattr(getattr(splits, name), label) for name in ("direction", "selection", "tuning")]
        assert [len(each) for each in parts] == [128, 64, 128]
        assert sum((each.texts for each in parts), ()) == getattr(drawn, label).texts
    assert splits.test.harmful == drawn.test_harmful
    assert splits.test.harmless == drawn.test_harmless
