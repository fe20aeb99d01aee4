"""The smallest set of features that does what F* does, with a certificate measured on test prompts.

After *Beyond I'm Sorry, I Can't* (arXiv 2509.09708): features are taken out of F* one by one. Effects are falls of the
refusal log-odds at the first answer token, in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from demur.errors import ModelError
from demur.stats import (
    Estimate,
    bootstrap_mean,
    bootstrap_of,
    clustered_rate,
    crossed_difference,
)
from demur.studies.base import Study
from demur.studies.config import FindConfig
from demur.studies.minimal.pairs import Pairs
from demur.studies.minimal.sections import (
    AWAKE,
    SILENT,
    Certificate,
    DormantRow,
    FeatureOfSet,
    Kind,
    Result,
    SizeRow,
    sections,
)
from demur.types import FeatureField, FeatureId, FeatureSet, PromptSet, Value

if TYPE_CHECKING:
    from demur.studies.context import Change, Context
    from demur.studies.pipeline import Found
    from demur.studies.roles import FeatureRole

_CANDIDATES = 50
"""Features whose removal would matter most under suppression, among which dormant ones are looked for."""


class Config(FindConfig):
    """The smallest part of F* that keeps its effect."""

    group = "Minimal set"

    factor: float = Field(default=0.0, lt=1)
    """Scale factor c under which features are suppressed; 0 removes them."""
    target: float = Field(default=0.9, gt=0, le=1)
    """Share of F*'s effect that the minimal set must keep: of the fall of refusal log-odds on selection prompts, and of
    the compliance on tuning prompts."""
    random_sets: int = Field(default=5, ge=2)
    """Sets drawn for each random control."""
    n_pairs: int = Field(default=16, ge=0)
    """Test prompts on which pairs of features are suppressed together; 0 leaves interactions out."""
    max_pairs: int = Field(default=200, ge=0)
    """Pairs of F* up to which every one is suppressed together; where there are more, a factorisation machine names
    the strongest, and only these and the pairs of the minimal set are."""
    fm_draws: int = Field(default=400, ge=0)
    """Random parts of F* that the factorisation machine is fitted to; 0 leaves it out."""
    fm_rank: int = Field(default=4, ge=1)
    """Factors of each feature in the factorisation machine."""
    dormant: int = Field(default=3, ge=0)
    """Dormant features at most that are tested for each layer of F*."""


class _Step(Value):
    removed: FeatureField | None
    left: tuple[FeatureField, ...]
    effect: float


@dataclass
class _Minimal:
    """The study, step by step."""

    context: Context[Any]
    found: Found

    @property
    def factor(self) -> float:
        return self.context.config.factor

    def scaled(self, features: Sequence[FeatureId]) -> Change:
        from demur.method.interventions import ScaleFeatures

        return (ScaleFeatures(tuple(features), self.factor),) if features else ()

    def measured(self, prompts: PromptSet, change: Change) -> np.ndarray:
        from demur.method.direction import first_token
        from demur.method.interventions import Compiled

        model, ids = self.context.model, self.found.clean.refusal_ids
        compiled = Compiled(model, self.context.suite, change)
        with model.in_float32():
            return first_token(model, model.tokenize(prompts), ids, compiled).log_odds.double().numpy()

    def odds(self, prompts: PromptSet, change: Change = ()) -> np.ndarray:
        """Refusal log-odds of each prompt under a change, nats; computed once per run folder."""
        depends = {
            **self.context.under(change),
            "prompts": prompts.digest,
            "refusal_ids": self.found.clean.refusal_ids,
        }
        kept = self.context.cached("odds", depends, tuple[float, ...], lambda: tuple(self.measured(prompts, change)))
        return np.array(kept)

    # -- greedy removal, on the prompts that choose --------------------------------------------------------------------

    def steps(self) -> list[_Step]:
        """Sets of falling size: each time the feature goes whose loss leaves the largest effect."""
        work, found = self.context, self.found
        prompts, features = found.clean.used("selection").harmful, found.chosen.features
        depends = {"prompts": prompts.digest, "features": features, "factor": self.factor}
        stage = work.run.stage("greedy", work.depends | depends | {"refusal_ids": found.clean.refusal_ids})
        clean = float(self.odds(prompts).mean())
        rows: list[_Step] = []

        def effect(left: Sequence[FeatureId]) -> float:
            return clean - float(self.measured(prompts, self.scaled(left)).mean())

        def add(step: _Step) -> None:
            stage.append("steps", step)
            rows.append(step)
            work.progress("greedy removal", len(rows), len(features))

        with work.run.alone(stage):
            rows += stage.rows("steps", _Step)
            if not rows:
                add(_Step(removed=None, left=features, effect=effect(features)))
            while len(left := rows[-1].left) > 1:
                rest = [tuple(f for f in left if f != gone) for gone in left]
                effects = list(map(effect, rest))
                # Of equals (to rounding) the least important by attribution goes: F* is ordered by that.
                best = max(range(len(left)), key=lambda n: (round(effects[n], 4), n))
                add(_Step(removed=left[best], left=rest[best], effect=effects[best]))
            if not stage.done:
                stage.finish()
        return rows

    def reduce(self) -> tuple[tuple[FeatureId, ...], list[tuple[_Step, Estimate]]]:
        """The minimal set, and the way down with the compliance under each set on the tuning prompts. Raises
        ModelError: suppressing F* does not lower refusal."""
        context, target, steps = self.context, self.context.config.target, self.steps()
        if (full := steps[0].effect) <= 0:
            raise ModelError(
                f"scaling F* by c = {self.factor:g} does not lower the refusal log-odds ({-full:+.2f} nats), so there "
                "is no effect to reduce to fewer features; give a lower --factor, such as -1"
            )
        judged = context.each(partial(self._complied, step.left) for step in steps)
        if not judged[0].value > 0:
            context.warn(
                f"with F* scaled by c = {self.factor:g} no tuning prompt is complied with, so the minimal set was "
                "chosen by the refusal log-odds alone; give a lower --factor"
            )
        floor = target * judged[0].value if judged[0].value > 0 else 0.0
        way = list(zip(steps, judged, strict=True))
        enough = [s.left for s, rate in way if s.effect >= target * full and not rate.value < floor]
        return self._tightened(min(enough, key=len), target * full, floor), way

    def _complied(self, features: Sequence[FeatureId]) -> Estimate:
        tuning = self.context.splits.choosing.tuning.harmful
        return self.context.answer(f"tuning: {len(features)} features", tuning, self.scaled(features)).compliance

    def _tightened(self, chosen: tuple[FeatureId, ...], effect: float, compliance: float) -> tuple[FeatureId, ...]:
        """The set without any feature that can still go: the way down followed the log-odds alone."""
        prompts = self.found.clean.used("selection").harmful
        clean = self.odds(prompts).mean()
        for gone in reversed(chosen if len(chosen) > 1 else ()):
            rest = tuple(f for f in chosen if f != gone)
            left = clean - self.odds(prompts, self.scaled(rest)).mean()
            if left >= effect and self._complied(rest).value >= compliance:
                return self._tightened(rest, effect, compliance)
        return chosen

    # -- the certificate, on test prompts ------------------------------------------------------------------------------

    def controls(self, chosen: tuple[FeatureId, ...]) -> dict[str, tuple[tuple[FeatureId, ...], ...]]:
        """Name → sets: F*, what the minimal set leaves of it, random parts of F* and matched random features."""
        from demur.studies.methods import RandomMatched, Selection

        context, found, config = self.context, self.found, self.context.config
        rest = tuple(f for f in found.chosen.features if f not in chosen)
        sets = {"minimal set": (chosen,), "F*": (found.chosen.features,)}
        if rest:
            random = np.random.default_rng(config.seed)
            drawn = [random.permutation(len(found.chosen))[: len(chosen)] for _ in range(config.random_sets)]
            parts = tuple(tuple(found.chosen.features[n] for n in sorted(each)) for each in drawn)
            sets |= {"the rest of F*": (rest,), "random parts of F*": parts}
        place = {feature: n for n, feature in enumerate(found.chosen.features)}
        like = FeatureSet(
            features=chosen,
            scores=tuple(found.chosen.scores[place[f]] for f in chosen),
            scope="global",
            method="minimal",
        )
        seeds = range(config.seed, config.seed + config.random_sets)
        used = found.clean.used("selection")

        def draw() -> tuple[FeatureSet, ...]:
            return RandomMatched().draw(Selection(context, replace(found, chosen=like), len(chosen)), seeds)

        depends = {
            "method": "matched",
            "features": chosen,
            "pool": found.pool.features,
            "seeds": [config.seed, config.random_sets],
            "prompts": [used.harmful.digest, used.harmless.digest],
        }
        matched = context.cached("feature_sets", depends, tuple[FeatureSet, ...], draw, "features: random")
        return sets | {"random features": tuple(each.features for each in matched)}

    def restored(self, prompts: PromptSet, features: Sequence[FeatureId]) -> Change:
        """The direction ablated, and the features put back to their values in the clean run, on the prompt's tokens."""
        from demur.method.activations import feature_activations
        from demur.method.interventions import HoldFeatures, PerPrompt

        items, model = self.context.model.tokenize(prompts), self.context.model
        values = feature_activations(model, self.context.suite, items, features)
        held = {
            item.prompt_id: (HoldFeatures(tuple(features), each),) for item, each in zip(items, values, strict=True)
        }
        return self.found.direction.ablate(), PerPrompt(held, "restore")

    def certify(self, chosen: tuple[FeatureId, ...], prompts: PromptSet) -> tuple[Certificate, ...]:
        """Necessity and sufficiency of the minimal set and of its controls."""
        sets, ablate = self.controls(chosen), (self.found.direction.ablate(),)
        suppressed = {name: [self.scaled(each) for each in drawn] for name, drawn in sets.items()}
        restored = {name: [self.restored(prompts, each) for each in drawn] for name, drawn in sets.items()}
        clean, ablated = self.odds(prompts), self.odds(prompts, ablate)
        least = self.odds(prompts, self.scaled(self.found.chosen.features))
        return (
            *self._rows("necessity", sets, suppressed, prompts, (clean, least)),
            *self._rows(
                "sufficiency", sets | {"nothing": ((),)}, restored | {"nothing": [ablate]}, prompts, (ablated, clean)
            ),
        )

    def _rows(
        self,
        test: Kind,
        sets: Mapping[str, Sequence[Sequence[FeatureId]]],
        changes: Mapping[str, Sequence[Change]],
        prompts: PromptSet,
        ends: tuple[np.ndarray, np.ndarray],
    ) -> Iterator[Certificate]:
        """One row a condition, the minimal set first; shares are of the way from the first to the second of `ends`."""
        own: Sequence[bool | None] = ()
        asked = [
            (f"{test}: {name}" + f" ({n})" * (len(several) > 1), change)
            for name, several in changes.items()
            for n, change in enumerate(several, start=1)
        ]
        odds = iter(self.context.each(partial(self.odds, prompts, change) for _, change in asked))
        told = iter(self.context.each(partial(self.context.answer, label, prompts, change) for label, change in asked))
        for name, several in changes.items():
            done = [next(odds) - ends[0] for _ in several]
            answers = [next(told) for _ in several]
            runs = [each.complied if test == "necessity" else each.refused for each in answers]
            difference, p = crossed_difference(own, runs) if own else (None, None)
            own = own or runs[0]
            whole = ends[1] - ends[0]
            yield Certificate(
                test=test,
                name=name,
                size=len(sets[name][0]),
                sets=len(several),
                share=_share(np.mean(done, axis=0), whole),
                rate=clustered_rate(runs),
                difference=difference,
                p=p,
                draws=tuple(float(each.mean() / whole.mean()) for each in done) if len(several) > 1 else (),
            )

    def feature(
        self, role: FeatureRole, chosen: tuple[FeatureId, ...], prompts: PromptSet, whole: np.ndarray
    ) -> FeatureOfSet:
        """What is left of the effect `whole` when one feature of the minimal set is not suppressed."""
        rest = self.scaled([f for f in chosen if f != role.feature])
        return FeatureOfSet(
            feature=role.feature,
            role=role.role,
            cosine=self.found.pool.cosine(role.feature),
            without=_share(self.odds(prompts) - self.odds(prompts, rest), whole),
            complied=self.context.answer(f"test: without {role.feature}", prompts, rest).compliance,
        )

    # -- redundancy ----------------------------------------------------------------------------------------------------

    def dormant(self, prompts: PromptSet) -> tuple[DormantRow, ...]:
        """Features in later layers that wake when F*'s features in one layer are suppressed, found on the selection
        prompts and measured on `prompts`."""
        rows: list[DormantRow] = []
        groups = self.found.chosen.by_layer()
        for n, (layer, indices) in enumerate(groups.items(), start=1):
            wakers = tuple(FeatureId(layer, index) for index in indices)
            waking = self._waking(wakers) if self.context.config.dormant else ()
            rows += [self._dormant_row(feature, wakers, prompts) for feature in waking]
            self.context.progress("dormant features", n, len(groups))
        return tuple(rows)

    def _waking(self, wakers: tuple[FeatureId, ...]) -> tuple[FeatureId, ...]:
        from demur.method.interventions import Compiled, bind
        from demur.method.path import Metric
        from demur.method.selection import attribute_dictionary

        work, found = self.context, self.found
        harmful = found.clean.used("selection").harmful

        def compute() -> tuple[FeatureField, ...]:
            items, metric = work.model.tokenize(harmful), Metric(found.clean.refusal_ids)
            patch = Compiled(work.model, None, [found.direction.ablate()])
            asked: dict[str, Any] = {"patch": patch, "metric": metric, "top": _CANDIDATES, "to_zero": True}
            try:
                with work.model.intervene(bind(work.suite, *self.scaled(wakers))):
                    best = attribute_dictionary(work.model, work.suite, items, **asked).overall
            except ModelError:  # Nothing is left that moves the answer.
                return ()
            later = [
                f
                for f, score in zip(best.features, best.scores, strict=True)
                if f.layer > wakers[0].layer and score > 0
            ]
            if not later:
                return ()
            clean, awake = self._fires(harmful, later), self._fires(harmful, later, self.scaled(wakers))
            rates = zip(later, clean.mean(0), awake.mean(0), strict=True)
            return tuple(f for f, before, after in rates if before <= SILENT and after >= AWAKE)[: work.config.dormant]

        depends = {"prompts": harmful.digest, "wakers": wakers, "factor": self.factor, "most": work.config.dormant}
        depends |= {"direction": found.direction.difference.tolist(), "refusal_ids": found.clean.refusal_ids}
        return work.cached("waking", depends, tuple[FeatureField, ...], compute)

    def _fires(self, prompts: PromptSet, features: Sequence[FeatureId], change: Change = ()) -> np.ndarray:
        """Whether each feature fires on a scored token of each prompt, shape (prompt, feature)."""
        from demur.method.activations import feature_activations, over_regions
        from demur.method.interventions import bind

        model, items = self.context.model, self.context.model.tokenize(prompts)
        with model.intervene(bind(self.context.suite, *change)):
            values = feature_activations(model, self.context.suite, items, features)
        return over_regions(items, values) > 0

    def _dormant_row(self, feature: FeatureId, wakers: tuple[FeatureId, ...], prompts: PromptSet) -> DormantRow:
        clean, under = self._fires(prompts, [feature]), self._fires(prompts, [feature], self.scaled(wakers))
        both = self.odds(prompts, self.scaled((*wakers, feature)))
        return DormantRow(
            feature=feature,
            layer=wakers[0].layer,
            wakers=wakers,
            clean=clustered_rate([clean[:, 0].tolist()]),
            awake=clustered_rate([under[:, 0].tolist()]),
            effect=bootstrap_mean(self.odds(prompts, self.scaled(wakers)) - both),
            alone=bootstrap_mean(self.odds(prompts) - self.odds(prompts, self.scaled([feature]))),
        )


def _share(part: np.ndarray, whole: np.ndarray) -> Estimate:
    """Ratio of means over the same prompts."""
    return bootstrap_of(lambda means: means[..., 0] / means[..., 1], np.stack([part, whole], 1))


def run(context: Context[Any]) -> Result:
    """Reduce F* and certify what is left."""
    from demur.studies import pipeline
    from demur.studies.roles import find_roles

    found = pipeline.find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    study = _Minimal(context, found)
    with context.timed("greedy removal"):
        chosen, way = study.reduce()
    clean = context.answer("clean: test, harmful", context.splits.test.harmful)
    refused = clean.only(*pipeline.REFUSALS)
    if len(refused) < 2:
        raise ModelError(
            f"the clean model refuses {len(refused)} of the {len(clean.answers)} harmful test prompts; the certificate "
            "needs at least 2. Give clearer test prompts, or more of them"
        )
    with context.timed("certificate"):
        certificate = study.certify(chosen, refused)
        odds = study.odds(refused)
        whole = odds - study.odds(refused, study.scaled(found.chosen.features))
        sizes = [
            SizeRow(
                size=len(step.left),
                removed=step.removed,
                selection=step.effect / way[0][0].effect,
                tuning=rate,
                chosen=step.left == chosen,
                test=_share(odds - study.odds(refused, study.scaled(step.left)), whole),
            )
            for step, rate in way
        ]
        features = tuple(
            study.feature(role, chosen, refused, whole) for role in find_roles(context, found, chosen).features
        )
    with context.timed("redundancy"):
        dormant = study.dormant(refused)
        dormant_features = [row.feature for row in dormant]
        tested = Pairs(context, found, study.measured, study.scaled)
        pairs, screening = tested.rows(chosen, dormant_features, refused.head(context.config.n_pairs))
    return Result(
        factor=context.config.factor,
        target=context.config.target,
        chosen=found.chosen.features,
        effect=bootstrap_mean(whole),
        of_direction=_share(whole, odds - study.odds(refused, (found.direction.ablate(),))),
        features=features,
        sizes=tuple(sizes),
        certificate=certificate,
        dormant=dormant,
        pairs=pairs[:20],
        pairs_tested=len(pairs),
        screening=screening,
    )


STUDY = Study("minimal", Config, Result, run, sections)
