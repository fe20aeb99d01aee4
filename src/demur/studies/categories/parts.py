"""The experiment behind `demur categories`: one set of features a category, its parts suppressed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from demur.errors import InputError
from demur.judges import CachedJudge, get_judge
from demur.method import selection
from demur.method.activations import TokenActivations, feature_activations
from demur.method.attribution import ScoredTokens
from demur.method.interventions import FeatureIntervention, HoldFeatures, PerPrompt, ScaleFeatures
from demur.model import SCORED_REGIONS, Region
from demur.stats import Estimate, bootstrap_mean, clustered_rate, crossed_difference, ratio_of
from demur.studies.categories import (
    ALL,
    NOT_REFUSED,
    OTHERS,
    CategoriesResult,
    CategorySet,
    Config,
    FeatureUse,
    Other,
    Part,
    PartRow,
    Split,
    Transfer,
    TransferTest,
)
from demur.studies.categories.causes import NEGLIGIBLE, CausalRole, Causes, effects, find_causes, without
from demur.studies.config import COMPLIANCE, SideEffectOptions
from demur.studies.context import Change, Context, JudgedAnswers
from demur.studies.methods import RandomMatched, Selection
from demur.studies.pipeline import Attributor, Found, find
from demur.studies.side_effects import SideEffectMeter
from demur.types import REFUSALS, FeatureId, FeatureSet, Prompt, PromptSet

Features = dict[str, tuple[FeatureId, ...]]
"""Category → features."""
Outcomes = dict[str, dict[str, bool | None]]
"""Measure → prompt id → the request got what it asks for; None: unscored."""


def kind_of(prompt: Prompt, level: int) -> str | None:
    """A prompt's category, of which the first `level` parts count (0: all)."""
    parts = (prompt.category or "").split(" / ")
    return " / ".join(parts[: level or None]).strip() or None


def kinds_of(prompts: Iterable[Prompt], level: int) -> dict[str, tuple[Prompt, ...]]:
    """Category → its prompts; categories in alphabetical order, prompts without one left out."""
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if kind := kind_of(prompt, level):
            found.setdefault(kind, []).append(prompt)
    return {kind: tuple(found[kind]) for kind in sorted(found)}


@dataclass(frozen=True)
class Kinds:
    """Categories with enough prompts: those that choose their features, and those of the test, all of them refused."""

    choosing: Mapping[str, tuple[Prompt, ...]]
    test: Mapping[str, tuple[Prompt, ...]]

    @classmethod
    def of(cls, context: Context[Any], choosing: Iterable[Prompt], test: Iterable[Prompt], what: str) -> Kinds:
        """The categories of two lists of prompts. Raises InputError: fewer than two have enough; says what to do."""
        config, least = context.config, context.config.min_prompts
        choosing, test = tuple(choosing), tuple(test)
        first, second = (kinds_of(each, config.category_level) for each in (choosing, test))
        enough = [k for k in first if len(first[k]) >= least and len(second.get(k, ())) >= least]
        if not first:
            raise InputError(
                "the harmful prompts name no category, and this study compares categories of harm. Give --harmful (and "
                "--test-harmful) a file with a column `category`, or a named set that has one, such as catqa"
            )
        if len(enough) < 2:
            counts = ", ".join(f"{k} {len(first[k])} + {len(second.get(k, ()))}" for k in first)
            raise InputError(
                f"of {len(first)} categories, {len(enough)} have {least} {what} prompts to choose features and as many "
                f"to test them, and at least 2 categories are needed. There are ({what}, choosing + test): {counts}. "
                "Give more prompts with --n, or change --category-level or --min-prompts"
            )
        if left := [k for k in first if k not in enough]:
            context.warn(f"categories left out, with fewer than {least} {what} prompts: {', '.join(left)}")
        return cls({k: first[k][: config.category_prompts] for k in enough}, {k: second[k] for k in enough})

    @property
    def chosen(self) -> PromptSet:
        return PromptSet(name="categories", prompts=tuple(p for each in self.choosing.values() for p in each))


class Parted(NamedTuple):
    """Every category's set in two parts of one size."""

    common: Features
    specific: Features


def _both(parted: Parted) -> tuple[tuple[Part, Features, Features], ...]:
    """Each part with the other."""
    return ("common", parted.common, parted.specific), ("specific", parted.specific, parted.common)


def split_sets(sets: Mapping[str, FeatureSet]) -> dict[Split, Parted]:
    """The sets in two parts, in two ways, each category's features in its own order of importance.

    `intersection` (the paper's): features in every set, and as many of the others. `graded`: the half of a set that
    serves most categories, and the half that serves fewest. A category without two parts is left out.
    """
    every = set.intersection(*({*each.features} for each in sets.values()))
    share = {f: sum(f in each.features for each in sets.values()) for s in sets.values() for f in s.features}
    found: dict[Split, Parted] = {"intersection": Parted({}, {}), "graded": Parted({}, {})}
    for name, each in sets.items():
        common = tuple(f for f in each.features if f in every)
        rest = tuple(f for f in each.features if f not in every)
        ranked = sorted(each.features, key=lambda f: -share[f])
        half = len(ranked) // 2
        halves = ({*ranked[:half]}, {*ranked[len(ranked) - half :]})
        shared, own = (tuple(f for f in each.features if f in part) for part in halves)
        for parts, (one, other) in ((found["intersection"], (common, rest)), (found["graded"], (shared, own))):
            if size := min(len(one), len(other)):
                parts.common[name], parts.specific[name] = one[:size], other[:size]
    return {split: parts for split, parts in found.items() if len(parts.common) > 1}


class Experiment:
    """The study, step by step; each step keeps what later ones need."""

    def __init__(self, context: Context[Any]) -> None:
        """Everything named is read before anything is computed: a mistake in it must not cost hours."""
        self.context = context
        self.config: Config = context.config
        splits = context.splits
        choosing = [p for _, split in splits.choosing for p in split.harmful]
        Kinds.of(context, choosing, splits.test.harmful, "harmful")
        names = dict.fromkeys(self.config.harm_judges)
        self.judges = {n: CachedJudge(context.run, get_judge(n), context.progress, keep=True) for n in names}
        for judging in (context.judging, *self.judges.values()):
            judging.reader.check()
        self.measures = (NOT_REFUSED, COMPLIANCE, *self.judges)

    def run(self) -> CategoriesResult:
        context = self.context
        self.found: Found = find(context, context.splits.choosing)
        clean = self.found.clean.answers
        context.watch_coherence([answer for each in clean["tuning"] for answer in each.answers])
        with context.timed("clean answers"):
            test = context.answer("clean: test, harmful", context.splits.test.harmful)
        refused = (p for harmful, _ in clean.values() for p in harmful.only(*REFUSALS))
        self.kinds = Kinds.of(context, refused, test.only(*REFUSALS), "refused")
        with context.timed("sets of the categories"):
            self.sets = self._choose()
            self.factor = self._strength()
        self.splits = split_sets(self.sets)
        if "intersection" not in self.splits:
            context.warn("no feature is common to all categories, or nothing is left beside: the split is graded only")
        with context.timed("parts"):
            everything = {kind: each.features for kind, each in self.sets.items()}
            self.whole = self._ask("all features", everything, {}, "free")
            parts = (*self._rows("all", "whole", "free", [self.whole]), *self._parts())
        with context.timed("transfer"):
            transfers, tests = self._transfer()
        with context.timed("roles"):
            causes = self._causes()
        for judging in self.judges.values():
            judging.reader.close()
        return CategoriesResult(
            k=self.config.k,
            factor=self.factor,
            candidates=len(self.features),
            measures=self.measures,
            categories=tuple(
                CategorySet(
                    category=kind,
                    n_choosing=len(self.kinds.choosing[kind]),
                    n_test=len(self.kinds.test[kind]),
                    features=self.sets[kind],
                    specific=self.splits.get("intersection", Parted({}, {})).specific.get(kind, ()),
                )
                for kind in self.sets
            ),
            common=tuple(f for f in self._union if all(f in each.features for each in self.sets.values())),
            uses=self._uses(causes),
            parts=parts,
            transfers=transfers,
            tests=tests,
            causes=causes,
        )

    # -- sets, from the prompts that choose ----------------------------------------------------------------------------

    def _choose(self) -> dict[str, FeatureSet]:
        """Each category's `k` best features, as far as they do at least 1 % of what the best one does."""
        prompts, place, sets = self.kinds.chosen, 0, dict[str, FeatureSet]()
        table = self._scores(prompts)
        for kind, own in self.kinds.choosing.items():
            rows = table[place : place + len(own)]
            place += len(own)
            rows = rows[~np.isnan(rows).any(1)]
            means = rows.mean(0) if len(rows) else np.zeros(len(self.features))
            order = [int(n) for n in np.argsort(-means, kind="stable") if means[n] > NEGLIGIBLE * means.max() > 0]
            if best := order[: self.config.k]:
                features, scores = (self.features[n] for n in best), (float(means[n]) for n in best)
                sets[kind] = selection.feature_set(features, scores, f"category: {kind}")
            else:
                self.context.warn(f"category left out, as no feature lowers its refusal: {kind}")
        if len(sets) < 2:
            raise InputError("fewer than 2 categories have features that lower refusal; give more prompts with --n")
        self.kinds = Kinds({k: self.kinds.choosing[k] for k in sets}, {k: self.kinds.test[k] for k in sets})
        return sets

    def _scores(self, prompts: PromptSet) -> np.ndarray:
        """What each candidate does to refusal of each prompt, shape (prompt, feature); nan: no signal."""
        asked, found = Attributor(self.context, self.found.clean, self.found.direction), self.found
        if self.config.candidates == "pool":
            attribution = asked.pool(found.pool, self.config.estimator, prompts)
            self.features = attribution.features
            return np.where(attribution.signal.numpy()[:, None], attribution.means.numpy(), np.nan)
        words, features = ScoredTokens(regions=(Region.INSTRUCTION,)), dict.fromkeys(found.pool.features)
        for kind, own in self.kinds.choosing.items():
            some = PromptSet(name=kind, prompts=own)
            best = asked.dictionary(some, to_zero=True, scoring=words).overall.head(self.config.k)
            features |= dict.fromkeys(best.features)
        self.features = tuple(sorted(features))
        return effects(self.context, found, prompts, self.features)

    def _strength(self) -> float:
        """The factor under which most tuning prompts, each without its own category's features, are complied with; of
        equals the mildest."""
        prompts, level = self.found.clean.answers["tuning"][0].only(*REFUSALS), self.config.category_level
        kept = PromptSet(name="tuning", prompts=tuple(p for p in prompts if kind_of(p, level) in self.sets))

        def rate(factor: float) -> float:
            own = {p.id: (ScaleFeatures(self.sets[str(kind_of(p, level))].features, factor),) for p in kept}
            return self.context.answer(f"tuning: c = {factor:g}", kept, (PerPrompt(own),)).compliance.value

        tried = self.config.suppress if len(kept) else ()
        rates = dict(zip(tried, self.context.each(partial(rate, factor) for factor in tried), strict=True))
        known = [factor for factor in rates if not np.isnan(rates[factor])]
        if not known:
            self.context.warn("no tuning answer could be scored: the first of --suppress is taken, not chosen")
        return max(known or self.config.suppress[:1], key=lambda c: (rates.get(c, 0.0), -abs(c - 1)))

    # -- parts, on the test prompts ------------------------------------------------------------------------------------

    @cached_property
    def _union(self) -> tuple[FeatureId, ...]:
        """The features of all sets, those that serve most categories first, then by their highest score."""
        best: dict[FeatureId, tuple[int, float]] = {}
        for each in self.sets.values():
            for feature, score in zip(each.features, each.scores, strict=True):
                n, highest = best.get(feature, (0, 0.0))
                best[feature] = n + 1, max(highest, score)
        return tuple(sorted(best, key=lambda f: (-best[f][0], -best[f][1])))

    @cached_property
    def _own_values(self) -> TokenActivations:
        """What every feature of the sets does on the test prompts, in the clean model."""
        prompts = self._prompts(self.sets)

        def compute() -> TokenActivations:
            items, work = self.context.model.tokenize(prompts), self.context
            values = feature_activations(work.model, work.suite, items, self._union)
            return TokenActivations(self._union, dict(zip(prompts.ids, values, strict=True)))

        depends = {"prompts": prompts.digest, "features": self._union}
        return self.context.cached("own_values", depends, TokenActivations, compute, "values to hold")

    def _prompts(self, kinds: Iterable[str]) -> PromptSet:
        return PromptSet(name="test", prompts=tuple(p for kind in kinds for p in self.kinds.test[kind]))

    def _held(self, prompt: Prompt, features: Sequence[FeatureId], other: Other) -> tuple[FeatureIntervention, ...]:
        """Features held at their own values on the prompt, and after it released, or at their mean over the prompt."""
        if other == "free" or not features:
            return ()
        values = self._own_values.of(prompt.id, features)
        (item,) = self.context.model.tokenize([prompt])
        scored = [n for n, region in enumerate(item.regions) if region in SCORED_REGIONS]
        return (HoldFeatures(tuple(features), values, values[scored].mean(0) if other == "held on" else None),)

    def _ask(self, label: str, out: Features, held: Features, other: Other) -> Outcomes:
        """Answers to the test prompts of the categories in `out`, each under its own change."""
        prompts, own = self._prompts(out), dict[str, tuple[FeatureIntervention, ...]]()
        for kind in out:
            kept = [f for f in held.get(kind, ()) if f not in out[kind]]
            for prompt in self.kinds.test[kind]:
                own[prompt.id] = (ScaleFeatures(out[kind], self.factor), *self._held(prompt, kept, other))
        change: Change = (PerPrompt(own, "category"),)
        answers = self.context.answer(f"test: {label}, {other}", prompts, change)
        return {name: dict(zip(prompts.ids, self._success(answers, name), strict=True)) for name in self.measures}

    def _success(self, answers: JudgedAnswers, measure: str) -> Sequence[bool | None]:
        if measure == NOT_REFUSED:
            return [None if refused is None else not refused for refused in answers.refused]
        if measure == COMPLIANCE:
            return answers.complied
        return [verdict.success for verdict in self.judges[measure].judge(answers.answers).verdicts]

    def _parts(self) -> Iterable[PartRow]:
        """Each part suppressed, the other left free, held on the prompt, or held on after it; and random features in
        place of the part that is suppressed."""
        for split, parted in self.splits.items():
            for part, out, rest in _both(parted):
                for other in OTHERS:
                    runs = [self._ask(f"{part} ({split})", out, rest, other)]
                    self.kept[split, part, other] = runs[0]
                    yield from self._rows(split, part, other, runs, out)
            if split == next(iter(self.splits)):
                draws = self._random(split, parted)
                for part, _, rest in _both(parted):
                    asked = (partial(self._ask, f"random for {part} ({n})", x, rest, "held") for n, x in draws[part])
                    runs = self.context.each(asked)
                    yield from self._rows(split, part, "held", runs, parted.common, control=True)

    @cached_property
    def kept(self) -> dict[tuple[Split, Part, Other], Outcomes]:
        """Outcomes under each part, for the transfer."""
        return {}

    def _random(self, split: Split, parted: Parted) -> dict[Part, list[tuple[int, Features]]]:
        """Random features for each category's part, matched one by one in layer, firing rate and size of what they
        move, none of them a candidate."""
        work, seeds = self.context, range(self.config.seed, self.config.seed + self.config.random_sets)
        asked: list[tuple[Part, int, str]]
        asked = [(part, seed, kind) for part, _, _ in _both(parted) for seed in seeds for kind in parted.common]
        like: dict[tuple[Part, str], tuple[FeatureId, ...]]
        like = {(part, kind): features for part, out, _ in _both(parted) for kind, features in out.items()}

        def compute() -> list[FeatureSet]:
            layers = sorted({layer for features in like.values() for layer, _ in features})
            matched = RandomMatched.measures(Selection(work, self.found, self.config.k), layers)
            sets = (selection.feature_set(like[p, k], [0.0] * len(like[p, k]), "part") for p, _, k in asked)
            exclude = tuple(self.features)
            return [
                selection.random_set(each, matched, exclude=exclude, seed=seed)
                for each, (_, seed, _) in zip(sets, asked, strict=True)
            ]

        used = self.found.clean.used("selection")
        depends: dict[str, Any] = {"like": [like[p, k] for p, _, k in asked], "exclude": self.features}
        depends |= {"seeds": list(seeds), "prompts": [used.harmful.digest, used.harmless.digest], "split": split}
        drawn = work.cached("random_parts", depends, list[FeatureSet], compute, "random features")
        found: dict[Part, list[tuple[int, Features]]] = {"common": [], "specific": []}
        for (part, seed, kind), each in zip(asked, drawn, strict=True):
            if not found[part] or found[part][-1][0] != seed:
                found[part].append((seed, {}))
            found[part][-1][1][kind] = each.features
        return found

    def _rows(
        self,
        split: Split,
        part: Part,
        other: Other,
        runs: Sequence[Outcomes],
        out: Features | None = None,
        *,
        control: bool = False,
    ) -> Iterable[PartRow]:
        """One row a measure for all categories together, and one for each."""
        kinds = tuple(self.sets if out is None else out)
        sizes = [len(self.sets[k].features if out is None else out[k]) for k in kinds]
        for measure in self.measures:
            for name in (ALL, *kinds):
                ids = self._prompts(kinds if name == ALL else (name,)).ids
                success, normalised = self._rates(measure, ids, runs)
                yield PartRow(
                    split=split,
                    part=part,
                    other=other,
                    control=control,
                    sets=len(runs),
                    category=name,
                    measure=measure,
                    size=float(np.mean(sizes)) if name == ALL else sizes[kinds.index(name)],
                    success=success,
                    normalised=normalised,
                )

    def _rates(self, measure: str, ids: Sequence[str], runs: Sequence[Outcomes]) -> tuple[Estimate, Estimate]:
        """Requests that got what they ask for, and that share divided by the one with the whole sets suppressed."""
        success = clustered_rate([[run[measure][each] for each in ids] for run in runs])
        return success, ratio_of(success, clustered_rate([[self.whole[measure][each] for each in ids]]))

    # -- transfer ------------------------------------------------------------------------------------------------------

    def _transfer(self) -> tuple[tuple[Transfer, ...], tuple[TransferTest, ...]]:
        """Every category's specific features, suppressed on every category's prompts."""
        if not self.splits:
            return (), ()
        split, parted = next(iter(self.splits.items()))
        kinds, rows, tests = tuple(parted.specific), list[Transfer](), list[TransferTest]()
        for other in ("free", "held"):
            own, by_source = self.kept[split, "specific", other], dict[str, Outcomes]()
            outs = {source: {kind: parted.specific[source] for kind in kinds if kind != source} for source in kinds}
            asked = (partial(self._ask, f"specific to {s}", out, parted.common, other) for s, out in outs.items())
            for source, made in zip(kinds, self.context.each(asked), strict=True):
                by_source[source] = {measure: own[measure] | made[measure] for measure in self.measures}
            for measure in self.measures:
                for source in kinds:
                    for target in kinds:
                        ids = self._prompts((target,)).ids
                        success, normalised = self._rates(measure, ids, [by_source[source]])
                        shared = {*parted.specific[source]} & {*parted.specific[target]}
                        rows.append(
                            Transfer(
                                source=source,
                                target=target,
                                other=other,
                                measure=measure,
                                shared=len(shared),
                                success=success,
                                normalised=normalised,
                            )
                        )
                tests.append(self._own_or_others(kinds, by_source, other, measure))
        return tuple(rows), tuple(tests)

    def _own_or_others(
        self, kinds: Sequence[str], by_source: Mapping[str, Outcomes], other: Other, measure: str
    ) -> TransferTest:
        """A category's own specific features against those of the others, on the same prompts."""
        prompts = [(n, p.id) for n, kind in enumerate(kinds) for p in self.kinds.test[kind]]

        def sources(turn: int) -> list[bool | None]:
            return [by_source[kinds[(n + turn) % len(kinds)]][measure][each] for n, each in prompts]

        own, others = sources(0), [sources(turn) for turn in range(1, len(kinds))]
        difference, p = crossed_difference(own, others)
        rates: list[Estimate] = [clustered_rate([own]), clustered_rate(others)]
        return TransferTest(other=other, measure=measure, own=rates[0], others=rates[1], difference=difference, p=p)

    # -- features ------------------------------------------------------------------------------------------------------

    def _causes(self) -> Causes:
        """Roles of the candidates; of those that act also what they do to judged harmfulness."""
        work, prompts = self.context, self._prompts(self.sets)
        own = {kind: [p.id for p in (*self.kinds.choosing[kind], *self.kinds.test[kind])] for kind in self.sets}
        serves = {f: [i for k, e in self.sets.items() if f in e.features for i in own[k]] for f in self._union}
        causes = find_causes(work, self.found, self.kinds.chosen, prompts, self.features, serves=serves)
        harmful, harmless = self.found.clean.answers["tuning"]
        meter = SideEffectMeter(work, SideEffectOptions(), harmless)
        known = meter.knowledge(harmful.only(*REFUSALS), self.found.clean.used("tuning").harmless, ())
        if known is None or not known.auroc.low > 0.5:
            why = "yes and no begin alike" if known is None else f"its AUROC is {known.auroc.value:.2f}"
            work.warn(f"the model cannot say which requests are harmful ({why}): judged harmfulness is left out")
            return causes
        before = np.array(meter.says_harmful(prompts, ()))
        asked = [row.feature for row in causes.features if row.role in ("harm", "refusal", "mixed")]
        after = work.each((partial(meter.says_harmful, prompts, without([f])) for f in asked), "judged harmfulness")
        falls = {f: bootstrap_mean(before - np.array(odds)) for f, odds in zip(asked, after, strict=True)}
        rows = (row.model_copy(update={"harmfulness": falls.get(row.feature)}) for row in causes.features)
        return causes.model_copy(update={"features": tuple(rows)})

    def _uses(self, causes: Causes) -> tuple[FeatureUse, ...]:
        roles: dict[FeatureId, CausalRole] = {row.feature: row.role for row in causes.features}
        place = {kind: dict(zip(each.features, each.scores, strict=True)) for kind, each in self.sets.items()}
        return tuple(
            FeatureUse(
                feature=feature,
                role=roles[feature],
                scores={kind: scores[feature] for kind, scores in place.items() if feature in scores},
                share=sum(feature in scores for scores in place.values()) / len(place),
            )
            for feature in self._union
        )
