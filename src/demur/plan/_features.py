"""What a features study costs, stage by stage, each pass counted as the study makes it."""

from __future__ import annotations

from math import ceil

from demur.plan._costs import (
    SEARCHED_DEPTH,
    Load,
    Machine,
    StageCost,
    Workload,
    dictionary_flops,
    encoding,
    gradients,
    reading,
    stage,
    writing,
)
from demur.studies.config import StudyConfig


def answers_written(config: StudyConfig) -> int:
    """How many answers the study has the model write, all splits and interventions together."""
    strengths, values = len(config.suppress), len(config.induce or config.induce_multiples)
    baseline = 2 * (config.n_direction + config.n_selection + config.n_tuning + config.n_test)
    tuning = config.n_tuning * (2 * strengths + values)
    # F* and its random control at every strength, and the chosen one's side effects on harmless prompts; two forms of
    # ablation on both classes, and the addition.
    test = config.n_test * (2 * (strengths + values + 1) + 2 * 2 + 1)
    return baseline + tuning + test


def baseline_answers(config: StudyConfig) -> int:
    """Answers of the clean model."""
    return 2 * (config.n_direction + config.n_selection + config.n_tuning + config.n_test)


def stages(work: Workload, machine: Machine) -> tuple[StageCost, ...]:
    """The stages of the study in order, with their cost on this machine."""
    config = work.config
    left = answers_written(config) - baseline_answers(config)
    return (
        *finding_stages(work, machine),
        stage("exact patching", _exact(work), machine),
        stage("activations", encoding(work, 2 * config.n_selection).plus(reading(work, config.n_selection)), machine),
        stage("validation", writing(work, left, left / config.n_test), machine),
    )


def finding_stages(work: Workload, machine: Machine) -> tuple[StageCost, ...]:
    """The stages up to F*, which studies share."""
    config, model, saes = work.config, work.model, work.saes
    decoders = 4.0 * model.d_model * saes.d_sae * len(saes.layers)
    pool = Load(dictionary_flops(model, saes, 1), decoders)
    if config.pool != "cosine":
        pool = pool.plus(dictionary_attribution(work, config.n_selection))
    return (
        stage("baseline", writing(work, baseline_answers(config), 8), machine),
        stage("direction", direction_search(work), machine),
        stage("pool", pool, machine),
        stage("attribution", gradients(work, config.n_selection, estimator_steps(config)), machine),
    )


def estimator_steps(config: StudyConfig) -> int:
    """Gradient steps of the study's estimator."""
    return 1 if config.estimator == "gradient" else config.steps


def direction_search(work: Workload) -> Load:
    """The means, and every candidate's scores."""
    config = work.config
    layers = 1 if config.direction_layer is not None else ceil(SEARCHED_DEPTH * work.model.n_layers)
    positions = 1 if config.direction_position is not None else work.template_positions
    forms = 2 if config.direction_form == "auto" else 1
    # Per candidate place: the addition on harmless prompts, and each form's ablation on both classes.
    passes = layers * positions * (1 + 2 * forms) + 1
    return reading(work, 2 * config.n_direction).plus(reading(work, config.n_selection).times(passes))


def dictionary_attribution(work: Workload, prompts: float) -> Load:
    """Attribution over whole dictionaries: gradients, both ends encoded, and one product with every decoder."""
    config = work.config
    ends = 2 if config.estimator != "ig" else 1 + config.steps
    tokens = prompts * work.prompt_tokens
    dense = Load((ends + 1) * dictionary_flops(work.model, work.saes, tokens))
    return gradients(work, prompts, estimator_steps(config)).plus(dense)


def _exact(work: Workload) -> Load:
    """Each feature of the pool patched alone, and the three estimators on the same prompts."""
    config = work.config
    n, pool = config.n_exact, config.k0 * len(work.saes.layers)
    if not n:
        return Load()
    estimated = [gradients(work, n, steps) for steps in (1, config.steps, config.steps)]
    return reading(work, n).times(pool).plus(*estimated)


__all__ = [
    "answers_written",
    "baseline_answers",
    "dictionary_attribution",
    "direction_search",
    "estimator_steps",
    "finding_stages",
    "stages",
]
