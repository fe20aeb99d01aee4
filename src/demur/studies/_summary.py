"""From what the features study computed to the rows of its result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from demur.method.attribution import Attribution
from demur.method.direction import Direction
from demur.method.selection import Pool
from demur.stats import spearman
from demur.studies._answers import Answers
from demur.studies._inputs import Inputs
from demur.studies.config import StudyConfig
from demur.studies.results import (
    DirectionInfo,
    EffectRow,
    EstimatorRow,
    FeatureRow,
    FeaturesResult,
    Kind,
    Method,
    ModelInfo,
    Sample,
    SplitSize,
    SuiteInfo,
)
from demur.types import FeatureSet, RefusalToken, Value

_SAMPLES = 4


class Activations(Value):
    """Per feature of F*, in its order: mean firing rates on harmful and harmless prompts (fractions of scored tokens),
    and the mean peak activation on harmful ones."""

    active_harmful: tuple[float, ...]
    active_harmless: tuple[float, ...]
    peak_harmful: tuple[float, ...]


def estimator_row(estimate: Attribution, exact: Attribution, *, used: bool) -> EstimatorRow:
    """Rank correlation of an estimate with exact patching on the same prompts, and its completeness gap."""
    guess, truth = estimate.totals.numpy(), exact.totals.numpy()
    within = np.array([spearman(g, t) for g, t in zip(guess, truth, strict=True)])
    known = within[~np.isnan(within)]
    gap, change = float(estimate.gaps.abs().mean()), float(estimate.changes.abs().mean())
    return EstimatorRow(
        method=estimate.method,
        steps=estimate.steps,
        spearman=spearman(guess.mean(0), truth.mean(0)),
        spearman_prompt=float(known.mean()) if known.size else float("nan"),
        gap=gap,
        gap_relative=gap / change if change else float("nan"),
        used=used,
    )


def feature_rows(
    chosen: FeatureSet, pool: Pool, exact: Attribution | None, activations: Activations
) -> tuple[FeatureRow, ...]:
    """The table of F*, most important first."""
    effects = None if exact is None else dict(zip(exact.features, exact.means.mean(0).tolist(), strict=True))
    return tuple(
        FeatureRow(
            feature=feature,
            score=chosen.scores[n],
            cosine=pool.cosine(feature),
            exact=None if effects is None else effects[feature],
            active_harmful=activations.active_harmful[n],
            active_harmless=activations.active_harmless[n],
            peak_harmful=activations.peak_harmful[n],
        )
        for n, feature in enumerate(chosen.features)
    )


def pick_samples(kind: Kind, method: Method, strength: float, answers: Answers) -> list[Sample]:
    """The first few answers, for the report."""
    return [
        Sample(
            prompt_id=prompt.id,
            prompt=prompt.text,
            label=prompt.label or "harmful",
            kind=kind,
            method=method,
            strength=strength,
            text=generation.text,
            outcome=verdict.outcome,
        )
        for prompt, generation, verdict in zip(
            answers.prompts[:_SAMPLES], answers.generations[:_SAMPLES], answers.verdicts[:_SAMPLES], strict=True
        )
    ]


def _direction_info(inputs: Inputs, direction: Direction) -> DirectionInfo:
    chosen = next(
        row
        for row in direction.candidates
        if (row.layer, row.position, row.form) == (direction.layer, direction.position, direction.form)
    )
    last = inputs.model.chat.tokenize("word")
    return DirectionInfo(
        chosen=chosen,
        token=str(inputs.model.tokenizer.decode([last.ids[direction.position]])),
        norm=float(direction.difference.norm()),
        candidates=direction.candidates,
        note=direction.note,
    )


def model_info(inputs: Inputs) -> ModelInfo:
    """The model that is studied."""
    model = inputs.model
    return ModelInfo(
        name=inputs.title,
        architecture=type(model.hf).__name__,
        n_layers=model.n_layers,
        d_model=model.d_model,
        parameters=model.n_parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


def suite_info(inputs: Inputs) -> SuiteInfo:
    """The SAEs that are used."""
    suite = inputs.suite
    levels = [spec.average_l0 for spec in suite.specs if spec.average_l0 is not None]
    return SuiteInfo(
        source=inputs.saes,
        layers=suite.layers,
        d_sae=suite.specs[0].d_sae,
        activation=suite.specs[0].activation,
        average_l0=sum(levels) / len(levels) if levels else None,
    )


def make_result(
    inputs: Inputs,
    *,
    direction: Direction,
    tokens: tuple[RefusalToken, ...],
    pool: Pool,
    splits: tuple[SplitSize, ...],
    features: tuple[FeatureRow, ...],
    estimators: tuple[EstimatorRow, ...],
    local: Sequence[FeatureSet],
    chosen: FeatureSet,
    effects: tuple[EffectRow, ...],
    samples: tuple[Sample, ...],
    config: StudyConfig,
    warnings: Sequence[str],
    seconds: dict[str, float],
) -> FeaturesResult:
    """Put the result together."""
    overlap = [len({*each.features} & {*chosen.features}) / max(1, len(chosen)) for each in local]
    return FeaturesResult(
        model=model_info(inputs),
        suite=suite_info(inputs),
        judge=inputs.judge.name,
        strength_unit="multiple" if config.induce is None else "value",
        induce_where=config.induce_where,
        splits=splits,
        refusal_tokens=tokens,
        direction=_direction_info(inputs, direction),
        pool_size=len(pool.features),
        features=features,
        features_by_layer={layer: len(indices) for layer, indices in chosen.by_layer().items()},
        estimators=estimators,
        local_overlap=sum(overlap) / max(1, len(overlap)),
        effects=effects,
        samples=samples,
        warnings=tuple(warnings),
        seconds=seconds,
    )


__all__ = ["Activations", "estimator_row", "feature_rows", "make_result", "model_info", "pick_samples", "suite_info"]
