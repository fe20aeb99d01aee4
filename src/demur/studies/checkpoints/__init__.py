"""What training did to refusal between two checkpoints of a model: a new mechanism, the same one amplified, hidden.

The same prompts, tokens and search in both; the features found in each are scaled in both. The rule that calls the
change by a name is in `rule`, what it looks at is measured in `measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from demur.errors import ModelError
from demur.stats import Estimate, bootstrap_of, clustered_rate, crossed_difference, holm, mcnemar, paired_difference
from demur.studies.base import Study, StudyResult
from demur.studies.checkpoints.rule import Evidence, Mechanism, Verdict, decide
from demur.studies.config import FindConfig, OverRefusalOptions, Sources
from demur.types import FeatureField, PromptSet, Value

if TYPE_CHECKING:
    from demur.studies.checkpoints.measure import Pair, Side
    from demur.studies.context import Change, Context
    from demur.studies.drive import Features

When = Literal["after", "before"]
Kind = Literal["suppress", "induce"]
_ANSWERED = 5
"""Random sets under which answers are written."""
_FIT_PROMPTS = 8
"""Harmful test prompts on which the SAEs' fit is measured: hundreds of tokens."""
Status = Literal["kept", "moved", "gained", "lost"]


class Config(FindConfig, OverRefusalOptions):
    """The checkpoints that MODEL is compared with, and how."""

    group: ClassVar[str] = "Checkpoints"

    before: Sources = ()
    """Earlier checkpoint of MODEL, a folder, hub id or ID@REVISION; repeatable, each is compared with MODEL (the
    bundled model: the one before its safety training)."""
    before_saes: str | None = None
    """SAEs of the earlier checkpoints, folder or hub id (default: those of MODEL)."""
    factor: float = Field(default=0.0, lt=1)
    """Scale factor c under which features are scaled in both checkpoints; 0 removes them."""
    margin: float = Field(default=0.1, gt=0, lt=0.5)
    """What counts as nothing: the share of a drive below which features no longer drive, and the change of a drive or
    of a share of prompts within which two checkpoints are alike."""
    random_sets: int = Field(default=10, ge=2)
    """Random sets matched to each set of features; answers are written under the first five."""
    n_answers: int = Field(default=50, ge=0)
    """Test prompts of each class that are answered under every change; 0 leaves that out."""
    n_alone: int = Field(default=32, ge=2)
    """Harmful test prompts on which each feature is taken out alone."""

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if self.model is not None and not self.before:
            raise ValueError("no checkpoint to compare the model with; name one with --before")
        return self


class BehaviourRow(Value):
    """Share of prompts refused, and its change with McNemar's test on the same prompts (Holm over kinds of prompts)."""

    prompts: str
    after: Estimate
    before: Estimate
    difference: Estimate
    p: float
    p_holm: float


class AnswerRow(Value):
    """Prompts of `checkpoint` refused with the refusal features found `found` scaled (harmful prompts) or set to their
    mean maximum on harmful prompts (harmless ones), and with random sets treated alike; `difference` is the one less
    the other."""

    found: When
    checkpoint: When
    kind: Kind
    clean: Estimate
    changed: Estimate
    random: Estimate
    difference: Estimate
    p: float


class CosineRow(Value):
    """Cosine of the checkpoints' differences in means at one layer. `halves`: of two halves of the prompts in one
    checkpoint, mean of both."""

    layer: int
    cosine: Estimate
    halves: float


class ShiftRow(Value):
    """A feature of either F*. `status`: in both, in one with a near twin in the other (`partner`), in the later only,
    in the earlier only. `active`: mean maximum activation on harmful prompts; `alone`: fall of the refusal log-odds
    when it alone is taken out, nats."""

    feature: FeatureField
    status: Status
    refusal: bool
    partner: FeatureField | None = None
    cosine: float | None = None
    active_after: float
    active_before: float
    alone_after: Estimate
    alone_before: Estimate


class KnowingRow(Value):
    """Mean P(harmful) by each checkpoint's own probe and mean P(refuse) at the answer's first token, their changes, and
    the share of prompts recognised as harmful (P above one half) and not refused."""

    prompts: str
    harmful_after: Estimate
    harmful_before: Estimate
    harmful_change: Estimate
    refuse_after: Estimate
    refuse_before: Estimate
    refuse_change: Estimate
    ignored_after: Estimate
    ignored_before: Estimate


class PointRow(Value):
    """One prompt in one checkpoint."""

    checkpoint: When
    prompts: str
    harmful: float
    refuse: float


class FitRow(Value):
    """Variance unexplained by the SAEs of one layer in each checkpoint, over scored tokens of harmful prompts."""

    layer: int
    after: float
    before: float


class PairRows(Value):
    """MODEL beside one earlier checkpoint."""

    before: str
    verdict: Verdict
    mechanisms: dict[When, Mechanism]
    """Refusal features of the F* found in each."""
    stars: dict[When, Mechanism]
    """The whole F*, its harm features too."""
    behaviour: tuple[BehaviourRow, ...]
    answers: tuple[AnswerRow, ...]
    cosines: tuple[CosineRow, ...]
    features: tuple[ShiftRow, ...]
    knowing: tuple[KnowingRow, ...]
    points: tuple[PointRow, ...]
    fit: tuple[FitRow, ...]


class Result(StudyResult):
    """One comparison for each earlier checkpoint."""

    factor: float
    margin: float
    pairs: tuple[PairRows, ...]


def run(context: Context[Any]) -> Result:
    """Search each checkpoint, and hold what is found in each against the other."""
    from demur.studies.checkpoints.measure import Side
    from demur.studies.side_effects import over_refusal_prompts

    over = over_refusal_prompts(context.config, context)
    sides = [Side.of("MODEL", context, context)]
    for name, inputs in context.inputs.before.items():
        sides.append(Side.of(name, context.on(inputs), context))
    after, *others = sides
    if all(side.found is None for side in sides):
        raise ModelError(
            "none of the checkpoints refuses, so there is no refusal to compare; give --before or MODEL a checkpoint "
            "that refuses harmful prompts"
        )
    pairs = tuple(_compared(context, after, before, over) for before in others if before.found or after.found)
    for side in others:
        for warning in side.work.warnings:
            context.warn(f"{side.name}: {warning}")
    config = context.config
    return Result(factor=config.factor, margin=config.margin, pairs=pairs)


def _compared(context: Context[Config], after: Side, before: Side, over: PromptSet | None) -> PairRows:
    from demur.studies.checkpoints.measure import Pair, direction_cosines

    config, test = context.config, context.splits.test
    pair = Pair(after, before, test)
    tests = {"harmful": test.harmful, "harmless": test.harmless} | ({} if over is None else {"over-refusal": over})
    with context.timed("behaviour"):
        behaviour = _behaviour(pair, tests)
    mechanisms: dict[When, Mechanism] = {}
    stars: dict[When, Mechanism] = {}
    with context.timed("features in each other's checkpoint"):
        for when, side in _sides(pair):
            if side.found is not None:
                mechanisms[when] = pair.mechanism(side, side.refusal_features, config.factor)
                whole = side.found.chosen.features
                same = set(whole) == set(side.refusal_features)
                stars[when] = mechanisms[when] if same else pair.mechanism(side, whole, config.factor)
        answers = tuple(row for when, side in _sides(pair) for row in _answers(pair, when, side))
    with context.timed("directions"):
        split = context.splits.direction
        found = direction_cosines(pair, split.harmful, split.harmless)
    with context.timed("features one by one"):
        features = _shifts(pair, config.n_alone)
    with context.timed("P(harmful) and P(refuse)"):
        knowing, points = _knowing(context, pair, tests)
    refusals = [(row.prompts, row.difference) for row in behaviour]
    verdict = decide(Evidence(mechanisms.get("after"), mechanisms.get("before"), refusals), config.margin)
    return PairRows(
        before=before.name,
        verdict=verdict,
        mechanisms=mechanisms,
        stars=stars,
        behaviour=behaviour,
        answers=answers,
        cosines=tuple(CosineRow(layer=n, cosine=cosine, halves=halves) for n, (cosine, halves) in enumerate(found)),
        features=features,
        knowing=knowing,
        points=points,
        fit=_fit(pair),
    )


def _sides(pair: Pair) -> tuple[tuple[When, Side], ...]:
    return ("after", pair.after), ("before", pair.before)


def _behaviour(pair: Pair, tests: dict[str, PromptSet]) -> tuple[BehaviourRow, ...]:
    answered = {
        name: [side.work.answer(f"clean: test, {name}, {when}", prompts) for when, side in _sides(pair)]
        for name, prompts in tests.items()
    }
    tested = [mcnemar(a.refused, b.refused).p for a, b in answered.values()]
    return tuple(
        BehaviourRow(
            prompts=name,
            after=a.refusal,
            before=b.refusal,
            difference=paired_difference(a.refused, b.refused),
            p=p,
            p_holm=adjusted,
        )
        for (name, (a, b)), p, adjusted in zip(answered.items(), tested, holm(tested), strict=True)
    )


def _answers(pair: Pair, when: When, side: Side) -> Iterator[AnswerRow]:
    from demur.method.interventions import ScaleFeatures
    from demur.studies.drive import set_to_maxima

    config, own = pair.after.work.config, side.refusal_features
    if side.found is None or not config.n_answers:
        return
    harmful, harmless = (prompts.head(config.n_answers) for _, prompts in pair.prompts)
    kinds: tuple[tuple[Kind, PromptSet, Callable[[Features], Change]], ...] = (
        ("suppress", harmful, lambda features: (ScaleFeatures(features, config.factor),)),
        ("induce", harmless, partial(set_to_maxima, side.work, side.found)),
    )
    for (place, other), (kind, prompts, change) in product(_sides(pair), kinds):
        work, label = side.read_in(other), f"{kind}: found {when}, in {place}"
        clean = work.answer(f"clean: test, {place}", prompts)
        changed = work.answer(label, prompts, change(own))
        random = [work.answer(f"{label}, random", prompts, change(each)) for each in side.random_sets(own)[:_ANSWERED]]
        difference, p = crossed_difference(changed.refused, [each.refused for each in random])
        yield AnswerRow(
            found=when,
            checkpoint=place,
            kind=kind,
            clean=clean.refusal,
            changed=changed.refusal,
            random=clustered_rate([each.refused for each in random]),
            difference=difference,
            p=p,
        )


def _shifts(pair: Pair, n_alone: int) -> tuple[ShiftRow, ...]:
    """Every feature of either F*, by what became of it; the later checkpoint's first, best first."""
    from demur.studies.checkpoints.measure import activations, alone

    stars = {when: () if side.found is None else side.found.chosen.features for when, side in _sides(pair)}
    one_suite = pair.after.work.suite.identity == pair.before.work.suite.identity
    both = set(stars["after"]) & set(stars["before"]) if one_suite else set[Any]()
    moved, rows = _moved(pair, [tuple(f for f in star if f not in both) for star in stars.values()]), list[ShiftRow]()
    for when, side in _sides(pair):
        wanted = tuple(f for f in stars[when] if when == "after" or f not in both)
        if not wanted:
            continue
        works = [side.read_in(other) for _, other in _sides(pair)]
        active = [activations(work, pair.prompts.harmful, wanted).mean(0) for work in works]
        taken = [alone(pair, work, wanted, pair.prompts.harmful.head(n_alone)) for work in works]
        for n, feature in enumerate(wanted):
            twin = moved[when].get(feature)
            status: Status = "kept" if feature in both else "moved" if twin else "gained" if when == "after" else "lost"
            rows.append(
                ShiftRow(
                    feature=feature,
                    status=status,
                    refusal=feature in side.refusal_features,
                    partner=twin[0] if twin else None,
                    cosine=twin[1] if twin else None,
                    active_after=float(active[0][n]),
                    active_before=float(active[1][n]),
                    alone_after=taken[0][n],
                    alone_before=taken[1][n],
                )
            )
    return tuple(rows)


def _moved(pair: Pair, rest: list[Features]) -> dict[When, dict[Any, tuple[Any, float]]]:
    """Features of one F* only, with a twin in the other: nearest to each other by decoder cosine, and nearer than any
    random feature drawn for the later set is to the earlier one."""
    from demur.method.matching import mutual_nearest, unit_rows

    found: dict[When, dict[Any, tuple[Any, float]]] = {"after": {}, "before": {}}
    later, earlier = rest
    if not (later and earlier):
        return found
    old = unit_rows(pair.before.work.suite, earlier)[0]
    suite = pair.after.work.suite
    drawn = [unit_rows(suite, each)[0] @ old.T for each in pair.after.random_sets(pair.after.refusal_features)]
    chance = max((float(each.max()) for each in drawn), default=1.0)
    for a, b, cosine in mutual_nearest(unit_rows(suite, later)[0] @ old.T):
        if cosine > chance:
            found["after"][later[a]] = earlier[b], cosine
            found["before"][earlier[b]] = later[a], cosine
    return found


def _knowing(
    context: Context[Config], pair: Pair, tests: dict[str, PromptSet]
) -> tuple[tuple[KnowingRow, ...], tuple[PointRow, ...]]:
    from demur.studies.checkpoints.measure import p_harmful
    from demur.studies.gauge import p_refuse

    sets = tuple(tests.values())
    harmful = [p_harmful(side, context, sets) for _, side in _sides(pair)]
    refuse = [[p_refuse(side.work, each, pair.refusal_ids) for each in sets] for _, side in _sides(pair)]
    rows: list[KnowingRow] = []
    points: list[PointRow] = []
    for n, name in enumerate(tests):
        table = np.stack([*(each[n] for each in harmful), *(each[n] for each in refuse)], 1)
        means = [bootstrap_of(lambda m, k=k: m[..., k], table) for k in range(4)]
        changes = [bootstrap_of(lambda m, k=k: m[..., k] - m[..., k + 1], table) for k in (0, 2)]
        ignored = [clustered_rate([list(map(bool, (h[n] > 0.5) & (r[n] <= 0.5)))])
                   for h, r in zip(harmful, refuse, strict=True)]  # fmt: skip
        rows.append(
            KnowingRow(
                prompts=name,
                harmful_after=means[0],
                harmful_before=means[1],
                harmful_change=changes[0],
                refuse_after=means[2],
                refuse_before=means[3],
                refuse_change=changes[1],
                ignored_after=ignored[0],
                ignored_before=ignored[1],
            )
        )
        points += [
            PointRow(checkpoint=when, prompts=name, harmful=float(row[k]), refuse=float(row[2 + k]))
            for k, (when, _) in enumerate(_sides(pair))
            for row in table
        ]
    return tuple(rows), tuple(points)


def _fit(pair: Pair) -> tuple[FitRow, ...]:
    from demur.studies.checkpoints.measure import unexplained

    side = pair.after if pair.after.found is not None else pair.before
    assert side.found is not None
    layers = tuple(side.found.chosen.by_layer())
    after, before = (
        unexplained(each, side, pair.prompts.harmful.head(8), layers) for each in (pair.after, pair.before)
    )
    return tuple(FitRow(layer=layer, after=after[layer], before=before[layer]) for layer in layers)


def _sections(result: Result) -> Any:
    from demur.studies.checkpoints.sections import checkpoint_sections

    return checkpoint_sections(result)


STUDY = Study("checkpoints", Config, Result, run, _sections, residual="it measures how well they reconstruct that")
