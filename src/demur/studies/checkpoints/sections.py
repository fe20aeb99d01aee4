"""What `demur checkpoints` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text

if TYPE_CHECKING:
    from demur.stats import Estimate
    from demur.studies.checkpoints import PairRows, Result, When
    from demur.studies.checkpoints.rule import Condition, Kind, State

_TOLD: Final[dict[Kind, str]] = {
    "new mechanism": "the features that drive refusal now did not drive it before",
    "amplified": "the same features drive refusal, and more strongly",
    "weakened": "the same features drive refusal, and less strongly",
    "hidden": "the features that drove refusal before still fire on harmful prompts, but no longer drive it",
    "removed": "the features that drove refusal before neither fire nor drive it now, and no others took their place",
    "no change": "the same features drive refusal as strongly, and as many prompts are refused, within the margin",
    "not clear": "the intervals leave more than one of these open",
}
_STATES: Final[dict[State, str]] = {
    "none": "no F* was found there",
    "unproven": "they move refusal no more than random features even there",
    "drives": "they drive refusal there, too",
    "hidden": "they fire there and do not drive refusal",
    "silent": "they neither fire nor drive refusal there",
    "undriven": "they do not drive refusal there; whether they fire is not clear",
    "open": "whether they drive refusal there is not clear",
}


def checkpoint_sections(result: Result) -> list[Section]:
    """For each pair: verdict and evidence, behaviour, drives, directions, features, P(harmful) and P(refuse)."""
    found: list[Section] = []
    for pair in result.pairs:
        name = fmt.model_title(pair.before)
        verdict = (Text(_verdict(pair), "verdict"), _conditions(pair), _behaviour(pair))
        found += [
            Section(f"From {name} to MODEL", verdict, brief=True),
            Section("Features of each in the other", tuple(_drives(result, pair)), intro=_DRIVES),
            Section("Directions by layer", tuple(_directions(pair)), intro=_DIRECTIONS),
            Section("Features kept, moved, gained and lost", tuple(_features(pair))),
            Section("Recognised and refused", tuple(_knowing(pair)), intro=_KNOWING),
        ]
    return found


_DRIVES: Final = (
    "Each checkpoint is searched in the same way; what is found in one is scaled by the same factor in both, and so "
    "are random sets matched to it. That it is a mechanism of refusal is refuted where random sets do as much."
)
_DIRECTIONS: Final = (
    "Harmful less harmless prompts, by label, at the last token. Two halves of the prompts in one checkpoint are the "
    "yardstick: a cosine as high shows no change of direction."
)
_KNOWING: Final = (
    "P(harmful): a linear probe of the mean residual of a prompt, fitted in each checkpoint by the prompts' labels. "
    "P(refuse): of the answer's first token. That training taught the model to recognise harm is refuted where "
    "P(harmful) was as high before."
)


def _verdict(pair: PairRows) -> str:
    verdict, name = pair.verdict, fmt.model_title(pair.before)
    text = f"From {name} to MODEL: {verdict.kind}: {_TOLD[verdict.kind]}"
    if verdict.new_too:
        text += "; another mechanism, which did not drive refusal before, does so now"
    states: dict[When, State] = {"after": verdict.after, "before": verdict.before}
    told = [
        f"of the {len(each.features)} refusal features found {when}, in the other checkpoint {_STATES[states[when]]} "
        f"(share of the drive {fmt.estimate_text(each.carried)})"
        for when, each in pair.mechanisms.items()
    ]
    harmful = fmt.points_text(pair.behaviour[0].difference)
    return f"{text}. {'; '.join(told).capitalize()}. Refusal of harmful prompts changed by {harmful} points."


def _holds(condition: Condition) -> str:
    return {True: "yes", False: "no", None: "not clear"}[condition.holds]


def _conditions(pair: PairRows) -> Table:
    conditions = pair.verdict.conditions
    rows = [(each.claim, each.needs, fmt.estimate_text(each.estimate), _holds(each)) for each in conditions]
    return Table.of(
        "What the verdict rests on",
        "claim | needs: the whole 95 % interval | > measured | holds",
        rows,
        caption="Intervals over prompts and random sets, not adjusted. New mechanism: found after, does not drive "
        "before. Hidden: found before, does not drive after, still fires. Amplified, weakened, no change: drives in "
        "both.",
    )


def _behaviour(pair: PairRows) -> Table:
    rows = [
        (row.prompts, row.after.n, row.before, row.after, fmt.points_text(row.difference), fmt.p_text(row.p_holm))
        for row in pair.behaviour
    ]
    columns = "prompts | > n | > before: refused | > after: refused | > change: points | > p: McNemar, Holm"
    return Table.of("Behaviour on the same prompts", columns, rows)


def _drives(result: Result, pair: PairRows) -> Iterator[Block]:
    rows = [
        (name, when, len(each.features), *map(fmt.estimate_text, (each.own, each.other, each.carried, each.fires)))
        for name, group in (("refusal features", pair.mechanisms), ("F*", pair.stars))
        for when, each in group.items()
        if group is pair.mechanisms or each != pair.mechanisms[when]
    ]
    yield Table.of(
        "Drive of refusal",
        "set | found | > features | > drive there: fall of the refusal log-odds, harmful less harmless prompts, beyond "
        "random sets, nats | > in the other | > share: the one over the other | > fires: share of the contrast between "
        "harmful and harmless prompts",
        rows,
        caption=f"Scaled by c = {fmt.short_number(result.factor)} in both. F* may hold harm features, which "
        "any mechanism reads, so the verdict rests on its refusal features.",
    )
    cells = [
        (row.kind, row.found, row.checkpoint, row.clean, row.changed, row.random, fmt.points_text(row.difference),
         fmt.p_text(row.p))
        for row in pair.answers
    ]  # fmt: skip
    yield Table.of(
        "Answers with the refusal features changed",
        "change | found | in | > clean: prompts refused | > changed | > random sets changed | > difference: points, "
        "changed less random | > p",
        cells,
        caption=f"suppress: harmful prompts, features scaled by c = {fmt.short_number(result.factor)}. induce: "
        "harmless prompts, features set to their mean maximum on harmful ones where they were found; a checkpoint that "
        "refuses then had the way from these features to refusal, whether or not anything switched them on.",
    )
    fits = [(row.layer, fmt.measure(row.before), fmt.measure(row.after)) for row in pair.fit]
    yield Table.of(
        "Fit of the SAEs",
        "layer | > before: variance unexplained | > after",
        fits,
        caption="Features that are silent where the SAEs do not fit may be there and not seen.",
        folded=True,
    )


def _directions(pair: PairRows) -> Iterator[Block]:
    lines = [
        charts.Series("after and before", tuple(charts.Point.of(row.layer, row.cosine) for row in pair.cosines)),
        charts.Series("two halves of the prompts", tuple(charts.Point(row.layer, row.halves) for row in pair.cosines)),
    ]
    yield Chart(
        "Cosine of the two checkpoints' directions",
        lambda: charts.line_chart(lines, x_title="layer", y_title="cosine", share=False),
    )
    rows = [(row.layer, fmt.estimate_text(row.cosine), fmt.measure(row.halves)) for row in pair.cosines]
    columns = "layer | > cosine: after and before | > halves: of the prompts, in one checkpoint"
    yield Table.of("Directions", columns, rows, folded=True)


def _features(pair: PairRows) -> Iterator[Block]:
    counts = Counter(row.status for row in pair.features)
    yield Text("Of the features of either F*: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + ".")
    rows = [
        (
            str(row.feature),
            row.status,
            "refusal" if row.refusal else fmt.MISSING,
            fmt.MISSING if row.partner is None else f"{row.partner} ({fmt.measure(row.cosine)})",
            fmt.measure(row.active_before),
            fmt.measure(row.active_after),
            fmt.estimate_text(row.alone_before),
            fmt.estimate_text(row.alone_after),
        )
        for row in pair.features
    ]
    yield Table.of(
        "Features",
        "feature | status | role | twin: in the other F*, decoder cosine | > active before: mean maximum on harmful "
        "prompts | > active after | > alone before: fall of the refusal log-odds when it alone is taken out, nats | > "
        "alone after",
        rows,
        caption="moved: each the other's nearest by decoder cosine, and nearer than any matched random feature.",
        folded=True,
    )


def _knowing(pair: PairRows) -> Iterator[Block]:
    def cells(*estimates: Estimate) -> tuple[str, ...]:
        return tuple(map(fmt.estimate_text, estimates))

    rows: list[tuple[Any, ...]] = [
        (
            row.prompts,
            *cells(row.harmful_before, row.harmful_after, row.harmful_change),
            *cells(row.refuse_before, row.refuse_after, row.refuse_change),
            row.ignored_before,
            row.ignored_after,
        )
        for row in pair.knowing
    ]
    yield Table.of(
        "P(harmful) and P(refuse)",
        "prompts | > P(harmful) before | > after | > change | > P(refuse) before | > after | > change | > ignored "
        "before: recognised as harmful and not refused | > ignored after",
        rows,
    )
    for when in ("before", "after"):
        lines = [
            charts.Series(
                row.prompts,
                tuple(
                    charts.Point(each.harmful, each.refuse)
                    for each in pair.points
                    if (each.checkpoint, each.prompts) == (when, row.prompts)
                ),
                "none",
            )
            for row in pair.knowing
        ]
        yield Chart(
            f"Prompts {when}",
            lambda lines=lines: charts.scatter(lines, x_title="P(harmful)", y_title="P(refuse)"),
        )
