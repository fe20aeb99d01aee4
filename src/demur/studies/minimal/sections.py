"""What the study `minimal` finds, and how it is shown."""

from __future__ import annotations

from typing import Any, Literal

from demur.report import charts
from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.report.format import (
    count_text,
    estimate_text,
    listed,
    measure,
    p_text,
    percent,
    points_text,
    rate_text,
    short_number,
    span,
)
from demur.stats import Estimate
from demur.studies.base import StudyResult
from demur.types import FeatureField, Value

SILENT, AWAKE = 0.05, 0.5
"""A dormant feature fires on at most this share of prompts in the clean run, and on at least this one once others are
suppressed."""

Kind = Literal["necessity", "sufficiency"]


class SizeRow(Value):
    """A set on the way down: what was taken out last, its effect and the compliance under it."""

    size: int
    removed: FeatureField | None
    chosen: bool
    """It is the minimal set."""
    selection: float
    """Share of F*'s fall of log-odds on the selection prompts, which chose."""
    tuning: Estimate
    """Tuning prompts complied with, which chose."""
    test: Estimate
    """Share of F*'s fall of log-odds on the test prompts."""


class FeatureOfSet(Value):
    """A feature of the minimal set and its role; on the test prompts, the share of F*'s fall of log-odds that is left
    without it, and the rate complied with."""

    feature: FeatureField
    role: str
    cosine: float
    without: Estimate
    complied: Estimate


class Certificate(Value):
    """One test of one set on the test prompts. `share`: of the effect of F* (necessity: suppressed) or of the way back
    from the direction's ablation to the clean run (sufficiency: restored). `rate`: complied, or refused."""

    test: Kind
    name: str
    size: int
    sets: int
    share: Estimate
    rate: Estimate
    difference: Estimate | None
    """The minimal set's rate less this one's, on the same prompts."""
    p: float | None
    draws: tuple[float, ...] = ()
    """Of a control: the share of each set."""


class DormantRow(Value):
    """A feature that is silent until the features of F* in one layer are suppressed. `clean` and `awake`: test prompts
    on which it fires; `effect`: further fall of log-odds when it is suppressed with them, `alone`: without them."""

    feature: FeatureField
    layer: int
    wakers: tuple[FeatureField, ...]
    clean: Estimate
    awake: Estimate
    effect: Estimate
    alone: Estimate


class PairRow(Value):
    """What two features do together beyond the sum of what each does: nats; negative: one stands in for the other's
    effect; positive: each covers for the other's loss."""

    first: FeatureField
    second: FeatureField
    interaction: Estimate
    p_holm: float
    estimate: float | None = None
    """What the factorisation machine says of it, if one was fitted."""


class Screening(Value):
    """How well a factorisation machine of `rank` factors predicts what random parts of F* do that it has not seen
    (shares of variance explained; `gain`: over an additive fit), and agrees with exact patching: `spearman` over the
    `pairs` of the minimal set, and of the pairs that it held for strongest those whose interaction has the sign that it
    said."""

    features: int
    draws: int
    rank: int
    r2: Estimate
    additive: Estimate
    gain: Estimate
    pairs: int
    spearman: Estimate
    same_sign: Estimate


class Result(StudyResult):
    factor: float
    target: float
    chosen: tuple[FeatureField, ...]
    """F*."""
    effect: Estimate
    """Fall of refusal log-odds under F* on the test prompts, nats."""
    of_direction: Estimate
    """The same fall as a share of the direction's."""
    features: tuple[FeatureOfSet, ...]
    sizes: tuple[SizeRow, ...]
    certificate: tuple[Certificate, ...]
    dormant: tuple[DormantRow, ...]
    pairs: tuple[PairRow, ...]
    pairs_tested: int
    screening: Screening | None = None


_TESTS: dict[Kind, tuple[str, str, str]] = {
    "necessity": ("Suppressed", "of the effect of F*", "complied"),
    "sufficiency": ("Restored into the run with the direction ablated", "of the way back", "refused"),
}


def sections(result: Result) -> list[Section]:
    """What is shown, the verdict first."""
    return [
        _set_section(result),
        _certificate_section(result),
        _sizes_section(result),
        _redundancy_section(result),
        _pair_section(result),
    ]


def _row(result: Result, test: Kind, name: str = "minimal set") -> Certificate:
    return next(row for row in result.certificate if (row.test, row.name) == (test, name))


def _set_section(result: Result) -> Section:
    need, enough, chance = (
        _row(result, "necessity"),
        _row(result, "sufficiency"),
        _row(result, "necessity", "random features"),
    )
    nothing = _row(result, "sufficiency", "nothing")
    n, features = len(result.features), "feature" if len(result.features) == 1 else "features"
    verdict = (
        f"The minimal set holds {n} of the {len(result.chosen)} features of F* and keeps {estimate_text(need.share)} "
        f"of their effect on held-out prompts: scaled by c = {short_number(result.factor)}, {rate_text(need.rate)} are "
        f"complied with ({n} random {features}: {rate_text(chance.rate)}). Put back alone while the direction is "
        f"ablated, it restores {estimate_text(enough.share)} of the refusal log-odds, and {rate_text(enough.rate)} are "
        f"refused (nothing put back: {rate_text(nothing.rate)})."
    )
    blocks: list[Block] = [Text(verdict, "verdict")]
    if need.share.high < result.target:
        blocks.append(
            Text(
                f"On test prompts the minimal set keeps less than the target of {percent(result.target)}: it does not "
                "carry over from the prompts that chose it",
                "warning",
            )
        )
    floor = result.target * _row(result, "necessity", "F*").rate.value
    rows = [
        [
            str(row.feature),
            row.role,
            measure(row.cosine),
            estimate_text(row.without),
            rate_text(row.complied),
            _lost(row, result.target, floor),
        ]
        for row in result.features
    ]
    table = Table.of(
        "The minimal set, and what is left without each feature",
        "feature | role | > cosine: with the direction | > log-odds without it: share of F*'s fall | > complied | "
        f"{percent(result.target)} of F*'s effect: log-odds and compliance",
        rows,
        caption=f"F*: {listed([str(f) for f in result.chosen])}. Test prompts, 95 % intervals.",
    )
    intro = (
        "On the prompts that chose, no feature can go without losing the target. The set is not minimal if the target "
        "is reached without one of them on the test prompts."
    )
    return Section("Minimal set", (*blocks, table), brief=True, intro=intro)


def _lost(row: FeatureOfSet, target: float, floor: float) -> str:
    if row.without.high < target or row.complied.high < floor:
        return "lost without it"
    return "reached without it" if row.without.low >= target and row.complied.low >= floor else "not clear"


def _certificate_section(result: Result) -> Section:
    tables: list[Block] = []
    for test, (title, share, rate) in _TESTS.items():
        rows = [
            [
                row.name,
                str(row.size) + (f", {row.sets} sets" if row.sets > 1 else ""),
                estimate_text(row.share) + (f" ({span(min(row.draws), max(row.draws))})" if row.draws else ""),
                rate_text(row.rate),
                count_text(row.rate),
                points_text(row.difference),
                p_text(row.p),
            ]
            for row in result.certificate
            if row.test == test
        ]
        columns = (
            f"what | > features | > log-odds: share {share} | > {rate} | > n | > minimal set less this, points | > p"
        )
        tables.append(Table.of(title, columns, rows, strong=[0], caption=_CAPTIONS[test]))
    gap = 1 - _row(result, "sufficiency", "F*").share.value
    note = (
        f"Completeness: F* itself lowers the refusal log-odds by {estimate_text(result.effect)} nats, "
        f"{estimate_text(result.of_direction)} of what ablating the direction does; {percent(gap)} of the way back is "
        "not in F*."
    )
    return Section(
        "Certificate",
        (*tables, Text(note)),
        intro=(
            "Measured on the test prompts that the clean model refuses. The claim would be refuted if random parts of "
            "F* of the same size, or matched random features, did as much. If the rest of F* does as much too, this is "
            "one minimal set of several: both lie on one path, say."
        ),
    )


_CAPTIONS: dict[Kind, str] = {
    "necessity": "Necessity: only these features are scaled. For controls in brackets: the range over sets. p: paired, "
    "over prompts and sets, not adjusted.",
    "sufficiency": "Sufficiency: only these features are put back to their clean values, on the prompt's tokens.",
}


def _sizes_section(result: Result) -> Section:
    def draw() -> Any:
        test = tuple(charts.Point.of(row.size, row.test, chosen=row.chosen) for row in result.sizes)
        tuning = tuple(charts.Point.of(row.size, row.tuning) for row in result.sizes)
        series = [charts.Series("log-odds (test)", test), charts.Series("complied (tuning)", tuning)]
        rules = {"target": result.target}
        return charts.line_chart(
            series,
            x_title="features",
            y_title="share",
            share=False,
            reverse=True,
            rules=rules,
        )

    rows = [
        [
            row.size,
            "–" if row.removed is None else str(row.removed),
            measure(row.selection),
            rate_text(row.tuning),
            estimate_text(row.test),
        ]
        for row in result.sizes
    ]
    columns = "> features | taken out | > log-odds, selection: share of F*'s | > complied, tuning | > log-odds, test"
    chosen = [n for n, row in enumerate(result.sizes) if row.chosen]
    ringed = "Ringed: the minimal set. " if chosen else "Features went from one of these sets until none could go. "
    intro = (
        "Each step takes out the feature whose loss leaves the largest fall of the refusal log-odds on the selection "
        f"prompts. The smallest that keeps {percent(result.target)} of F*'s fall there, and of its compliance on the "
        "tuning prompts, is taken, and any feature that can still go then goes."
    )
    blocks = (
        Chart("Effect on the way down", draw, f"{ringed}Bands are 95 % intervals."),
        Table.of("Every step", columns, rows, strong=chosen, folded=True),
    )
    return Section("How the set was found", blocks, intro=intro)


def _redundancy_section(result: Result) -> Section:
    awake = tuple(dict.fromkeys(str(row.feature) for row in result.dormant))
    taking = tuple(dict.fromkeys(str(row.feature) for row in result.dormant if row.effect.low > 0))
    said = (
        f"Of {len(awake)} features that wake when others are suppressed, {len(taking)} carry refusal then"
        f"{': ' * bool(taking)}{listed(taking)}."
    )
    rows = [
        [
            str(row.feature),
            f"{len(row.wakers)} of layer {row.layer}",
            rate_text(row.clean),
            rate_text(row.awake),
            estimate_text(row.effect),
            estimate_text(row.alone),
        ]
        for row in result.dormant
    ]
    columns = (
        "feature | wakes without F*'s | > fires, clean | > fires then | > further fall of log-odds: nats, when it is "
        "suppressed with them | > alone: nats"
    )
    table = Table.of("Dormant features", columns, rows, caption="Shares of test prompts; 95 % intervals.")
    intro = (
        f"Features that fire on at most {percent(SILENT)} of prompts, and on at least {percent(AWAKE)} once the "
        "features of F* in one earlier layer are suppressed; found on the selection prompts, measured on test prompts. "
        "A feature takes nothing over if suppressing it as well makes no difference."
    )
    return Section("Redundancy", (Text(said), *([table] if rows else [])), intro=intro)


def _pair_section(result: Result) -> Section:
    rows = [
        [str(row.first), str(row.second), estimate_text(row.interaction), p_text(row.p_holm)] for row in result.pairs
    ]
    columns = "first | second | > together less the sum of each: nats | > p adjusted: sign flips, Holm over all pairs"
    blocks: tuple[Block, ...] = (Text("No pair was tested."),)
    if found := result.screening:
        columns += " | > estimate: of the factorisation machine, nats"
        rows = [[*row, measure(pair.estimate)] for row, pair in zip(rows, result.pairs, strict=True)]
        note = (
            f"{found.features} features have too many pairs to test each. A factorisation machine of {found.rank} "
            f"factors, fitted to what {found.draws} parts of them do to the selection prompts, named the strongest. Of "
            f"parts that it had not seen it explains {rate_text(found.r2)} of the variance, an additive fit "
            f"{rate_text(found.additive)} (gain {points_text(found.gain)} points): without a gain its pairs mean "
            f"nothing. Its rank correlation with exact patching over the {found.pairs} pairs of the minimal set is "
            f"{estimate_text(found.spearman)}; of the {found.same_sign.n} other pairs that it named, "
            f"{rate_text(found.same_sign)} have the sign that it said."
        )
        blocks = (Text(note),)
    if rows:
        caption = f"The {len(rows)} strongest of {result.pairs_tested} pairs, each suppressed alone and together."
        table = Table.of("Interactions", columns, rows, caption=caption, folded=len(rows) > 10)
        blocks = (*(blocks if result.screening else ()), table)
    intro = (
        "Above zero, each feature makes up for the loss of the other; below, what one does goes through the other, or "
        "both run into the same limit. Intervals that hold zero show no interaction."
    )
    return Section("Interactions", blocks, intro=intro)
