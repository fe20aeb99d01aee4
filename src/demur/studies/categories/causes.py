"""What taking a feature out does to refusal, alone and once the refusal features are out: the causal side of its role.

A feature that fires where refusal is may do nothing (inert), one that does nothing may take over when others are
suppressed (redundant: "hydra" features, 2509.09708), or be read only then (conditional).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Literal

import numpy as np

from demur.stats import Estimate, bootstrap_mean, wilson
from demur.studies.context import Change
from demur.studies.pipeline import Finding, Found
from demur.studies.roles import FeatureRole, find_roles
from demur.types import FeatureField, FeatureId, PromptSet, Take, Value

NEGLIGIBLE = 0.01
"""Of what ablating the direction does to the refusal log-odds: an effect within this share of it counts as none."""

CausalRole = Literal["harm", "refusal", "mixed", "redundant", "conditional", "inert", "unclear"]


class Cause(Value):
    """A feature's role, with its evidence. Effects are falls of the refusal log-odds of the first answer token (nats,
    mean over the refused test prompts that it serves) when the feature is set to 0.

    - harm, refusal, mixed: taking it out alone lowers refusal, and it fires on the user's words, on the template's
      tokens after them, or on both (`fires`).
    - redundant: no effect alone; once the refusal features are out it wakes up, and taking it out lowers refusal.
    - conditional: the same, but it was awake before.
    - inert: neither effect. unclear: the intervals allow both, or taking it out raises refusal.
    """

    feature: FeatureField
    role: CausalRole
    fires: FeatureRole
    alone: Estimate
    after: Estimate | None
    """The effect once the refusal features are out; None for these, for features that act alone, and where there are no
    refusal features."""
    wakes: Estimate | None
    """Of the prompts on which it fires once the refusal features are out, the share on which it was silent before."""
    harmfulness: Estimate | None = None
    """Fall of the log-odds with which the model calls these requests harmful when asked (nats); None: not asked."""
    upstream: bool
    """Its layer is before that of every refusal feature (where there are none, of the direction)."""


class Causes(Value):
    """The roles of features, best first by their effect alone."""

    features: tuple[Cause, ...]
    refusal: tuple[FeatureField, ...]
    """The refusal features that were taken out together: they fire after the user's words, and act alone."""
    whole: float
    """What ablating the direction does to the refusal log-odds, nats, mean over prompts."""
    n: int
    """Test prompts."""

    def of(self, *roles: CausalRole) -> tuple[FeatureId, ...]:
        """Features with one of these roles."""
        return tuple(row.feature for row in self.features if row.role in roles)


Falls = dict[FeatureId, Estimate]


class _Effects(Value):
    """Of one feature on every prompt, nats."""

    feature: str
    falls: tuple[float, ...]


def without(features: Sequence[FeatureId]) -> Change:
    """Features set to 0 on every token."""
    from demur.method.interventions import ScaleFeatures

    return (ScaleFeatures(tuple(features), 0.0),) if features else ()


def effects(
    work: Finding, found: Found, prompts: PromptSet, features: Sequence[FeatureId], given: Sequence[FeatureId] = ()
) -> np.ndarray:
    """Fall of the refusal log-odds of the first answer token when each feature is set to 0, nats, shape (prompt,
    feature); `given` are set to 0 already. A feature that does not fire on a prompt has no effect there."""
    from demur.method.direction import Start, first_token
    from demur.method.interventions import Compiled

    ids, model, before = found.clean.refusal_ids, work.model, without(given)
    fires = _firing(work, prompts, features, before) > 0

    def compute(take: Take) -> Iterator[list[_Effects]]:
        items = model.tokenize(prompts)
        under = Compiled(model, work.suite, before)
        clean = first_token(model, items, ids, under).log_odds.numpy()
        order = sorted(range(len(features)), key=lambda column: features[column].layer)
        for layer, columns in groupby(order, lambda column: features[column].layer):
            start: Start | None = None
            for column in columns:
                if not take([str(features[column])]):
                    continue
                start = start or Start.of(model, items, layer, under)
                own, fall = np.flatnonzero(fires[:, column]), np.zeros(len(items))
                if len(own):
                    change = Compiled(model, work.suite, without((*given, features[column])))
                    some = [items[n] for n in own.tolist()]
                    fall[own] = clean[own] - first_token(model, some, ids, change, start=start).log_odds.numpy()
                yield [_Effects(feature=str(features[column]), falls=tuple(fall.tolist()))]

    depends = work.under(before) | {"prompts": prompts.digest, "refusal_ids": ids, "features": features}
    depends |= {"saes": work.suite.identity}
    label = "taking features out" + " after the refusal features" * bool(given)
    rows = work.run.mapped(
        "effects",
        depends,
        _Effects,
        list(map(str, features)),
        compute,
        key=_name,
        progress=partial(work.progress, label),
    )
    return np.array([row.falls for row in rows]).reshape(len(features), len(prompts)).T


def _name(row: _Effects) -> str:
    return row.feature


def _whole(work: Finding, found: Found, prompts: PromptSet) -> float:
    """Mean fall of the refusal log-odds when the direction is ablated, nats."""
    from demur.method.direction import first_token

    ablation, ids = found.direction.ablate(), found.clean.refusal_ids

    def compute() -> float:
        items = work.model.tokenize(prompts)
        clean, ablated = (first_token(work.model, items, ids, each).log_odds for each in ((), (ablation,)))
        return float((clean - ablated).mean())

    depends = work.under((ablation,)) | {"prompts": prompts.digest, "refusal_ids": ids}
    return work.run.cached("whole_effect", depends, float, compute)


def find_causes(
    work: Finding,
    found: Found,
    choosing: PromptSet,
    test: PromptSet,
    features: Sequence[FeatureId],
    *,
    serves: Mapping[FeatureId, Collection[str]] | None = None,
    wakers: int = 10,
) -> Causes:
    """The role of each feature, and of the `wakers` features over whole dictionaries that rise most when the refusal
    features are taken out. All prompts are harmful ones that are refused: those that choose say which the refusal
    features and the wakers are, effects are measured on `test`. A feature's effects are means over the prompts that it
    `serves` (their ids), if that says which."""
    served = {f: {p.digest: np.isin(p.ids, [*ids]) for p in (choosing, test)} for f, ids in (serves or {}).items()}

    def means(prompts: PromptSet, some: Sequence[FeatureId], given: Sequence[FeatureId] = ()) -> Falls:
        falls = effects(work, found, prompts, some, given).T
        masks = (served[f][prompts.digest] if f in served else slice(None) for f in some)
        return {f: bootstrap_mean(fall[mask]) for f, fall, mask in zip(some, falls, masks, strict=True)}

    fires = {row.feature: row for row in find_roles(work, found, features).features}
    chosen, least = means(choosing, features), NEGLIGIBLE * abs(_whole(work, found, choosing))
    refusal = tuple(f for f in features if fires[f].role == "refusal" and chosen[f].low > least)
    woken = tuple(f for f in _woken(work, choosing, refusal, wakers) if f not in fires) if refusal else ()
    fires |= {row.feature: row for row in find_roles(work, found, woken).features} if woken else {}
    whole = _whole(work, found, test)
    alone, limit = means(test, tuple(fires)), NEGLIGIBLE * abs(whole)
    rest = [f for f in alone if alone[f].low <= limit and f not in refusal] if refusal else []
    after, wakes = (means(test, rest, refusal), _wakes(work, test, refusal, rest)) if rest else ({}, {})
    layer = min(refusal).layer if refusal else found.direction.layer
    rows = [
        Cause(
            feature=f,
            role=causal_role(fires[f], alone[f], after.get(f), wakes.get(f), limit),
            fires=fires[f],
            alone=alone[f],
            after=after.get(f),
            wakes=wakes.get(f),
            upstream=f.layer < layer,
        )
        for f in alone
    ]
    rows.sort(key=lambda row: -row.alone.value)
    return Causes(features=tuple(rows), refusal=refusal, whole=whole, n=len(test))


def causal_role(
    fires: FeatureRole, alone: Estimate, after: Estimate | None, wakes: Estimate | None, limit: float
) -> CausalRole:
    """What a feature is by what taking it out does to the refusal log-odds, in nats: alone, after the refusal features
    are out, and by the share of prompts on which it wakes then; effects up to `limit` are none."""
    if alone.low > limit:
        return fires.role
    if max(abs(alone.low), abs(alone.high)) > limit:
        return "unclear"
    if after is None:
        return "inert"
    if after.low > limit:
        return "redundant" if wakes is not None and wakes.n and wakes.low > 0.5 else "conditional"
    return "inert" if max(abs(after.low), abs(after.high)) <= limit else "unclear"


def _wakes(work: Finding, prompts: PromptSet, refusal: Sequence[FeatureId], rest: Sequence[FeatureId]) -> Falls:
    """Of the prompts on which each feature fires once the refusal features are out, the share on which it was silent
    before."""
    silent = _firing(work, prompts, rest, ()) < _SCORED
    awake = _firing(work, prompts, rest, without(refusal)) == _SCORED
    counts = zip(rest, (silent & awake).sum(0), awake.sum(0), strict=True)
    return {f: Estimate.of(wilson(int(k), int(n))) for f, k, n in counts}


_SCORED = 2


def _firing(work: Finding, prompts: PromptSet, features: Sequence[FeatureId], change: Change) -> np.ndarray:
    """Whether each feature fires on a scored token of each prompt (2), on others only (1), or not at all (0), shape
    (prompt, feature)."""
    from demur.method.activations import feature_activations, over_regions
    from demur.method.interventions import bind
    from demur.model import SCORED_REGIONS, Region

    def compute() -> list[list[int]]:
        items = work.model.tokenize(prompts)
        with work.model.intervene(bind(work.suite, *change)):
            found = feature_activations(work.model, work.suite, items, features)
        anywhere, scored = (over_regions(items, found, regions) > 0 for regions in (tuple(Region), SCORED_REGIONS))
        return (anywhere.astype(int) + scored).tolist()

    depends = work.under(change) | {"prompts": prompts.digest, "features": features, "saes": work.suite.identity}
    return np.array(work.run.cached("firing", depends, list[list[int]], compute)).reshape(len(prompts), len(features))


def _woken(work: Finding, prompts: PromptSet, refusal: Sequence[FeatureId], count: int) -> tuple[FeatureId, ...]:
    """The features whose mean maximum activation, times the norm of their decoder row, rises most when the refusal
    features are taken out."""
    from demur.method.activations import mean_activations
    from demur.method.interventions import bind

    change, layers = without(refusal), [layer for layer in work.suite.layers if layer > min(refusal).layer]

    def compute() -> tuple[FeatureId, ...]:
        items, best = work.model.tokenize(prompts), list[tuple[float, FeatureId]]()
        before = mean_activations(work.model, work.suite, items, layers=layers, reduce="max")
        with work.model.intervene(bind(work.suite, *change)):
            after = mean_activations(work.model, work.suite, items, layers=layers, reduce="max")
        for layer in layers:
            rise = (after[layer] - before[layer]) * work.suite[layer].decoder_norms()
            values, places = rise.topk(min(count, len(rise)))
            best += [(v, FeatureId(layer, i)) for v, i in zip(values.tolist(), places.tolist(), strict=True) if v > 0]
        return tuple(feature for _, feature in sorted(best, key=lambda each: -each[0])[:count])

    depends = work.under(change) | {"prompts": prompts.digest, "count": count, "layers": layers}
    return work.cached("woken", depends, tuple[FeatureField, ...], compute, "features that wake up") if layers else ()
