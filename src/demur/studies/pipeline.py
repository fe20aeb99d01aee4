"""How features are found (paper, section 3): clean answers → direction → pool → attribution → F*.

Everything here chooses, so it takes `ChoosingSplits` and never sees a test prompt. Each step is a stage of the run
folder, keyed by everything that it depends on: studies in one folder share them, and the same command resumes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from demur.errors import ModelError
from demur.method.attribution import (
    Attribution,
    AttributionSpec,
    PromptAttribution,
    ScoredTokens,
    attribute_batches,
    pool_features,
)
from demur.method.direction import FORMS, Direction, DirectionSearch, find_direction, find_refusal_tokens
from demur.method.interventions import Compiled
from demur.method.path import Method, Metric
from demur.method.selection import (
    DictionaryAttribution,
    Pool,
    attribute_dictionary,
    cosine_pool,
    firing_rates,
    global_set,
    local_sets,
    mean_max_activations,
    pool_of,
)
from demur.stats import spearman, spearman_over_prompts
from demur.studies.answers import JudgedAnswers
from demur.studies.config import FindConfig, StudyConfig
from demur.studies.context import Workspace
from demur.studies.results import EstimatorRow, SplitUse
from demur.types import (
    Candidate,
    ChoosingSplits,
    FeatureField,
    FeatureId,
    FeatureSet,
    Label,
    Outcome,
    PromptSet,
    RefusalToken,
    Split,
    Value,
)

ESTIMATORS: tuple[Method, ...] = ("gradient", "ig", "paper")
MIN_REFUSAL = 0.05
"""Below this share of refused harmful prompts there is no refusal to explain."""


Finding = Workspace[FindConfig]


@dataclass(frozen=True)
class CleanAnswers:
    """Answers of the clean model to the prompts that choose, and its refusal tokens."""

    answers: dict[str, tuple[JudgedAnswers, JudgedAnswers]]
    """Split → answers to its harmful and its harmless prompts."""
    tokens: tuple[RefusalToken, ...]

    @property
    def refusal_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)

    def used(self, purpose: str) -> Split:
        """Harmful prompts that the model refused and harmless ones that it answered: where the labels hold."""
        return split_used(*self.answers[purpose])


def split_used(harmful: JudgedAnswers, harmless: JudgedAnswers) -> Split:
    """The harmful prompts that were refused and the harmless ones that were not."""
    return Split(
        harmful=harmful.only(lambda outcome: outcome in (Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL)),
        harmless=harmless.only(lambda outcome: outcome in (Outcome.COMPLIANCE, Outcome.INCOHERENT)),
    )


def split_use(name: str, harmful: JudgedAnswers, harmless: JudgedAnswers) -> tuple[SplitUse, SplitUse]:
    """How the clean model answered one split, class by class."""
    used = split_used(harmful, harmless)
    chooses_features = name in ("direction", "selection")

    def row(label: Label, answers: JudgedAnswers, kept: PromptSet) -> SplitUse:
        return SplitUse(
            split=name,
            label=label,
            n=len(answers.answers),
            refused=sum(each is True for each in answers.refused),
            complied=sum(each is True for each in answers.complied),
            used=len(kept) if chooses_features else len(answers.answers),
        )

    return row("harmful", harmful, used.harmful), row("harmless", harmless, used.harmless)


@dataclass(frozen=True)
class Found:
    """The features that mediate refusal, and every step on the way to them."""

    clean: CleanAnswers
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


def find(work: Finding, prompts: ChoosingSplits) -> Found:
    """All steps up to F*.

    Raises:
        ModelError: the model never refuses, or nothing in it moves the metric; says what to do.
    """
    with work.timed("clean answers"):
        clean = answer_clean(work, prompts)
    with work.timed("direction"):
        direction = choose_direction(work, clean)
    with work.timed("pool"):
        pool = make_pool(work, clean, direction)
    with work.timed("attribution"):
        scored = clean.used("selection").harmful
        attribution = attribute_pool(work, clean, direction, pool, work.config.estimator, scored)
        chosen = global_set(attribution, work.config.k)
    if attribution.share_without_signal > 0:
        work.warn(
            f"{attribution.share_without_signal:.0%} of the {len(scored)} selection prompts carry no attribution "
            "signal: ablating the direction does not change their metric"
        )
    if len(chosen) < work.config.k:
        work.warn(f"the pool holds {len(chosen)} features, so F* has that size instead of {work.config.k}; raise --k0")
    return Found(clean, direction, pool, attribution, chosen)


def answer_clean(work: Finding, prompts: ChoosingSplits) -> CleanAnswers:
    """The clean model's answers to all prompts that choose, and the first tokens of its refusals."""
    answers: dict[str, tuple[JudgedAnswers, JudgedAnswers]] = {}
    for purpose in ("direction", "selection", "tuning"):
        split: Split = getattr(prompts, purpose)
        answers[purpose] = (
            work.answer(f"clean: {purpose}, harmful", split.harmful),
            work.answer(f"clean: {purpose}, harmless", split.harmless),
        )
    harmful = JudgedAnswers.joined([each for each, _ in answers.values()])
    harmless = JudgedAnswers.joined([each for _, each in answers.values()])
    _require_refusals(work, harmful, harmless)
    refusals = [a.text for a, v in zip(harmful.answers, harmful.verdicts, strict=True) if v.outcome is Outcome.REFUSAL]
    others = [a.text for a, refused in zip(harmless.answers, harmless.refused, strict=True) if refused is False]
    found = CleanAnswers(answers, find_refusal_tokens(work.model, refusals, others))
    for purpose in ("direction", "selection"):
        used = found.used(purpose)
        if min(len(used.harmful), len(used.harmless)) < 2:
            raise ModelError(
                f"of the {purpose} prompts, {len(used.harmful)} harmful ones were refused and {len(used.harmless)} "
                "harmless ones were not; at least 2 of each are needed. Give more prompts, or clearer ones"
            )
    return found


def _require_refusals(work: Finding, harmful: JudgedAnswers, harmless: JudgedAnswers) -> None:
    rate = harmful.refusal
    refused = sum(each is True for each in harmful.refused)
    if refused < 2 or rate.value < MIN_REFUSAL:
        shown = "\n".join(
            f"  {answer.prompt.text[:70]!r} -> {answer.text[:70]!r} ({verdict.outcome or 'unscored'})"
            for answer, verdict in zip(harmful.answers[:3], harmful.verdicts[:3], strict=True)
        )
        raise ModelError(
            f"{work.inputs.title} refused {refused} of {rate.n} harmful prompts ({rate.unscored} unscored by "
            f"the judge {work.inputs.judge.name!r}), so there is no refusal to explain. For example:\n{shown}\n"
            "Check that it is a chat model, that these prompts are harmful, and that the judge knows how it refuses"
        )
    warn_of_over_refusal(work, "the prompts that choose", harmless)


def warn_of_over_refusal(work: Workspace[StudyConfig] | Finding, where: str, harmless: JudgedAnswers) -> None:
    """Warn where the clean model refuses more than a fifth of a set of harmless prompts."""
    over = harmless.refusal
    if over.n and over.value > 0.2:
        work.warn(
            f"the clean model refuses {over.value:.0%} of {over.n} harmless prompts ({where}): the contrast between "
            "the classes is weak there, and side effects rest on the prompts that it answers"
        )


def choose_direction(work: Finding, clean: CleanAnswers) -> Direction:
    """The refusal direction: fixed by the configuration, or the best of all candidates (Arditi et al., 2024)."""
    config = work.config
    train, validation = clean.used("direction"), clean.used("selection")
    search = DirectionSearch(
        forms=FORMS if config.direction_form == "auto" else (config.direction_form,),
        layer=config.direction_layer,
        position=config.direction_position,
        kl_threshold=config.kl_threshold,
    )
    depends = {
        "model": work.identity,
        "train": [train.harmful.digest, train.harmless.digest],
        "validation": [validation.harmful.digest, validation.harmless.digest],
        "refusal_ids": clean.refusal_ids,
        "search": [search.forms, search.layer, search.position, search.max_depth, search.kl_threshold],
    }
    stage = work.run.stage("direction", depends)
    if not stage.done:

        def scored(candidate: Candidate, done: int, total: int) -> None:
            stage.append("candidates", candidate)
            work.progress("direction", done, total)

        # A search of many candidates resumes in the middle, so it keeps its own rows.
        direction = find_direction(
            work.model,
            (work.tokenize(train.harmful), work.tokenize(train.harmless)),
            (work.tokenize(validation.harmful), work.tokenize(validation.harmless)),
            clean.refusal_ids,
            search,
            known=stage.rows("candidates", Candidate),
            scored=scored,
        )
        stage.save("direction", direction)
        stage.finish()
    direction = stage.load("direction", Direction)
    if direction.note:
        work.warn(f"direction: {direction.note}")
    return direction


def make_pool(work: Finding, clean: CleanAnswers, direction: Direction) -> Pool:
    """The features that are attributed one by one (`F0`)."""
    config, suite = work.config, work.suite
    best: tuple[FeatureId, ...] = ()
    if config.pool != "cosine":
        harmful = clean.used("selection").harmful
        # Features are kept to be scaled down, so those that rise when refusal goes are not wanted.
        scored = attribute_everything(work, clean, direction, harmful, falling=True)
        best = scored.overall.head(config.k0 * len(suite.layers)).features
    depends = {
        "direction": direction.difference.tolist(),
        "k0": config.k0,
        "layers": suite.layers,
        "source": config.pool,
        "attributed": best,
    }

    def compute() -> Pool:
        if config.pool == "attribution":
            return pool_of(suite, direction.vector, best)
        pool = cosine_pool(suite, direction.vector, config.k0)
        if config.pool == "cosine":
            return pool
        return pool_of(suite, direction.vector, tuple(dict.fromkeys((*pool.features, *best))))

    return work.cached("pool", depends, Pool, compute, "pool")


def _asked(
    work: Finding, clean: CleanAnswers, direction: Direction, method: Method
) -> tuple[Metric, ScoredTokens, Compiled, AttributionSpec]:
    """What attribution by a method asks: the metric, the tokens, the patched run, and all of it as a value.

    The target token follows one rule, that of the study's own estimator, so that all methods are asked the same.
    """
    metric = Metric(clean.refusal_ids, allow_refusal_target=work.config.estimator == "paper")
    tokens = ScoredTokens()
    patch = Compiled(work.model, None, [direction.ablate()])
    return metric, tokens, patch, AttributionSpec.of(method, work.config.steps, metric, tokens, patch.id)


def attribute_everything(
    work: Finding, clean: CleanAnswers, direction: Direction, harmful: PromptSet, *, falling: bool = False
) -> DictionaryAttribution:
    """Attribution over whole dictionaries (the AP baseline), the best of each prompt and over all of them.

    As many features are kept as a pool or F* can ask for.

    Args:
        work: the workspace.
        clean: gives the refusal tokens.
        direction: ablated in the patched run.
        harmful: prompts to attribute on.
        falling: see `attribute_dictionary`.
    """
    config, suite = work.config, work.suite
    top = max(config.k, config.k0 * len(suite.layers))
    metric, tokens, patch, spec = _asked(work, clean, direction, config.estimator)
    depends = {"prompts": harmful.digest, "top": top, "spec": spec, "layers": suite.layers, "falling": falling}

    def compute() -> DictionaryAttribution:
        return attribute_dictionary(
            work.model,
            suite,
            work.tokenize(harmful),
            patch=patch,
            metric=metric,
            top=top,
            method=config.estimator,
            steps=config.steps,
            scoring=tokens,
            falling=falling,
            progress=partial(work.progress, "attribution: all features"),
        )

    return work.cached("dictionary", depends, DictionaryAttribution, compute)


def attribute_pool(
    work: Finding, clean: CleanAnswers, direction: Direction, pool: Pool, method: Method, harmful: PromptSet
) -> Attribution:
    """Attribution of the pool on these prompts, resumed where it was left.

    Args:
        work: the workspace.
        clean: gives the refusal tokens.
        direction: ablated in the patched run.
        pool: features to attribute.
        method: "gradient", "ig", "paper" or "exact".
        harmful: prompts to attribute on.
    """
    metric, tokens, patch, spec = _asked(work, clean, direction, method)

    def compute(done: frozenset[str]) -> Iterator[Sequence[PromptAttribution]]:
        parts = attribute_batches(
            work.model,
            work.suite,
            work.tokenize(harmful),
            pool.by_layer,
            patch=patch,
            metric=metric,
            method=method,
            steps=work.config.steps,
            scoring=tokens,
            done=done,
        )
        for part in parts:
            yield part.rows

    rows = work.run.mapped(
        "attribution",
        work.depends | {"prompts": harmful.digest, "pool": pool.features, "spec": spec},
        PromptAttribution,
        harmful.ids,
        compute,
        key=lambda row: row.prompt_id,
        progress=partial(work.progress, f"attribution: {method}"),
    )
    return Attribution(pool_features(pool.by_layer), spec, tuple(rows))


class Activity(Value):
    """How often and how strongly each feature of a set fires: means over prompts, on scored tokens.

    `rate_*` are shares of tokens on which a feature is active, `max_harmful` its maximum activation in a harmful
    prompt, in the SAE's own units.
    """

    features: tuple[FeatureField, ...]
    rate_harmful: tuple[float, ...]
    rate_harmless: tuple[float, ...]
    max_harmful: tuple[float, ...]


def measure_activity(work: Finding, clean: CleanAnswers, features: tuple[FeatureId, ...]) -> Activity:
    """Firing rates and maximum activations of given features on the selection prompts."""
    used = clean.used("selection")
    depends = {"prompts": [used.harmful.digest, used.harmless.digest], "features": features}

    def compute() -> Activity:
        model, suite = work.model, work.suite
        layers = tuple(dict.fromkeys(layer for layer, _ in features))
        harmful, harmless = work.tokenize(used.harmful), work.tokenize(used.harmless)
        often, seldom = (firing_rates(model, suite, prompts, layers=layers) for prompts in (harmful, harmless))
        return Activity(
            features=features,
            rate_harmful=tuple(float(often[layer][index]) for layer, index in features),
            rate_harmless=tuple(float(seldom[layer][index]) for layer, index in features),
            max_harmful=tuple(mean_max_activations(model, suite, harmful, features).tolist()),
        )

    return work.cached("activity", depends, Activity, compute, "activations")


def compare_estimators(
    work: Finding, found: Found, refused: PromptSet
) -> tuple[tuple[EstimatorRow, ...], Attribution | None]:
    """Every estimator against exact patching on `refused`: harmful prompts that chose nothing."""
    if len(refused) == 0:
        if work.config.n_exact:
            work.warn("the model refuses no harmful test prompt, so nothing could be patched exactly")
        return (), None

    def of(method: Method) -> Attribution:
        return attribute_pool(work, found.clean, found.direction, found.pool, method, refused)

    exact = of("exact")
    rows = [_estimator_row(of(method), exact, used=method == work.config.estimator) for method in ESTIMATORS]
    return tuple(rows), exact


def _estimator_row(estimate: Attribution, exact: Attribution, *, used: bool) -> EstimatorRow:
    guess, truth = estimate.totals.numpy(), exact.totals.numpy()
    within = np.array([spearman(g, t) for g, t in zip(guess, truth, strict=True)])
    known = within[~np.isnan(within)]
    gap, change = float(estimate.gaps.abs().mean()), float(estimate.changes.abs().mean())
    return EstimatorRow(
        method=estimate.method,
        steps=estimate.steps,
        n=len(guess),
        spearman=spearman_over_prompts(guess, truth),
        spearman_prompt=float(known.mean()) if known.size else float("nan"),
        gap=gap,
        gap_relative=gap / change if change else float("nan"),
        used=used,
    )
