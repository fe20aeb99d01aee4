"""How features are found (paper, section 3): clean answers → direction → pool → attribution → F*.

Everything here chooses, so it takes `ChoosingSplits` and never sees a test prompt. Each step is a stage of the run
folder, keyed by everything that it depends on: studies in one folder share them, and the same command resumes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

import numpy as np

from demur.errors import ModelError
from demur.method import selection
from demur.method.activations import feature_means
from demur.method.attribution import (
    SCORED,
    Attribution,
    AttributionSpec,
    PromptAttribution,
    ScoredTokens,
    attribute_batches,
    pool_features,
)
from demur.method.direction import (
    FORMS,
    ClassMeans,
    Direction,
    DirectionSearch,
    Scores,
    candidate_name,
    find_direction,
    find_refusal_tokens,
)
from demur.method.fidelity import reconstruction
from demur.method.interventions import Compiled
from demur.method.path import Method, Metric
from demur.method.selection import DictionaryAttribution, Pool
from demur.model import SCORED_REGIONS
from demur.stats import spearman, spearman_over_prompts
from demur.studies.config import FindConfig, StudyConfig
from demur.studies.context import JudgedAnswers, Workspace
from demur.studies.results import Activity, DirectionInfo, EstimatorRow, FeatureRow, SplitUse
from demur.types import (
    REFUSALS,
    Candidate,
    ChoosingSplits,
    FeatureSet,
    Label,
    Outcome,
    Prompt,
    PromptSet,
    RefusalToken,
    Split,
    Take,
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
    return Split(harmful=harmful.only(*REFUSALS), harmless=harmless.only(Outcome.COMPLIANCE, Outcome.INCOHERENT))


def split_use(name: str, harmful: JudgedAnswers, harmless: JudgedAnswers) -> tuple[SplitUse, ...]:
    """How the clean model answered one split, class by class."""
    used = split_used(harmful, harmless)
    classes: tuple[tuple[Label, JudgedAnswers, PromptSet], ...]
    classes = (("harmful", harmful, used.harmful), ("harmless", harmless, used.harmless))
    return tuple(
        SplitUse(
            split=name,
            label=label,
            n=len(judged.answers),
            refused=judged.refused.count(True),
            complied=judged.complied.count(True),
            used=len(kept if name in ("direction", "selection") else judged.answers),
        )
        for label, judged, kept in classes
    )


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
    def local_overlap(self) -> float:
        """Mean share of F* that a selection prompt's own set of that size holds."""
        size, own = len(self.chosen), selection.local_sets(self.attribution, len(self.chosen))
        shares = [len({*each.features} & {*self.chosen.features}) / max(1, size) for each in own]
        return sum(shares) / max(1, len(shares))


def find(work: Finding, prompts: ChoosingSplits) -> Found:
    """All steps up to F*. Raises ModelError: the model never refuses, or nothing in it moves the metric; says what to
    do."""
    with work.timed("clean answers"):
        clean = answer_clean(work, prompts)
    found = find_from(work, clean)
    if (share := found.attribution.share_without_signal) > 0:
        work.warn(
            f"{share:.0%} of the {len(found.attribution.rows)} selection prompts carry no attribution "
            "signal: ablating the direction does not change their metric"
        )
    if (size := len(found.chosen)) < work.config.k:
        work.warn(f"the pool holds {size} features, so F* has that size instead of {work.config.k}; raise --k0")
    with work.timed("check of the SAEs"):
        warn_of_dictionaries(work, found)
    return found


POOR: Final = 0.3
"""A fraction of variance unexplained above which a region is called poorly reconstructed."""
_CHECKED: Final = 8
"""Prompts of each class that the short check reads: hundreds of tokens, for a share of their variance."""


def warn_of_dictionaries(work: Finding, found: Found) -> None:
    """Warn where an SAE of F*'s layers reconstructs the user's words or the template's tokens poorly: there its
    features tell a part of what the layer says. `demur dictionaries` measures the rest."""
    used = found.clean.used("selection")
    prompts = (*used.harmful.prompts[:_CHECKED], *used.harmless.prompts[:_CHECKED])
    told: list[str] = []
    for layer in found.chosen.by_layer():
        depends = {"layer": layer, "prompts": [(prompt.id, prompt.text) for prompt in prompts]}
        compute = partial(_unexplained, work, layer, prompts)
        words, template = work.cached("fvu", depends, tuple[float, float], compute)
        told += [
            f"{where} at layer {layer} (FVU {fvu:.2f})"
            for where, fvu in (("the user's words", words), ("template tokens", template))
            if fvu > POOR
        ]
    if told:
        cost = "" if work.suite.reads else "; `demur dictionaries` says what that costs"
        work.warn(f"the {work.suite.noun} reconstruct poorly: {', '.join(told)}{cost}")


def _unexplained(work: Finding, layer: int, prompts: Sequence[Prompt]) -> tuple[float, float]:
    sums = reconstruction(work.model, work.suite[layer].dense(), work.model.tokenize(prompts), SCORED_REGIONS)
    error, spread = sums.error.sum(0), sums.spread.sum(0)
    words, template = (float(e / s) if s > 0 else 0.0 for e, s in zip(error, spread, strict=True))
    return words, template


def find_from(work: Finding, clean: CleanAnswers) -> Found:
    """The steps from the clean answers to F*."""
    with work.timed("direction"):
        direction = choose_direction(work, clean)
    with work.timed("pool"):
        pool = make_pool(work, clean, direction)
    with work.timed("attribution"):
        asked = Attributor(work, clean, direction)
        attribution = asked.pool(pool, work.config.estimator, clean.used("selection").harmful)
        chosen = selection.global_set(attribution, work.config.k)
    return Found(clean, direction, pool, attribution, chosen)


def answer_clean(work: Finding, prompts: ChoosingSplits) -> CleanAnswers:
    """The clean model's answers to all prompts that choose, and the first tokens of its refusals."""
    asked = {
        purpose: (
            partial(work.answer, f"clean: {purpose}, harmful", split.harmful),
            partial(work.answer, f"clean: {purpose}, harmless", split.harmless),
        )
        for purpose, split in prompts
    }
    found = iter(work.each(chain(*asked.values())))
    answers = {purpose: (next(found), next(found)) for purpose in asked}
    harmful, harmless = (JudgedAnswers.joined(parts) for parts in zip(*answers.values(), strict=True))
    _require_refusals(work, harmful, harmless)
    refusals, others = harmful.where(Outcome.REFUSAL), harmless.where(Outcome.COMPLIANCE, Outcome.INCOHERENT)
    tokens = find_refusal_tokens(work.model, [each.text for each in refusals], [each.text for each in others])
    found = CleanAnswers(answers, tokens)
    for purpose in ("direction", "selection"):
        used = found.used(purpose)
        if min(len(used.harmful), len(used.harmless)) < 2:
            raise ModelError(
                f"of the {purpose} prompts, {len(used.harmful)} harmful ones were refused and {len(used.harmless)} "
                "harmless ones were not; at least 2 of each are needed. Give more prompts, or clearer ones"
            )
    return found


def _require_refusals(work: Finding, harmful: JudgedAnswers, harmless: JudgedAnswers) -> None:
    rate, refused = harmful.refusal, harmful.refused.count(True)
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
    if (over := harmless.refusal).n and over.value > 0.2:
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
    trained, validated = (
        (work.model.tokenize(used.harmful), work.model.tokenize(used.harmless)) for used in (train, validation)
    )
    depends = {
        "model": work.identity,
        "train": [train.harmful.digest, train.harmless.digest],
        "search": [search.forms, search.layer, search.position, search.max_depth, search.kl_threshold],
    }
    means = work.run.cached("means", depends, ClassMeans, lambda: ClassMeans.of(work.model, trained, search))
    depends |= {
        "validation": [validation.harmful.digest, validation.harmless.digest],
        "refusal_ids": clean.refusal_ids,
    }

    def stored(names: Sequence[str], score: Scores) -> list[Candidate]:
        progress = partial(work.progress, "direction")
        return work.run.mapped("direction", depends, Candidate, names, score, key=candidate_name, progress=progress)

    direction = find_direction(work.model, means, validated, clean.refusal_ids, search, stored=stored)
    if direction.note:
        work.warn(f"direction: {direction.note}")
    return direction


def make_pool(work: Finding, clean: CleanAnswers, direction: Direction) -> Pool:
    """The features that are attributed one by one (`F0`)."""
    config, suite = work.config, work.suite
    best = ()
    if config.pool != "cosine":
        # Features are kept to be scaled down, so those that rise when refusal goes are not wanted.
        scored = Attributor(work, clean, direction).dictionary(clean.used("selection").harmful, falling=True)
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
            return selection.pool_of(suite, direction.vector, best)
        pool = selection.cosine_pool(suite, direction.vector, config.k0)
        if config.pool == "cosine":
            return pool
        return selection.pool_of(suite, direction.vector, tuple(dict.fromkeys((*pool.features, *best))))

    return work.cached("pool", depends, Pool, compute, "pool")


@dataclass(frozen=True)
class Attributor:
    """Attribution towards the run with the direction ablated. Every method is asked the same: one metric, on the same
    tokens, whose target token follows the rule of the study's own estimator."""

    work: Finding
    clean: CleanAnswers
    direction: Direction

    def _asked(self, method: Method, scoring: ScoredTokens = SCORED) -> tuple[AttributionSpec, dict[str, Any]]:
        """What is asked, as a value and as arguments."""
        config = self.work.config
        metric = Metric(self.clean.refusal_ids, allow_refusal_target=config.estimator == "paper")
        patch = Compiled(self.work.model, None, [self.direction.ablate()])
        spec = AttributionSpec.of(method, config.steps, metric, scoring, patch.id)
        asked = {"patch": patch, "metric": metric, "method": method, "steps": config.steps, "scoring": scoring}
        return spec, asked

    def dictionary(
        self, harmful: PromptSet, *, falling: bool = False, to_zero: bool = False, scoring: ScoredTokens = SCORED
    ) -> DictionaryAttribution:
        """Attribution over whole dictionaries (the AP baseline), the best of each prompt and over all of them: as many
        features as a pool or F* can ask for. The options are those of `attribute_dictionary`."""
        work, config, suite = self.work, self.work.config, self.work.suite
        top = max(config.k, config.k0 * len(suite.layers))
        spec, asked = self._asked(config.estimator, scoring)
        options = {"falling": falling, "to_zero": to_zero}
        depends = {"prompts": harmful.digest, "top": top, "spec": spec, "layers": suite.layers, **options}

        def compute() -> DictionaryAttribution:
            items, progress = work.model.tokenize(harmful), partial(work.progress, "attribution: all features")
            asks: dict[str, Any] = {**asked, **options, "top": top, "progress": progress}
            return selection.attribute_dictionary(work.model, suite, items, **asks)

        return work.cached("dictionary", depends, DictionaryAttribution, compute)

    def pool(self, pool: Pool, method: Method, harmful: PromptSet) -> Attribution:
        """Attribution of a pool on harmful prompts, resumed where it was left; `method` may be "exact"."""
        work, (spec, asked) = self.work, self._asked(method)

        def compute(take: Take) -> Iterator[Sequence[PromptAttribution]]:
            items = work.model.tokenize(harmful)
            for part in attribute_batches(work.model, work.suite, items, pool, take=take, **asked):
                yield part.rows

        depends = work.depends | {"prompts": harmful.digest, "pool": pool.features, "spec": spec}
        progress = partial(work.progress, f"attribution: {method}")
        rows = work.run.mapped("attribution", depends, PromptAttribution, harmful.ids, compute, progress=progress)
        return Attribution(pool_features(pool), spec, tuple(rows))


def feature_rows(work: Finding, found: Found, exact: Attribution | None) -> tuple[FeatureRow, ...]:
    """The features of F*: their scores, and how often and how strongly they fire on the selection prompts."""
    used, features, suite = found.clean.used("selection"), found.chosen.features, work.suite

    def compute() -> Activity:
        harmful, harmless = work.model.tokenize(used.harmful), work.model.tokenize(used.harmless)
        often = feature_means(work.model, suite, harmful, features, ["rate", "max"])
        seldom = feature_means(work.model, suite, harmless, features, ["rate"])
        return Activity(
            features=features,
            rate_harmful=tuple(often["rate"].tolist()),
            rate_harmless=tuple(seldom["rate"].tolist()),
            max_harmful=tuple(often["max"].tolist()),
        )

    depends = {"prompts": [used.harmful.digest, used.harmless.digest], "features": features}
    activity = work.cached("activity", depends, Activity, compute, "activations")
    return tuple(
        FeatureRow(
            feature=feature,
            score=found.chosen.scores[n],
            cosine=found.pool.cosine(feature),
            exact=None if exact is None else float(exact.means.mean(0)[exact.features.index(feature)]),
            rate_harmful=activity.rate_harmful[n],
            rate_harmless=activity.rate_harmless[n],
            max_harmful=activity.max_harmful[n],
        )
        for n, feature in enumerate(features)
    )


def direction_info(work: Finding, found: Found) -> DirectionInfo:
    """The chosen direction, its token and all candidates."""
    direction = found.direction
    place = (direction.layer, direction.position, direction.form)
    last = work.model.tokenize([found.clean.answers["direction"][0].answers[0].prompt])[0]
    return DirectionInfo(
        chosen=next(row for row in direction.candidates if (row.layer, row.position, row.form) == place),
        token=str(work.model.tokenizer.decode([last.ids[direction.position]])),
        norm=float(direction.difference.norm()),
        candidates=direction.candidates,
        note=direction.note,
    )


def compare_estimators(
    work: Finding, found: Found, refused: PromptSet
) -> tuple[tuple[EstimatorRow, ...], Attribution | None]:
    """Every estimator against exact patching on `refused`: harmful prompts that chose nothing."""
    if len(refused) == 0:
        if work.config.n_exact:
            work.warn("the model refuses no harmful test prompt, so nothing could be patched exactly")
        return (), None

    asked = Attributor(work, found.clean, found.direction)
    methods: tuple[Method, ...] = ("exact", *ESTIMATORS)
    exact, *estimates = work.each(partial(asked.pool, found.pool, method, refused) for method in methods)
    return tuple(_estimator_row(each, exact, used=each.method == work.config.estimator) for each in estimates), exact


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
