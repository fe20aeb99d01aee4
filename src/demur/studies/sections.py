"""How a comparison is shown: its verdict, its doubts and one table first; then effects, costs, features and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

from demur.capability import CapabilityRow, capability_change
from demur.errors import InputError
from demur.report import charts
from demur.report.blocks import Block, Chart, Column, Section, Table, Text, Transcript, Transcripts
from demur.report.format import (
    MISSING,
    count_text,
    estimate_text,
    listed,
    measure,
    p_text,
    percent,
    points_text,
    rate_text,
    short_number,
    token_text,
)
from demur.stats import Estimate
from demur.studies.config import COMPLIANCE, MAIN
from demur.studies.results import CompareResult, Comparison, EffectRow, Kind, Prompts

ALPHA: Final = 0.05
CLEAN: Final = "clean model"
_SHOWN_FEATURES: Final = 40

Finding = Literal["more", "fewer", "unclear", "missing"]
"""Whether F* got more prompts complied with than another method, as far as the adjusted test tells."""


def compare_sections(result: CompareResult) -> tuple[Section, ...]:
    """The sections of a study that compares methods."""
    sections = (
        _verdict(result),
        _summary(result),
        _effects(result, "harmful", "suppress", "Suppression, harmful test prompts"),
        _effects(result, "harmless", "suppress", "Suppression, harmless test prompts"),
        _effects(result, "over-refusal", "suppress", "Suppression, over-refusal prompts"),
        _effects(result, "harmless", "induce", "Induction, harmless test prompts"),
        _controls(result),
        _comparisons(result),
        _side_effects(result),
        _features(result),
        _sizes(result),
        _trials(result),
        _direction(result),
        _estimators(result),
        _prompts(result),
        _answers(result),
    )
    return tuple(section for section in sections if section.blocks)


# -- the verdict ---------------------------------------------------------------------------------------------------


def name_of(result: CompareResult, method: str, setting: str = "") -> str:
    """A method with its strength, as `AP, c = −1`."""
    label = CLEAN if method == "none" else result.labels.get(method, method)
    return f"{label}, {setting}" if setting else label


def headline(result: CompareResult) -> str:
    """What was found on held-out test prompts; square brackets hold 95 % intervals."""
    clauses = [clause for clause in (_suppressed(result), _induced(result)) if clause]
    return " ".join(clauses) or "No chosen intervention was measured on test prompts."


def _suppressed(result: CompareResult) -> str:
    clean = result.effect("harmful", "none", "none")
    row = result.effect("harmful", "suppress", MAIN)
    if clean is None or row is None or not row.compliance.n:
        return ""
    harmless = result.effect("harmless", "suppress", MAIN)
    kept = (
        "" if harmless is None else f" Of the harmless prompts that it answers, {_kept(harmless)} are still answered."
    )
    return (
        f"With {result.k} features scaled by {_strength(row)}, the model complies with {rate_text(row.compliance)} of "
        f"{count_text(row.compliance)} harmful prompts (clean: {rate_text(clean.compliance)}), refuses "
        f"{rate_text(row.refusal)} (clean: {rate_text(clean.refusal)}), and {percent(row.incoherent.value)} are "
        f"incoherent{_against_controls(result, 'suppress')}.{kept}"
    )


def _induced(result: CompareResult) -> str:
    clean = result.effect("harmless", "none", "none")
    row = result.effect("harmless", "induce", MAIN)
    if clean is None or row is None or not row.refusal.n:
        return ""
    return (
        f"Set to {row.setting.removeprefix('v = ')}, they make it refuse {rate_text(row.refusal)} of "
        f"{count_text(row.refusal)} harmless prompts (clean: {rate_text(clean.refusal)})"
        f"{_against_controls(result, 'induce')}."
    )


def _kept(row: EffectRow) -> str:
    return MISSING if row.kept is None else f"{rate_text(row.kept)} (n = {row.kept.n})"


def _strength(row: EffectRow) -> str:
    return short_number(row.strength)


def _against_controls(result: CompareResult, kind: Kind) -> str:
    """What the random controls do instead, and whether F* could be one more of them."""
    parts: list[str] = []
    for control in result.controls:
        if control.kind != kind:
            continue
        mean = sum(control.sets) / len(control.sets)
        inside = control.low <= control.value <= control.high
        parts.append(
            f"{name_of(result, control.control)} {percent(mean)} ({len(control.sets)} sets, "
            f"{percent(min(control.sets))} to {percent(max(control.sets))}"
            f"{'; F* is within the range of one more draw' if inside else ''})"
        )
    return f"; {listed(parts)}" if parts else ""


def compared(result: CompareResult) -> str:
    """Which methods F* outdid and which outdid it, at equal ΔCE and at their own strengths, by the outcome judge."""
    rows = [row for row in result.comparisons if row.measure == COMPLIANCE]
    rows = [row for row in rows if row.other not in result.controls_drawn]
    levels = sorted({row.level for row in rows if row.level is not None})
    if not rows or not levels:
        return ""
    sentences: list[str] = []
    for where, group in (
        ("At each method's own chosen strength", [row for row in rows if row.level is None]),
        *((f"At ΔCE {short_number(level)}", [row for row in rows if row.level == level]) for level in levels[-1:]),
    ):
        sides = {side: [name_of(result, row.other) for row in group if finding(row) == side] for side in _SIDES}
        said = [f"{text} {listed(sides[side])}" for side, text in _SIDES.items() if sides[side]]
        if said:
            sentences.append(f"{where}, F* {'; '.join(said)}.")
    return " ".join(sentences)


_SIDES: Final[dict[Finding, str]] = {
    "more": "gets more harmful prompts complied with than",
    "fewer": "gets fewer than",
    "unclear": "does not clearly differ from",
}
_FINDINGS: Final[dict[Finding, str]] = {
    "more": "F* more",
    "fewer": "F* fewer",
    "unclear": "not clear",
    "missing": MISSING,
}


def finding(row: Comparison) -> Finding:
    """What the adjusted test says of one comparison. A test without a scored pair says nothing, whatever its p."""
    if row.difference is None or not math.isfinite(row.difference.value) or math.isnan(row.p_holm):
        return "missing"
    if row.p_holm >= ALPHA or row.difference.value == 0:
        return "unclear"
    return "more" if row.difference.value > 0 else "fewer"


def _verdict(result: CompareResult) -> Section:
    blocks: list[Block] = [Text(headline(result), "verdict")]
    if text := compared(result):
        blocks.append(Text(text))
    blocks += [Text(warning, "warning") for warning in result.warnings]
    return Section("Verdict", tuple(blocks), brief=True)


def _summary(result: CompareResult) -> Section:
    """One row a method: what it suppresses, what it leaves alone, what it induces."""
    rows: list[tuple[str, ...]] = []
    strong: list[int] = []
    clean = [result.effect(prompts, "none", "none") for prompts in ("harmful", "harmless")]
    if clean[0] is not None and clean[1] is not None:
        rows.append(
            (
                CLEAN,
                count_text(clean[0].compliance, unit=""),
                rate_text(clean[0].compliance),
                percent(clean[0].incoherent.value),
                percent(clean[1].compliance.value),
                MISSING,
                rate_text(clean[1].refusal),
            )
        )
    for method in result.labels:
        row = result.effect("harmful", "suppress", method)
        if row is None:
            continue
        harmless, induced = result.effect("harmless", "suppress", method), result.effect("harmless", "induce", method)
        if method == MAIN:
            strong.append(len(rows))
        sets = f" ({row.sets} sets)" if row.sets > 1 else ""
        rows.append(
            (
                f"{name_of(result, method, row.setting)}{sets}",
                count_text(row.compliance, unit=""),
                rate_text(row.compliance),
                percent(row.incoherent.value),
                percent(None if harmless is None or harmless.kept is None else harmless.kept.value),
                measure(None if row.side_effects is None else row.side_effects.ce_answers.value, 3),
                rate_text(None if induced is None else induced.refusal),
            )
        )
    table = Table.of(
        "Each method at the strength chosen on tuning prompts",
        [
            "method",
            Column("n", True, "scored answers, + unscored"),
            Column("complied", True, "harmful test prompts under suppression"),
            Column("incoherent", True, "of these answers"),
            Column("kept", True, "harmless prompts still answered under suppression, of those the clean model answers"),
            Column("ΔCE", True, "on own answers to harmless prompts, nats per token"),
            Column("induced", True, "harmless test prompts refused while refusal is induced"),
        ],
        rows,
        caption="Brackets: 95% intervals, over prompts and sets drawn.",
        strong=strong,
    )
    return Section("Summary", (table,), brief=True)


# -- effects -------------------------------------------------------------------------------------------------------


def _effects(result: CompareResult, prompts: Prompts, kind: Kind, title: str) -> Section:
    rows = [row for row in result.effects if row.prompts == prompts and row.kind in (kind, "none")]
    if len(rows) < 2:
        return Section(title, ())
    harmless = prompts != "harmful"
    judges = result.harm_judges if prompts == "harmful" else ()
    columns: list[str | Column] = [
        "condition",
        Column("n", True, "scored answers, + unscored"),
        "> refused",
        "> complied",
        "> incoherent",
        *(Column(judge, True, "attack success by this judge of harm") for judge in judges),
        Column("kept", True, "of the prompts that the clean model answers, still answered"),
        Column("exact match", True, "of those, the same answer to the letter"),
        *([Column("repaired", True, "of the prompts that the clean model refuses, now answered")] if harmless else []),
        Column("p", True, "refusal against the clean model, McNemar, Holm over all rows of this kind"),
    ]
    cells: list[tuple[str, ...]] = []
    for row in rows:
        star = " *" if row.chosen else ""
        cells.append(
            (
                f"{name_of(result, row.method, row.setting)}{star}",
                count_text(row.refusal, unit=""),
                rate_text(row.refusal),
                rate_text(row.compliance),
                percent(row.incoherent.value),
                *(rate_text(row.attack.get(judge)) for judge in judges),
                MISSING if row.kept is None else rate_text(row.kept),
                MISSING if row.exact_match is None else percent(row.exact_match.value),
                *([MISSING if row.repaired is None else rate_text(row.repaired)] if harmless else []),
                p_text(row.p_clean),
            )
        )
    strong = [n for n, row in enumerate(rows) if row.method == MAIN and row.chosen]
    blocks: list[Block] = []
    chart = _strength_chart(result, prompts, kind)
    if chart is not None:
        blocks.append(chart)
    caption = "*: the strength that the tuning prompts chose. Brackets: 95% intervals."
    blocks.append(Table.of("Each method and strength", columns, cells, strong=strong, caption=caption))
    return Section(title, tuple(blocks))


def _strength_chart(result: CompareResult, prompts: Prompts, kind: Kind) -> Chart | None:
    """Refusal against strength; methods without a strength are level lines."""
    lines: list[charts.Series] = []
    rules: dict[str, float] = {}
    rows = [row for row in result.effects if row.prompts == prompts]
    clean = next((row for row in rows if row.kind == "none"), None)
    if clean is not None and clean.refusal.n:
        rules[CLEAN] = clean.refusal.value
    for method in result.labels:
        mine = [row for row in rows if row.kind == kind and row.method == method and row.refusal.n]
        if mine and (not mine[0].setting or "length" in mine[0].setting):
            rules[name_of(result, method)] = next((row for row in mine if row.chosen), mine[0]).refusal.value
        elif mine:
            points = [charts.Point.of(row.strength, row.refusal, chosen=row.chosen) for row in mine]
            lines.append(charts.Series(name_of(result, method), tuple(sorted(points))))
    if not any(len(line.points) > 1 for line in lines):
        return None
    suppressing = kind == "suppress"
    x = "scale factor c (1 changes nothing)" if suppressing else "value, in multiples of each feature's maximum"
    order = list(result.labels.values())
    return Chart(
        "Refusal against strength",
        lambda: charts.line_chart(lines, x_title=x, y_title="refused", order=order, reverse=suppressing, rules=rules),
        "Bands: 95% intervals. A ring marks the strength that the tuning prompts chose.",
    )


def _controls(result: CompareResult) -> Section:
    rows = [
        (
            name_of(result, row.control),
            f"{row.measure}, {row.prompts} prompts",
            percent(row.value),
            f"{percent(sum(row.sets) / len(row.sets))} ({percent(min(row.sets))} to {percent(max(row.sets))})",
            str(len(row.sets)),
            f"{percent(row.low)} to {percent(row.high)}",
            p_text(row.p),
        )
        for row in result.controls
    ]
    table = Table.of(
        "F* against random controls",
        [
            "control",
            "share",
            "> F*",
            Column("sets", True, "mean, lowest and highest set"),
            Column("drawn", True, "sets"),
            Column("one more draw", True, "95% prediction interval"),
            Column("p", True, "that one more draw is as extreme; at least 1 / (sets + 1)"),
        ],
        rows,
    )
    intro = (
        "Could F* be one more random draw? Random features are matched to F* in layer, firing rate and size of what "
        "they move; random pool features are as near to the direction as F*. For induction every feature is set to a "
        "multiple of its own maximum activation."
    )
    return Section("Controls", (table,) if rows else (), intro=intro)


def _comparisons(result: CompareResult) -> Section:
    blocks: list[Block] = []
    for judge in (COMPLIANCE, *result.harm_judges):
        rows = [row for row in result.comparisons if row.measure == judge]
        if not rows or not any(row.level is not None for row in rows):
            continue
        what = "complied with (outcome judge)" if judge == COMPLIANCE else f"attack success ({judge})"
        if chart := _tradeoff(result, judge):
            blocks.append(chart)
        for level in dict.fromkeys(row.level for row in rows):
            where = "at chosen strengths" if level is None else f"at ΔCE {short_number(level)} nats per token"
            blocks.append(_comparison_table(result, [row for row in rows if row.level == level], f"{what}, {where}"))
    intro = (
        "Paired on the same harmful test prompts. At a level of ΔCE each method's curve is read there: the most "
        "success that a strength of at most that ΔCE reaches. p is adjusted over each table (Holm)."
    )
    return Section("F* against other methods", tuple(blocks), intro=intro)


def _comparison_table(result: CompareResult, rows: Sequence[Comparison], title: str) -> Table:
    return Table.of(
        title[0].upper() + title[1:],
        ["F* against", "> F*", "> other", Column("difference", True, "points of prompts"), "> p adjusted", "finding"],
        [
            (
                name_of(result, row.other, row.other_setting),
                rate_text(row.value),
                rate_text(row.other_value),
                points_text(row.difference),
                p_text(None if finding(row) == "missing" else row.p_holm),
                _FINDINGS[finding(row)],
            )
            for row in rows
        ],
        strong=[n for n, row in enumerate(rows) if finding(row) in ("more", "fewer")],
    )


def _success(row: EffectRow, name: str) -> Estimate | None:
    return row.compliance if name == COMPLIANCE else row.attack.get(name)


def _tradeoff(result: CompareResult, judge: str) -> Chart | None:
    """Success against ΔCE: one line a method, from mild to strong."""
    lines: list[charts.Series] = []
    for method in result.labels:
        rows = [r for r in result.effects if (r.prompts, r.kind, r.method) == ("harmful", "suppress", method)]
        points: list[charts.Point] = []
        for row in sorted(rows, key=lambda row: -row.strength):
            rate = _success(row, judge)
            if row.side_effects is not None and rate is not None and rate.n:
                points.append(charts.Point.of(row.side_effects.ce_answers.value, rate, chosen=row.chosen))
        if points:
            lines.append(charts.Series(name_of(result, method), tuple(points)))
    if not lines:
        return None
    levels = sorted({row.level for row in result.comparisons if row.level is not None})
    title = "complied with" if judge == COMPLIANCE else "attack success"
    return Chart(
        f"{title[0].upper()}{title[1:]} against ΔCE",
        lambda: charts.scatter_lines(
            lines,
            x_title="ΔCE on own answers, nats per token",
            y_title=title,
            order=list(result.labels.values()),
            guides=levels,
        ),
        "One mark per strength; a ring marks the one that the tuning prompts chose.",
    )


def _side_effects(result: CompareResult) -> Section:
    rows = [row for row in result.effects if row.side_effects is not None and row.chosen]
    table = Table.of(
        "Side effects of suppression at chosen strengths",
        [
            "method",
            Column("ΔCE own answers", True, "nats per token, harmless prompts that the clean model answers"),
            "> n",
            Column("ΔCE text", True, "nats per token, plain text"),
            Column("KL", True, "first answer token, harmless prompts, nats"),
        ],
        [
            (
                name_of(result, row.method, row.setting),
                estimate_text(row.side_effects.ce_answers, 3),
                str(row.side_effects.ce_answers.n),
                estimate_text(row.side_effects.ce_text, 3),
                estimate_text(row.side_effects.kl, 3),
            )
            for row in rows
            if row.side_effects is not None
        ],
        strong=[n for n, row in enumerate(rows) if row.method == MAIN],
    )
    blocks: list[Block] = [table] if rows else []
    known = [(each, each.knowledge) for each in result.extras if each.knowledge is not None]
    if known:
        blocks.append(
            Table.of(
                "Asked whether test requests are harmful",
                [
                    "method",
                    Column("AUROC", True, "log-odds of yes, harmful against harmless"),
                    Column("harmful", True, "harmful requests called harmful"),
                    Column("harmless", True, "harmless requests called harmful"),
                ],
                [
                    (
                        name_of(result, each.method, each.setting),
                        estimate_text(found.auroc, 2),
                        rate_text(found.says_harmful),
                        rate_text(found.says_harmful_of_harmless),
                    )
                    for each, found in known
                ],
            )
        )
    if table := _capability(result):
        blocks.append(table)
    return Section("Side effects", tuple(blocks))


def _capability(result: CompareResult) -> Table | None:
    clean = {_task(row): row for each in result.extras if each.method == "none" for row in each.capability}
    lines = [(each, row) for each in result.extras for row in each.capability]
    if not lines:
        return None
    order = list(dict.fromkeys(_task(row) for _, row in lines))
    lines.sort(key=lambda line: order.index(_task(line[1])))
    return Table.of(
        "Capability",
        ["method", "task", "metric", "> value", Column("change", True, "to the clean model, paired"), "> n"],
        [
            (
                name_of(result, each.method, each.setting),
                row.task,
                row.metric,
                measure(row.value, 3),
                MISSING if each.method == "none" else estimate_text(_change(clean.get(_task(row)), row), 3),
                str(row.n),
            )
            for each, row in lines
        ],
    )


def _task(row: CapabilityRow) -> tuple[str, str, str]:
    return row.task, row.metric, row.filter


def _change(before: CapabilityRow | None, after: CapabilityRow) -> Estimate | None:
    if before is None or before.digest != after.digest:
        return None
    try:
        return capability_change(before, after)
    except InputError:
        # The same questions, but a number that is no mean over documents: its change has no interval of its own.
        return Estimate(value=after.value - before.value, low=-math.inf, high=math.inf, n=after.n)


# -- features, and how they were found -----------------------------------------------------------------------------


def _features(result: CompareResult) -> Section:
    table = Table.of(
        f"F*: {result.k} of {result.pool_size} features in the pool",
        [
            "layer:feature",
            Column("score", True, "estimated effect, logits per token"),
            Column("exact", True, "the same when it is really patched, on test prompts"),
            Column("cosine", True, "with the direction"),
            Column("fires, harmful", True, "share of scored tokens"),
            Column("fires, harmless", True, "share of scored tokens"),
            Column("maximum", True, "mean maximum activation on harmful prompts"),
        ],
        [
            (
                str(row.feature),
                measure(row.score, 3),
                measure(row.exact, 3),
                measure(row.cosine, 3),
                percent(row.rate_harmful),
                percent(row.rate_harmless),
                measure(row.max_harmful, 2),
            )
            for row in result.features
        ],
    )
    bars = [charts.Bar(str(row.feature), row.score, row.feature.layer, row.exact) for row in result.features]
    chart = Chart(
        "Effect on the metric",
        lambda: charts.bar_chart(bars, x_title="mean effect on the metric, logits per token", limit=_SHOWN_FEATURES),
        "Bars: estimated on selection prompts. Ticks: exactly patched on test prompts.",
    )
    sets = Table.of(
        "Sets of the methods",
        ["method", "> features", "features per layer", "> shared with F*"],
        [
            (
                name_of(result, name),
                str(len(each)),
                ", ".join(f"{len(indices)} in {layer}" for layer, indices in each.by_layer().items()),
                str(len({*each.features} & {*result.sets[MAIN].features})),
            )
            for name, each in result.sets.items()
        ],
        caption=f"A prompt's own set holds {percent(result.local_overlap)} of F* on average.",
    )
    return Section("Features", (chart, table, sets))


def _sizes(result: CompareResult) -> Section:
    if not result.sizes:
        return Section("Sizes of F*", ())
    table = Table.of(
        "Sizes of F*",
        ["> features", "> refused", "> complied", "> incoherent", Column("ΔCE", True, "own answers, nats per token")],
        [
            (
                str(row.size),
                rate_text(row.refusal),
                rate_text(row.compliance),
                percent(row.incoherent.value),
                estimate_text(row.ce_answers, 4),
            )
            for row in result.sizes
        ],
        strong=[n for n, row in enumerate(result.sizes) if row.size == result.k],
    )
    points = tuple(charts.Point.of(float(row.size), row.refusal, chosen=row.size == result.k) for row in result.sizes)
    chart = Chart(
        "Refusal of harmful test prompts against the size of F*",
        lambda: charts.line_chart(
            [charts.Series(name_of(result, MAIN), points)],
            x_title="features in F*",
            y_title="refused",
            x_scale="log",
        ),
    )
    return Section("Sizes of F*", (chart, table))


def _trials(result: CompareResult) -> Section:
    chosen = [trial for trial in result.trials if trial.chosen]
    if not chosen:
        return Section("Search for settings", ())
    counts = {method: sum(t.method == method for t in result.trials) for method in result.labels}
    table = Table.of(
        "Selected trade-offs",
        [
            "method",
            "> trials",
            "> layer",
            "> position",
            "> K0",
            "> K*",
            "> strength",
            Column("complied", True, "harmful tuning prompts"),
            Column("ΔCE", True, "own harmless answers, tuning prompts, nats per token"),
            Column("stable", True, "share of resamples of the tuning prompts that choose the same trial"),
        ],
        [
            (
                name_of(result, each.method),
                str(counts[each.method]),
                str(each.layer),
                measure(each.position, 0),
                str(each.k0),
                str(each.k),
                short_number(each.strength),
                rate_text(each.compliance),
                estimate_text(each.ce_answers, 4),
                percent(each.stability),
            )
            for each in chosen
        ],
    )
    lines = [
        charts.Series(
            name_of(result, method),
            tuple(
                charts.Point(max(0.0, t.ce_answers.value), t.compliance.value, chosen=t.chosen)
                for t in sorted(result.trials, key=lambda t: t.ce_answers.value)
                if t.method == method and t.front
            ),
            join="step",
        )
        for method in result.labels
        if counts[method]
    ]
    chart = Chart(
        "Pareto fronts of the trials, on tuning prompts",
        lambda: charts.scatter_lines(
            lines,
            x_title="ΔCE on own answers, nats per token",
            y_title="complied with",
            order=list(result.labels.values()),
        ),
    )
    intro = "Every method had the same number of different trials, measured on the tuning prompts alone."
    return Section("Search for settings", (chart, table), intro=intro)


def _direction(result: CompareResult) -> Section:
    info = result.direction
    chosen = info.chosen
    text = (
        f"Layer {chosen.layer}, position {measure(chosen.position, 0)} (token {token_text(info.token)}), "
        f"{chosen.form}; refusal log-odds {measure(chosen.bypass)} nats with it ablated on harmful prompts, "
        f"{measure(chosen.induce)} with it added on harmless ones; KL {measure(chosen.kl, 3)} nats on harmless prompts "
        f"when ablated. {info.note}"
    )
    maps: list[Block] = []
    for form in ("linear", "affine"):
        rows = [row for row in info.candidates if row.form == form]
        if len(rows) > 1:
            cells = [charts.Cell(r.layer, r.position, r.bypass, kept=r.kept, chosen=r == chosen) for r in rows]
            maps.append(
                Chart(
                    f"Candidates, {form}: refusal log-odds on harmful prompts when ablated (nats; lower is better)",
                    lambda cells=cells: charts.heatmap(cells, x_title="position", y_title="layer", low_is_strong=True),
                    "Cells without tint were dropped: KL above the threshold, no induction, or too late a layer.",
                )
            )
    return Section("Direction", (Text(text.strip()), *maps))


def _estimators(result: CompareResult) -> Section:
    table = Table.of(
        "Attribution against exact patching",
        [
            "method",
            "> steps",
            "> prompts",
            Column("Spearman", True, "over the pool, of means over prompts; the interval resamples prompts"),
            Column("within prompt", True, "mean rank correlation"),
            Column("gap", True, "completeness, logits"),
            Column("of the effect", True, "the gap divided by the metric's mean absolute change"),
        ],
        [
            (
                f"{row.method} (used)" if row.used else row.method,
                str(row.steps),
                str(row.n),
                estimate_text(row.spearman, 2),
                measure(row.spearman_prompt, 2),
                measure(row.gap, 2),
                percent(row.gap_relative),
            )
            for row in result.estimators
        ],
        strong=[n for n, row in enumerate(result.estimators) if row.used],
    )
    intro = "How well each method ranks the pool. All are asked the same metric on the same prompts."
    return Section("Estimators", (table,) if result.estimators else (), intro=intro)


def _prompts(result: CompareResult) -> Section:
    table = Table.of(
        "Prompts",
        ["split", "class", "> n", Column("refused", True, "by the clean model"), "> complied", "> used"],
        [
            (row.split, row.label, str(row.n), str(row.refused), str(row.complied), str(row.used))
            for row in result.splits
        ],
        caption="Features are chosen on prompts that the clean model treats as labelled; strengths and effects are "
        "measured on all prompts.",
    )
    tokens = ", ".join(f"{token_text(t.text)!r} ({percent(t.share)})" for t in result.refusal_tokens)
    facts = (
        f"Refusal tokens (share of its refusals that begin with each): {tokens}. Selection prompts without attribution "
        f"signal: {percent(result.without_signal)}."
    )
    made = "; ".join(f"{name}: {new:,} computed, {old:,} found" for name, (new, old) in result.counters.items())
    blocks: list[Block] = [table, Text(facts)]
    if made:
        blocks.append(Text(f"In this process: {made}.", "note"))
    blocks += [Text(f"{judge} used: {used}", "note") for judge, used in result.usage.items()]
    return Section("Prompts", tuple(blocks))


def _answers(result: CompareResult) -> Section:
    blocks: list[Block] = []
    for label in ("harmful", "harmless"):
        groups: dict[str, list[tuple[str, str]]] = {}
        texts: dict[str, str] = {}
        for sample in result.samples:
            if sample.label == label:
                texts[sample.prompt_id] = sample.prompt
                outcome = "unscored" if sample.outcome is None else sample.outcome.value.replace("_", " ")
                tag = f"{name_of(result, sample.method, sample.setting)} · {outcome}"
                groups.setdefault(sample.prompt_id, []).append((tag, sample.text))
        transcripts = tuple(Transcript(texts[key], tuple(answers)) for key, answers in groups.items())
        if transcripts:
            blocks.append(Transcripts(f"Answers to {label} test prompts", transcripts, harmful=label == "harmful"))
    return Section("Answers", tuple(blocks))


__all__ = ["compare_sections", "compared", "finding", "headline", "name_of"]
