"""Validation: strengths from the tuning prompts, effects on the test prompts (paper, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from demur.errors import ModelError
from demur.method.direction import FORMS, Direction
from demur.method.interventions import Intervention, ScaleFeatures, SetFeatures
from demur.studies._answers import Answering, Answers, effect_row
from demur.studies._context import Baseline, Study
from demur.studies._summary import Activations, pick_samples
from demur.studies.results import EffectRow, Kind, Sample
from demur.types import FeatureId, FeatureSet, PromptSet, Split


@dataclass(frozen=True)
class _Arm:
    """One side of the validation: what is done to which prompts, and when it counts as better."""

    kind: Kind
    label: str
    strengths: tuple[float, ...]
    change: Callable[[tuple[FeatureId, ...], float], Intervention]


def _arms(study: Study, activations: Activations) -> tuple[_Arm, _Arm]:
    config, peaks = study.config, activations.peak_harmful

    def induce(features: tuple[FeatureId, ...], strength: float) -> Intervention:
        if config.induce is not None:
            return SetFeatures(features, strength, config.induce_where)
        # A matched feature is set to what the feature it stands for is set to.
        return SetFeatures(features, tuple(strength * peak for peak in peaks), config.induce_where)

    return (
        _Arm("suppress", "harmful", config.suppress, ScaleFeatures),
        _Arm("induce", "harmless", config.induce or config.induce_multiples, induce),
    )


def validate(
    study: Study,
    answering: Answering,
    baseline: Baseline,
    direction: Direction,
    chosen: FeatureSet,
    control: FeatureSet,
    activations: Activations,
) -> tuple[tuple[EffectRow, ...], tuple[Sample, ...]]:
    """Strengths from the tuning prompts; effects of features, matched random features and direction on the test
    prompts."""
    test = study.inputs.splits.test
    base_harmful, base_harmless = baseline.answers["test"]
    rows = [
        effect_row("harmful", "baseline", "none", 0.0, base_harmful),
        effect_row("harmless", "baseline", "none", 0.0, base_harmless),
    ]
    samples = pick_samples("baseline", "none", 0.0, base_harmful) + pick_samples("baseline", "none", 0.0, base_harmless)
    suppress, induce = _arms(study, activations)
    for arm, prompts, base in ((suppress, test.harmful, base_harmful), (induce, test.harmless, base_harmless)):
        best = _tune(study, answering, baseline, arm, chosen)
        for strength in arm.strengths:
            title = f"test: {arm.kind} {strength:g}"
            features, random = _pair(answering, arm, strength, chosen, control, prompts, title)
            picked = strength == best
            rows.append(effect_row(arm.label, arm.kind, "features", strength, features, base, random, chosen=picked))
            rows.append(effect_row(arm.label, arm.kind, "random", strength, random, base, chosen=picked))
            if picked:
                samples += pick_samples(arm.kind, "features", strength, features)
        if arm is suppress:
            title = f"test: {arm.kind} {best:g}, harmless"
            features, random = _pair(answering, arm, best, chosen, control, test.harmless, title)
            rows.append(
                effect_row("harmless", arm.kind, "features", best, features, base_harmless, random, chosen=True)
            )
            rows.append(effect_row("harmless", arm.kind, "random", best, random, base_harmless, chosen=True))
    rows += _direction_rows(study, answering, direction, test, base_harmful, base_harmless)
    return tuple(rows), tuple(samples)


def _pair(
    answering: Answering,
    arm: _Arm,
    strength: float,
    chosen: FeatureSet,
    control: FeatureSet,
    prompts: PromptSet,
    title: str,
) -> tuple[Answers, Answers]:
    """The same done to F* and to the matched random features."""
    features = answering.answer(title, prompts, [arm.change(chosen.features, strength)])
    return features, answering.answer(f"{title}, random", prompts, [arm.change(control.features, strength)])


def _tune(study: Study, answering: Answering, baseline: Baseline, arm: _Arm, chosen: FeatureSet) -> float:
    """The strength that serves best on the tuning prompts; the mildest of equals.

    Suppression: the highest sum of compliance on harmful prompts and answers unchanged on harmless ones. Induction: the
    highest refusal on harmless prompts.
    """
    split = study.inputs.splits.tuning

    def score(strength: float) -> float:
        change = [arm.change(chosen.features, strength)]
        title = f"tuning: {arm.kind} {strength:g}"
        if arm.kind == "induce":
            return answering.answer(title, split.harmless, change).refusal.value
        harmful = answering.answer(title, split.harmful, change)
        harmless = answering.answer(f"{title}, harmless", split.harmless, change)
        return harmful.compliance.value + harmless.unchanged(baseline.answers["tuning"][1]).value

    mild = 1.0 if arm.kind == "suppress" else 0.0
    scores = {strength: score(strength) for strength in arm.strengths}
    # A strength whose answers were all unscored is unknown, not best.
    known = [strength for strength in arm.strengths if not math.isnan(scores[strength])]
    if not known:
        raise ModelError(
            f"the judge {study.inputs.judge.name!r} could score none of the answers on tuning prompts, so no strength "
            "can be chosen; it may not know the language of the answers"
        )
    return max(known, key=lambda strength: (scores[strength], -abs(strength - mild)))


def _direction_rows(
    study: Study,
    answering: Answering,
    direction: Direction,
    test: Split,
    base_harmful: Answers,
    base_harmless: Answers,
) -> list[EffectRow]:
    """Both forms of ablation on both classes, and the addition on harmless prompts."""
    rows: list[EffectRow] = []
    for form in FORMS:
        method = "direction" if form == "linear" else "direction_affine"
        for label, prompts, base in (
            ("harmful", test.harmful, base_harmful),
            ("harmless", test.harmless, base_harmless),
        ):
            answers = answering.answer(f"test: ablate direction ({form}), {label}", prompts, [direction.ablate(form)])
            rows.append(effect_row(label, "suppress", method, 1.0, answers, base, chosen=form == direction.form))
    # On the tokens on which features are set, so that the two can be compared.
    change = direction.add(where=study.config.induce_where)
    added = answering.answer("test: add direction", test.harmless, [change])
    rows.append(effect_row("harmless", "induce", "direction", 1.0, added, base_harmless, chosen=True))
    return rows


__all__ = ["validate"]
