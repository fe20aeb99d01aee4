"""How a study finds its features: baseline → direction → pool → attribution → F* (paper, section 3).

Each step is a stage of the run folder, keyed by everything that it depends on: studies in one folder share them, and
the same command resumes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from demur.method.attribution import (
    Attribution,
    AttributionSpec,
    DictionaryAttribution,
    Method,
    Metric,
    PromptAttribution,
    ScoredTokens,
    attribute_batches,
    attribute_dictionary,
    pool_features,
)
from demur.method.direction import FORMS, Direction, DirectionSearch, find_direction
from demur.method.interventions import Compiled
from demur.method.selection import (
    Pool,
    cosine_pool,
    firing_rates,
    global_set,
    local_sets,
    mean_peaks,
    mean_rates,
    pool_of,
    random_set,
)
from demur.model import Budgets
from demur.studies._answers import Answering
from demur.studies._context import Baseline, Study
from demur.studies._judging import Judging
from demur.studies._summary import Activations, estimator_row
from demur.studies.results import EstimatorRow
from demur.types import Candidate, FeatureId, FeatureSet, PromptSet, Value

_ESTIMATORS: tuple[Method, ...] = ("gradient", "ig", "paper")


class _BudgetsValue(Value):
    plain: int
    gradients: int


@dataclass(frozen=True)
class Found:
    """What the steps up to F* gave."""

    baseline: Baseline
    direction: Direction
    pool: Pool
    attribution: Attribution
    """Of the pool, on the selection prompts."""
    chosen: FeatureSet
    """F*."""

    @property
    def local(self) -> tuple[FeatureSet, ...]:
        """Each selection prompt's own set, of the size of F*."""
        return local_sets(self.attribution, len(self.chosen))


def start_answering(study: Study) -> Answering:
    """What answers the study's prompts, with batches of one size for the life of the run folder."""
    _pin_budgets(study)
    return Answering(
        study.run,
        study.inputs.model,
        study.inputs.suite,
        Judging(study.run, study.inputs.judge, study.progress),
        identity=study.identity,
        max_new_tokens=study.config.max_new_tokens,
        progress=study.progress,
    )


def find_features(study: Study, answering: Answering) -> Found:
    """All steps up to F*."""
    with study.timed("baseline"):
        baseline = Baseline.measure(study, answering)
    with study.timed("direction"):
        direction = choose_direction(study, baseline)
    with study.timed("pool"):
        pool = make_pool(study, baseline, direction)
    with study.timed("attribution"):
        scored = baseline.used("selection").harmful
        attribution = attribute_pool(study, baseline, direction, pool, study.config.estimator, scored)
        chosen = global_set(attribution, study.config.k)
    return Found(baseline, direction, pool, attribution, chosen)


def _pin_budgets(study: Study) -> None:
    """Keep one size of batches for the life of the run folder, whatever memory is free when it is resumed."""
    stage = study.run.stage("budget", {"model": study.identity, "limit": study.config.max_batch_tokens})
    if not stage.done:
        budgets = study.inputs.model.budgets
        stage.save("budget", _BudgetsValue(plain=budgets.plain, gradients=budgets.gradients))
        stage.finish()
    found = stage.load("budget", _BudgetsValue)
    study.inputs.model.budgets = Budgets(found.plain, found.gradients)


def choose_direction(study: Study, baseline: Baseline) -> Direction:
    config, model = study.config, study.inputs.model
    train, validation = baseline.used("direction"), baseline.used("selection")
    search = DirectionSearch(
        forms=FORMS if config.direction_form == "auto" else (config.direction_form,),
        layer=config.direction_layer,
        position=config.direction_position,
        kl_threshold=config.kl_threshold,
    )
    depends = {
        "model": study.identity,
        "train": [train.harmful.digest, train.harmless.digest],
        "validation": [validation.harmful.digest, validation.harmless.digest],
        "refusal_ids": baseline.refusal_ids,
        "search": [search.forms, search.layer, search.position, search.max_depth, search.kl_threshold],
    }
    stage = study.run.stage("direction", depends)
    if not stage.done:

        def scored(candidate: Candidate, done: int, total: int) -> None:
            stage.append("candidates", candidate)
            study.progress("direction", done, total)

        direction = find_direction(
            model,
            (study.rendered(train.harmful), study.rendered(train.harmless)),
            (study.rendered(validation.harmful), study.rendered(validation.harmless)),
            baseline.refusal_ids,
            search,
            known=stage.rows("candidates", Candidate),
            scored=scored,
        )
        stage.save("direction", direction)
        stage.finish()
    direction = stage.load("direction", Direction)
    if direction.note:
        study.warnings.append(f"direction: {direction.note}")
    return direction


def make_pool(study: Study, baseline: Baseline, direction: Direction) -> Pool:
    """The features that are attributed one by one."""
    config, suite = study.config, study.inputs.suite
    depends = study.depends | {
        "direction": direction.difference.tolist(),
        "k0": config.k0,
        "layers": suite.layers,
        # Absent where it changes nothing, so that folders of earlier versions resume.
        **({} if config.pool == "cosine" else {"source": config.pool}),
    }
    best: tuple[FeatureId, ...] = ()
    if config.pool != "cosine":
        harmful = baseline.used("selection").harmful
        # Features are kept to be scaled down, so those that rise when refusal goes are not wanted.
        scored = attribute_everything(study, baseline, direction, harmful, falling=True)
        best = scored.overall.head(config.k0 * len(suite.layers)).features
        depends |= {"attributed": best}
    stage = study.run.stage("pool", depends)
    if not stage.done:
        study.progress("pool", 0, 1)
        pool = cosine_pool(suite, direction.vector, config.k0)
        if config.pool == "attribution":
            pool = pool_of(suite, direction.vector, best)
        elif config.pool == "union":
            pool = pool_of(suite, direction.vector, tuple(dict.fromkeys((*pool.features, *best))))
        stage.save("pool", pool)
        stage.finish()
        study.progress("pool", 1, 1)
    return stage.load("pool", Pool)


def _asked(
    study: Study, baseline: Baseline, direction: Direction, method: Method
) -> tuple[Metric, ScoredTokens, Compiled, AttributionSpec]:
    """What attribution by a method asks: the metric, the tokens, the patched run, and all of it as a value."""
    metric, scoring = Metric(baseline.refusal_ids, allow_refusal_target=method == "paper"), ScoredTokens()
    patch = Compiled(study.inputs.model, None, [direction.ablate()])
    return metric, scoring, patch, AttributionSpec.of(method, study.config.steps, metric, scoring, patch.id)


def attribute_everything(
    study: Study, baseline: Baseline, direction: Direction, harmful: PromptSet, *, falling: bool = False
) -> DictionaryAttribution:
    """Attribution over whole dictionaries (the AP baseline), the best of each prompt and over all of them.

    As many features are kept as a pool or F* can ask for. `falling`: see `attribute_dictionary`.
    """
    config, model, suite = study.config, study.inputs.model, study.inputs.suite
    top = max(config.k, config.k0 * len(suite.layers))
    metric, scoring, patch, question = _asked(study, baseline, direction, config.estimator)
    depends = study.depends | {"prompts": harmful.digest, "top": top, "question": question, "layers": suite.layers}
    depends |= {"falling": falling}
    stage = study.run.stage("dictionary", depends)
    if not stage.done:
        found = attribute_dictionary(
            model,
            suite,
            study.rendered(harmful),
            patch=patch,
            metric=metric,
            top=top,
            method=config.estimator,
            steps=config.steps,
            scoring=scoring,
            falling=falling,
            progress=lambda done, total: study.progress("attribution: all features", done, total),
        )
        stage.save("overall", found.overall)
        stage.save_values("local", found.local)
        stage.finish()
    return DictionaryAttribution(tuple(stage.load_values("local", FeatureSet)), stage.load("overall", FeatureSet))


def attribute_pool(
    study: Study, baseline: Baseline, direction: Direction, pool: Pool, method: Method, harmful: PromptSet
) -> Attribution:
    """Attribution of the pool on these prompts, resumed where it was left."""
    model = study.inputs.model
    metric, scoring, patch, question = _asked(study, baseline, direction, method)
    depends = study.depends | {"prompts": harmful.digest, "pool": pool.features, "question": question}
    stage = study.run.stage("attribution", depends)
    if not stage.done:
        found = {row.prompt_id for row in stage.rows("attribution", PromptAttribution)}
        parts = attribute_batches(
            model,
            study.inputs.suite,
            study.rendered(harmful),
            pool.by_layer,
            patch=patch,
            metric=metric,
            method=method,
            steps=study.config.steps,
            scoring=scoring,
            done=frozenset(found),
        )
        for part in parts:
            for row in part.rows:
                if row.prompt_id not in found:
                    stage.append("attribution", row)
                    found.add(row.prompt_id)
            study.progress(f"attribution: {method}", len(found), len(harmful))
        stage.finish()
    rows = tuple(stage.rows("attribution", PromptAttribution))
    return Attribution(pool_features(pool.by_layer), question, rows).ordered(harmful.ids)


def compare_estimators(
    study: Study, baseline: Baseline, direction: Direction, pool: Pool
) -> tuple[tuple[EstimatorRow, ...], Attribution | None]:
    """Every estimator against exact patching, on the first test prompts that the model refuses."""
    some = baseline.used("test").harmful.head(study.config.n_exact)
    if len(some) == 0:
        if study.config.n_exact:
            study.warnings.append("the model refuses no harmful test prompt, so nothing could be patched exactly")
        return (), None
    exact = attribute_pool(study, baseline, direction, pool, "exact", some)
    rows = [
        estimator_row(
            attribute_pool(study, baseline, direction, pool, method, some), exact, used=method == study.config.estimator
        )
        for method in _ESTIMATORS
    ]
    return tuple(rows), exact


def measure_activations(
    study: Study, baseline: Baseline, chosen: FeatureSet, pool: Pool
) -> tuple[Activations, FeatureSet]:
    """How often and how strongly the features of F* fire, and random features matched to them."""
    model, suite, used = study.inputs.model, study.inputs.suite, baseline.used("selection")
    layers = tuple(chosen.by_layer())
    depends = study.depends | {
        "prompts": [used.harmful.digest, used.harmless.digest],
        "features": chosen.features,
        "exclude": pool.features,
        "seed": study.config.seed,
    }
    stage = study.run.stage("activations", depends)
    if not stage.done:
        harmful, harmless = study.rendered(used.harmful), study.rendered(used.harmless)
        study.progress("activations", 0, 3)
        rates = firing_rates(model, suite, harmful, layers=layers)
        study.progress("activations", 1, 3)
        others = firing_rates(model, suite, harmless, layers=layers)
        study.progress("activations", 2, 3)
        peaks = mean_peaks(model, suite, harmful, chosen.features)
        study.progress("activations", 3, 3)
        stage.save(
            "activations",
            Activations(
                active_harmful=tuple(float(rates[layer][i]) for layer, i in chosen.features),
                active_harmless=tuple(float(others[layer][i]) for layer, i in chosen.features),
                peak_harmful=tuple(peaks.tolist()),
            ),
        )
        stage.save(
            "control", random_set(chosen, mean_rates(rates, others), exclude=pool.features, seed=study.config.seed)
        )
        stage.finish()
    return stage.load("activations", Activations), stage.load("control", FeatureSet)


__all__ = [
    "Found",
    "attribute_everything",
    "attribute_pool",
    "choose_direction",
    "compare_estimators",
    "find_features",
    "make_pool",
    "measure_activations",
    "start_answering",
]
