"""Express F* in other SAEs of the same model: which features have a counterpart there, and whether the effect carries.

A counterpart is the feature of the other SAE of that layer which is nearest by decoder cosine, or by correlation of
activations over the tokens of the prompts that choose. Both ways are asked, and what the counterparts do to refusal is
measured beside F* itself and beside random sets matched to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from demur.errors import InputError
from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.stats import Estimate, bootstrap_of, clustered_rate, crossed_difference
from demur.studies.base import Study, StudyResult
from demur.studies.config import FindConfig, Sources
from demur.types import FeatureField, Value

if TYPE_CHECKING:
    from demur.method.matching import Best, Nearest
    from demur.saes import Suite
    from demur.studies.context import Change, Context, Workspace
    from demur.studies.drive import Features
    from demur.studies.pipeline import Found
    from demur.types import PromptSet

Way = Literal["decoder", "activation"]
WAYS: tuple[Way, ...] = ("decoder", "activation")
_TOLD: dict[Way, str] = {"decoder": "decoder cosine", "activation": "correlation of activations"}


class Config(FindConfig):
    """F*, and the SAEs in which it is expressed."""

    group: ClassVar[str] = "Transfer"

    to_saes: Sources = ()
    """Other SAEs of the same model in which F* is expressed, folders or hub ids; repeatable (the bundled model: those
    trained on it before its safety training)."""
    factor: float = Field(default=0.0, lt=1)
    """Scale factor c under which features are scaled; 0 removes them."""
    random_sets: int = Field(default=5, ge=2)
    """Random sets matched to F*, and to its counterparts."""
    n_answers: int = Field(default=50, ge=1)
    """Test prompts of each class that are answered under every change."""


class MatchRow(Value):
    """A feature of F* and its nearest in the other SAEs in one way. `mutual`: it is that one's nearest, too."""

    feature: FeatureField
    way: Way
    other: FeatureField | None
    score: float
    mutual: bool


class WayRow(Value):
    """One way over all features of F*: mean score and share of mutual matches, and the same of random features of F*'s
    own SAEs, matched to F* and alive. `difference` is of the mean scores; features are what is resampled."""

    way: Way
    score: Estimate
    random: Estimate
    difference: Estimate
    mutual: float
    mutual_random: float


class EffectRow(Value):
    """What a set does: its drive of refusal (see `studies.drive`), and the answers of test prompts with it scaled or
    set, beside random sets matched to it. `carried` is the drive as a share of that of F*."""

    name: str
    features: int
    drive: Estimate
    carried: Estimate
    suppressed: Estimate
    suppressed_random: Estimate
    suppressed_difference: Estimate
    induced: Estimate
    induced_random: Estimate
    induced_difference: Estimate


class SuiteRows(Value):
    """F* in one other suite."""

    name: str
    matches: tuple[MatchRow, ...]
    ways: tuple[WayRow, ...]
    effects: tuple[EffectRow, ...]
    """F* itself first."""

    @property
    def agree(self) -> int:
        """Features of F* with the same counterpart in both ways."""
        chosen = {(row.feature, row.way): row.other for row in self.matches}
        features = {feature for feature, _ in chosen}
        return sum(
            chosen[f, "decoder"] is not None and chosen[f, "decoder"] == chosen[f, "activation"] for f in features
        )


class Result(StudyResult):
    """F* and what becomes of it in each other suite."""

    k: int
    factor: float
    clean_harmful: Estimate
    clean_harmless: Estimate
    suites: tuple[SuiteRows, ...]


def run(context: Context[Any]) -> Result:
    """Find F*, look for its features in the other suites, and change them there."""
    from demur.studies.pipeline import find

    if not context.inputs.others:
        raise InputError("no SAEs to express F* in; name some with --to-saes")
    found = find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    meter = _Meter(context, found)
    suites: list[SuiteRows] = []
    with context.timed("effects of F*"):
        drive, own = meter.effect("F*", context, found, found.chosen.features)
    for name, suite in context.inputs.others.items():
        with context.timed(f"matches: {name}"):
            nearest, random = meter.nearest(suite, found.chosen.features), meter.nearest(suite, meter.random)
        with context.timed(f"effects: {name}"):
            effects = [own, *meter.counterparts(suite, nearest, drive)]
        suites.append(
            SuiteRows(
                name=name,
                matches=tuple(row for way in WAYS for row in _matches(found.chosen.features, way, nearest[way])),
                ways=tuple(_way(way, nearest[way], random[way]) for way in WAYS),
                effects=tuple(effects),
            )
        )
    harmful, harmless = (context.answer("clean: test", each).refusal for each in meter.asked)
    return Result(
        k=len(found.chosen),
        factor=context.config.factor,
        clean_harmful=harmful,
        clean_harmless=harmless,
        suites=tuple(suites),
    )


def _matches(features: Features, way: Way, found: Nearest) -> Iterator[MatchRow]:
    for feature, other, score, mutual in zip(features, *found, strict=True):
        yield MatchRow(feature=feature, way=way, other=other, score=score, mutual=mutual)


def _way(way: Way, ours: Nearest, theirs: Nearest) -> WayRow:
    """One way over the features that have an SAE to match in."""
    a, b = (np.array([x for x in each.scores if not np.isnan(x)])[:, None] for each in (ours, theirs))
    return WayRow(
        way=way,
        score=bootstrap_of(lambda m: m[..., 0], a),
        random=bootstrap_of(lambda m: m[..., 0], b),
        difference=bootstrap_of(lambda x, y: (x - y)[..., 0], a, b),
        mutual=float(np.mean(ours.mutual)),
        mutual_random=float(np.mean(theirs.mutual)) if theirs.mutual else float("nan"),
    )


class _Meter:
    """Matches and effects, once per run folder; what chooses is read off the selection prompts."""

    def __init__(self, context: Context[Any], found: Found) -> None:
        from demur.studies.drive import random_sets

        self.context, self.found = context, found
        self.asked = [prompts.head(context.config.n_answers) for _, prompts in context.splits.test]
        drawn = random_sets(context, found, found.chosen.features)
        self.random = self._alive(tuple(dict.fromkeys(feature for each in drawn for feature in each)))

    def _alive(self, features: Features) -> Features:
        """Those that fire at all on the prompts that match."""
        from demur.method.activations import feature_activations

        items = self._items
        values = feature_activations(self.context.model, self.context.suite, items, features)
        fires = [any(bool((each[:, n] > 0).any()) for each in values) for n in range(len(features))]
        return tuple(feature for feature, alive in zip(features, fires, strict=True) if alive)

    @property
    def _items(self) -> Any:
        used = self.found.clean.used("selection")
        return self.context.model.tokenize([*used.harmful, *used.harmless])

    def nearest(self, suite: Suite, features: Features) -> dict[Way, Nearest]:
        """Counterparts of features in both ways."""
        from demur.method.matching import Nearest, by_correlation, by_cosine, nearest

        context, used = self.context, self.found.clean.used("selection")
        ways: dict[Way, Best] = {"decoder": by_cosine, "activation": by_correlation(context.model, self._items)}
        depends = {"to": suite.identity, "features": features}
        depends |= {"prompts": [used.harmful.digest, used.harmless.digest]}
        return {
            way: context.cached(
                "counterparts",
                depends | {"way": way},
                Nearest,
                partial(nearest, context.suite, suite, features, best),
                f"counterparts: {way}",
            )
            for way, best in ways.items()
        }

    def counterparts(self, suite: Suite, found: dict[Way, Nearest], drive: np.ndarray) -> Iterator[EffectRow]:
        """What the counterparts do: of each way, and those on which both agree."""
        from demur.method.selection import Pool

        context = self.context
        work = context.on(replace(context.inputs, suite=suite))
        work.judging = context.judging
        sets = {f"counterparts by {_TOLD[way]}": found[way].others for way in WAYS}
        both = zip(*(found[way].others for way in WAYS), strict=True)
        sets["counterparts in both ways"] = tuple(a if a == b else None for a, b in both)
        for name, others in sets.items():
            features = tuple(dict.fromkeys(each for each in others if each is not None))
            if not features:
                context.warn(f"{suite.source}: there are no {name}")
                continue
            like = replace(self.found, pool=Pool(features=features, cosines=(0.0,) * len(features)))
            yield self.effect(name, work, like, features, drive)[1]

    def effect(
        self, name: str, work: Workspace[Any], found: Found, features: Features, whole: np.ndarray | None = None
    ) -> tuple[np.ndarray, EffectRow]:
        """The drive of a set, with its resampled values, and the row that shows it; `whole` is the drive of F*."""
        from demur.method.interventions import ScaleFeatures
        from demur.studies.drive import drives, falls, interval_of, random_sets, set_to_maxima, share_of

        config, test = self.context.config, self.context.splits.test
        sets = (features, *random_sets(work, found, features))
        ids = self.found.clean.refusal_ids
        (drive,) = drives([falls(work, test, ids, sets, config.factor)])
        n = len(test.harmful) + len(test.harmless)
        changes: tuple[tuple[str, PromptSet, Callable[[Features], Change]], ...] = (
            ("suppressed", self.asked[0], lambda each: (ScaleFeatures(each, config.factor),)),
            ("induced", self.asked[1], partial(set_to_maxima, work, found)),
        )
        told: dict[str, Estimate] = {}
        for kind, prompts, change in changes:
            own, *drawn = (work.answer(f"{name}: {kind}", prompts, change(each)) for each in sets)
            told |= {kind: own.refusal, f"{kind}_random": clustered_rate([each.refused for each in drawn])}
            told[f"{kind}_difference"] = crossed_difference(own.refused, [each.refused for each in drawn])[0]
        carried = share_of(drive, drive if whole is None else whole)
        row = EffectRow(
            name=name, features=len(features), drive=interval_of(drive, n), carried=interval_of(carried, n), **told
        )
        return drive, row


# -- what is shown -----------------------------------------------------------------------------------------------------


def sections(result: Result) -> list[Section]:
    """For each suite: verdict, effects, and the features one by one."""
    found: list[Section] = []
    for suite in result.suites:
        name = fmt.model_title(suite.name)
        found += [
            Section(f"F* in SAEs {name}", (Text(_verdict(suite), "verdict"), _effects(result, suite)), brief=True),
            Section(f"Counterparts in SAEs {name}", tuple(_shown(suite)), intro=_INTRO),
        ]
    return found


_INTRO = (
    "The nearest feature of the other SAE of the same layer, by decoder cosine and by correlation of activations over "
    "the scored tokens of the selection prompts. Random features of F*'s own SAEs, matched to F*, are the control: "
    "that F* has counterparts because it is F* is refuted where theirs are as near."
)


def _verdict(suite: SuiteRows) -> str:
    rows = [row for row in suite.matches if row.way == "decoder"]
    mutual = {way: sum(row.mutual for row in suite.matches if row.way == way) for way in WAYS}
    effects = "; ".join(
        f"{row.name} ({row.features}) carry {fmt.estimate_text(row.carried)} of its drive" for row in suite.effects[1:]
    )
    return (
        f"Of {len(rows)} features of F*, {mutual['decoder']} have a mutual counterpart in SAEs "
        f"{fmt.model_title(suite.name)} by decoder cosine, {mutual['activation']} by correlation of activations, and "
        f"{suite.agree} the same one in both ways. {effects[:1].upper()}{effects[1:]}."
    )


def _effects(result: Result, suite: SuiteRows) -> Table:
    rows = [
        (
            row.name,
            row.features,
            fmt.estimate_text(row.drive),
            fmt.estimate_text(row.carried),
            row.suppressed,
            row.suppressed_random,
            fmt.points_text(row.suppressed_difference),
            row.induced,
            row.induced_random,
            fmt.points_text(row.induced_difference),
        )
        for row in suite.effects
    ]
    return Table.of(
        "Does the effect carry over?",
        "set | > features | > drive: fall of the refusal log-odds, harmful less harmless prompts, beyond random sets, "
        "nats | > carried: of the drive of F* | > suppressed: harmful prompts refused | > random | > difference: "
        "points | > induced: harmless prompts refused | > random | > difference: points",
        rows,
        caption=f"Test prompts; clean, {fmt.rate_text(result.clean_harmful)} of harmful and "
        f"{fmt.rate_text(result.clean_harmless)} of harmless ones are refused. Suppressed: scaled by c = "
        f"{fmt.short_number(result.factor)}; induced: set to their own mean maximum on harmful prompts. Random: sets "
        "matched to each in its own SAEs.",
        strong=(0,),
    )


def _shown(suite: SuiteRows) -> Iterator[Block]:
    rows = [
        (
            _TOLD[row.way],
            fmt.estimate_text(row.score),
            fmt.estimate_text(row.random),
            fmt.estimate_text(row.difference),
            fmt.percent(row.mutual),
            fmt.percent(row.mutual_random),
        )
        for row in suite.ways
    ]
    columns = "way | > F*: mean score of the nearest | > random features | > difference | > mutual: of F* | > of random"
    yield Table.of("How near counterparts are", columns, rows, caption="95 % intervals over features.")
    by = {(row.feature, row.way): row for row in suite.matches}
    features = list(dict.fromkeys(row.feature for row in suite.matches))
    pairs = [tuple(by[feature, way] for way in WAYS) for feature in features]
    cells = [
        (str(a.feature), *(x for row in (a, b) for x in (str(row.other) if row.other else None,
         fmt.measure(row.score), "yes" if row.mutual else "no")))
        for a, b in pairs
    ]  # fmt: skip
    columns = "feature | by decoder | > cosine | mutual | by activation | > correlation | mutual"
    yield Table.of("Features of F* and their counterparts", columns, cells, folded=True)
    points = charts.Series("features of F*", tuple(charts.Point(a.score, b.score) for a, b in pairs), "none")
    yield Chart(
        f"Two ways of being near: SAEs {fmt.model_title(suite.name)}",
        lambda: charts.scatter([points], x_title="decoder cosine", y_title="correlation of activations"),
    )


STUDY = Study("transfer", Config, Result, run, sections, residual="it encodes that in both")
