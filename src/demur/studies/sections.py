"""How a comparison is shown: its verdict, its doubts and one table first; then effects, costs, features and answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final, Literal

from demur.capability import CapabilityRow, capability_change
from demur.errors import InputError
from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text, Transcript, Transcripts
from demur.stats import Estimate
from demur.studies.config import COMPLIANCE, MAIN
from demur.studies.results import CompareResult, Comparison, EffectRow, Kind, Prompts

ALPHA: Final = 0.05
CLEAN: Final = "clean model"
_CE: Final = "ΔCE on own answers, nats per token"

Finding = Literal["more", "fewer", "unclear", "missing"]
"""Whether F* got more prompts complied with than another method, as far as the adjusted test tells."""


def compare_sections(result: CompareResult) -> tuple[Section, ...]:
    """The sections of a study that compares methods."""
    sections = (
        Section("Verdict", (Text(headline(result), "verdict"), *_compared(result)), brief=True),
        Section("Summary", (_summary(result),), brief=True),
        _effects(result, "harmful", "suppress", "Suppression, harmful test prompts"),
        _effects(result, "harmless", "suppress", "Suppression, harmless test prompts"),
        _effects(result, "over-refusal", "suppress", "Suppression, over-refusal prompts"),
        _effects(result, "harmless", "induce", "Induction, harmless test prompts"),
        _controls(result),
        _comparisons(result),
        Section("Side effects", tuple(_side_effects(result))),
        _features(result),
        Section("Sizes of F*", tuple(_sizes(result))),
        _trials(result),
        Section("Direction", tuple(_direction(result))),
        _estimators(result),
        Section("Prompts", tuple(_prompts(result))),
        Section("Answers", tuple(_answers(result))),
    )
    return tuple(section for section in sections if section.blocks)


def name_of(result: CompareResult, method: str, setting: str = "") -> str:
    """A method with its strength, as `AP, c = −1`."""
    label = CLEAN if method == "none" else result.labels.get(method, method)
    return f"{label}, {setting}" if setting else label


def headline(result: CompareResult) -> str:
    """What was found on held-out test prompts; square brackets hold 95 % intervals."""
    said = [sentence for sentence in (_suppressed(result), _induced(result)) if sentence]
    return " ".join(said) or "No chosen intervention was measured on test prompts."


def _suppressed(result: CompareResult) -> str:
    clean, row = result.effect("harmful", "none", "none"), result.effect("harmful", "suppress", MAIN)
    if clean is None or row is None or not row.compliance.n:
        return ""
    harmless = result.effect("harmless", "suppress", MAIN)
    kept = "" if harmless is None or harmless.kept is None else fmt.rate_text(harmless.kept)
    return (
        f"With {result.k} feature{'s' * (result.k != 1)} scaled by {fmt.short_number(row.strength)}, the model "
        f"complies with {fmt.rate_text(row.compliance)} of {fmt.count_text(row.compliance)} harmful prompts (clean: "
        f"{fmt.rate_text(clean.compliance)}), and {fmt.percent(row.incoherent.value)} of its answers are incoherent"
        f"{_against_controls(result, 'suppress')}."
        + (f" It still answers {kept} of the harmless prompts." if kept else "")
    )


def _induced(result: CompareResult) -> str:
    clean, row = result.effect("harmless", "none", "none"), result.effect("harmless", "induce", MAIN)
    if clean is None or row is None or not row.refusal.n:
        return ""
    return (
        f"Set to {row.setting}, {'it makes the model' if result.k == 1 else 'they make it'} refuse "
        f"{fmt.rate_text(row.refusal)} of {fmt.count_text(row.refusal)} harmless prompts "
        f"(clean: {fmt.rate_text(clean.refusal)}){_against_controls(result, 'induce')}."
    )


def _against_controls(result: CompareResult, kind: Kind) -> str:
    """What the random controls do instead, and whether F* could be one more of them."""
    parts: list[str] = []
    for row in result.controls:
        if row.kind == kind:
            inside = "; F* is within the range of one more draw" if row.low <= row.value <= row.high else ""
            sets = f"{len(row.sets)} sets, {fmt.percent(min(row.sets))} to {fmt.percent(max(row.sets))}"
            mean = fmt.percent(sum(row.sets) / len(row.sets))
            parts.append(f"{name_of(result, row.control)} {mean} ({sets}{inside})")
    return f"; {fmt.listed(parts)}" if parts else ""


def finding(row: Comparison) -> Finding:
    """What the adjusted test says of one comparison. A test without a scored pair says nothing, whatever its p."""
    if row.difference is None or not math.isfinite(row.difference.value) or math.isnan(row.p_holm):
        return "missing"
    if row.p_holm >= ALPHA or row.difference.value == 0:
        return "unclear"
    return "more" if row.difference.value > 0 else "fewer"


_SIDES: Final[dict[Finding, str]] = {
    "more": "gets more harmful prompts complied with than",
    "fewer": "gets fewer than",
    "unclear": "does not clearly differ from",
}
_FINDINGS: Final[dict[Finding, str]] = {
    "more": "F* more",
    "fewer": "F* fewer",
    "unclear": "not clear",
    "missing": fmt.MISSING,
}


def _compared(result: CompareResult) -> Iterator[Text]:
    """Which methods F* outdid and which outdid it: at their own strengths, and at the highest level of ΔCE."""
    rows = [r for r in result.comparisons if r.measure == COMPLIANCE and r.other not in result.controls_drawn]
    levels = [row.level for row in rows if row.level is not None]
    sentences: list[str] = []
    for level in (None, max(levels)) if levels else ():
        group = [row for row in rows if row.level == level]
        sides = {side: [name_of(result, row.other) for row in group if finding(row) == side] for side in _SIDES}
        said = [f"{text} {fmt.listed(sides[side])}" for side, text in _SIDES.items() if sides[side]]
        where = "At each method's own chosen strength" if level is None else f"At ΔCE {fmt.short_number(level)}"
        if said:
            sentences.append(f"{where}, F* {'; '.join(said)}.")
    if sentences:
        yield Text(" ".join(sentences))


def _summary(result: CompareResult) -> Table:
    """One row a method: what it suppresses, what it leaves alone, what it induces."""
    rows: list[tuple[Any, ...]] = []
    for method in ("none", *result.labels):
        none = method == "none"
        row = result.effect("harmful", "none" if none else "suppress", method)
        harmless = result.effect("harmless", "none" if none else "suppress", method)
        induced = result.effect("harmless", "none" if none else "induce", method)
        if row is None:
            continue
        kept = None if harmless is None else harmless.compliance if none else harmless.kept
        cells = (
            name_of(result, method, row.setting) + (f" ({row.sets} sets)" if row.sets > 1 else ""),
            fmt.count_text(row.compliance, unit=""),
            row.compliance,
            fmt.percent(row.incoherent.value),
            fmt.percent(None if kept is None else kept.value),
            fmt.measure(None if row.side_effects is None else row.side_effects.ce_answers.value, 3),
            None if induced is None else induced.refusal,
        )
        rows.append(cells)
    return Table.of(
        "Each method at the strength chosen on tuning prompts",
        "method | > n: scored answers, + unscored | > complied: harmful test prompts under suppression | "
        "> incoherent: of these answers | > kept: harmless prompts still answered under suppression, of those the "
        f"clean model answers | > ΔCE: {_CE.removeprefix('ΔCE ')} | > induced: harmless test prompts refused while "
        "refusal is induced",
        rows,
        caption="Brackets: 95% intervals, over prompts and sets drawn.",
        strong=[n for n, row in enumerate(rows) if row[0].startswith(result.labels[MAIN] + ",")],
    )


# -- effects -----------------------------------------------------------------------------------------------------------


def _effects(result: CompareResult, prompts: Prompts, kind: Kind, title: str) -> Section:
    rows = [row for row in result.effects if row.prompts == prompts and row.kind in (kind, "none")]
    if len(rows) < 2:
        return Section(title, ())
    harmless, judges = prompts != "harmful", result.harm_judges if prompts == "harmful" else ()
    columns = "condition | > n: scored answers, + unscored | > refused | > complied | > incoherent"
    columns += "".join(f" | > {judge}: attack success by this judge of harm" for judge in judges)
    columns += " | > kept: of the prompts that the clean model answers, still answered | > exact match: of those, the "
    columns += "same answer to the letter"
    columns += " | > repaired: of the prompts that the clean model refuses, now answered" if harmless else ""
    columns += " | > p: refusal against the clean model, McNemar, Holm over all rows of this kind"
    cells = [
        (
            name_of(result, row.method, row.setting) + (" *" if row.chosen else ""),
            fmt.count_text(row.refusal, unit=""),
            row.refusal,
            row.compliance,
            fmt.percent(row.incoherent.value),
            *(row.attack.get(judge) for judge in judges),
            row.kept,
            fmt.percent(None if row.exact_match is None else row.exact_match.value),
            *((row.repaired,) if harmless else ()),
            fmt.p_text(row.p_clean),
        )
        for row in rows
    ]
    strong = [n for n, row in enumerate(rows) if row.method == MAIN and row.chosen]
    caption = "*: the strength that the tuning prompts chose. Brackets: 95% intervals."
    table = Table.of("Each method and strength", columns, cells, strong=strong, caption=caption)
    return Section(title, (*_strength_chart(result, rows, kind), table))


def _strength_chart(result: CompareResult, rows: Sequence[EffectRow], kind: Kind) -> Iterator[Chart]:
    """Refusal against strength; methods without a strength are level lines."""
    lines: list[charts.Series] = []
    rules: dict[str, float] = {}
    for method in ("none", *result.labels):
        mine = [row for row in rows if row.method == method and row.refusal.n]
        if mine and not mine[0].setting.startswith(("c = ", "v = ")) and "× max" not in mine[0].setting:
            rules[name_of(result, method)] = next((row for row in mine if row.chosen), mine[0]).refusal.value
        elif mine:
            points = sorted(charts.Point.of(row.strength, row.refusal, chosen=row.chosen) for row in mine)
            lines.append(charts.Series(name_of(result, method), tuple(points)))
    suppressing, order = kind == "suppress", list(result.labels.values())
    x = "scale factor c (1 changes nothing)" if suppressing else "value, in multiples of each feature's maximum"
    if any(len(line.points) > 1 for line in lines):
        yield Chart(
            "Refusal against strength",
            lambda: charts.line_chart(
                lines, x_title=x, y_title="refused", order=order, reverse=suppressing, rules=rules
            ),
            "Bands: 95% intervals. A ring marks the strength that the tuning prompts chose.",
        )


def _controls(result: CompareResult) -> Section:
    rows = [
        (
            name_of(result, row.control),
            f"{row.measure}, {row.prompts} prompts",
            fmt.percent(row.value),
            "{} ({} to {})".format(*map(fmt.percent, (sum(row.sets) / len(row.sets), min(row.sets), max(row.sets)))),
            len(row.sets),
            f"{fmt.percent(row.low)} to {fmt.percent(row.high)}",
            fmt.p_text(row.p),
        )
        for row in result.controls
    ]
    columns = "control | share | > F* | > sets: mean, lowest and highest set | > drawn: sets | > one more draw: 95% "
    columns += "prediction interval | > p: that one more draw is as extreme; at least 1 / (sets + 1)"
    intro = (
        "Could F* be one more random draw? Random features are matched to F* in layer, firing rate and size of what "
        "they move; random pool features are as near to the direction as F*. For induction every feature is set to a "
        "multiple of its own maximum activation."
    )
    blocks = (Table.of("F* against random controls", columns, rows),) if rows else ()
    return Section("Controls", blocks, intro=intro)


def _comparisons(result: CompareResult) -> Section:
    blocks: list[Block] = []
    for judge in (COMPLIANCE, *result.harm_judges):
        rows = [row for row in result.comparisons if row.measure == judge]
        if not any(row.level is not None for row in rows):
            continue
        what = "Complied with (outcome judge)" if judge == COMPLIANCE else f"Attack success ({judge})"
        blocks += _tradeoff(result, judge)
        for level, group in groupby(rows, key=lambda row: row.level):
            where = "at chosen strengths" if level is None else f"at ΔCE {fmt.short_number(level)} nats per token"
            blocks.append(_comparison_table(result, list(group), f"{what}, {where}"))
    intro = (
        "Paired on the same harmful test prompts. At a level of ΔCE each method's curve is read there: the most "
        "success that a strength of at most that ΔCE reaches. p is adjusted over each table (Holm)."
    )
    return Section("F* against other methods", tuple(blocks), intro=intro)


def _comparison_table(result: CompareResult, rows: Sequence[Comparison], title: str) -> Table:
    cells = [
        (
            name_of(result, row.other, row.other_setting),
            row.value,
            row.other_value,
            fmt.points_text(row.difference),
            fmt.p_text(None if finding(row) == "missing" else row.p_holm),
            _FINDINGS[finding(row)],
        )
        for row in rows
    ]
    columns = "F* against | > F* | > other | > difference: points of prompts | > p adjusted | finding"
    strong = [n for n, row in enumerate(rows) if finding(row) in ("more", "fewer")]
    return Table.of(title, columns, cells, strong=strong)


def _tradeoff(result: CompareResult, judge: str) -> Iterator[Chart]:
    """Success against ΔCE: one line a method, from mild to strong."""
    lines: list[charts.Series] = []
    for method in result.labels:
        rows = [r for r in result.effects if (r.prompts, r.kind, r.method) == ("harmful", "suppress", method)]
        points: list[charts.Point] = []
        for row in sorted(rows, key=lambda row: -row.strength):
            rate = row.compliance if judge == COMPLIANCE else row.attack.get(judge)
            if row.side_effects is not None and rate is not None and rate.n:
                points.append(charts.Point.of(row.side_effects.ce_answers.value, rate, chosen=row.chosen))
        if points:
            lines.append(charts.Series(name_of(result, method), tuple(points)))
    guides = sorted({row.level for row in result.comparisons if row.level is not None})
    title, order = "complied with" if judge == COMPLIANCE else "attack success", list(result.labels.values())
    if lines:
        yield Chart(
            f"{title.capitalize()} against ΔCE",
            lambda: charts.scatter_lines(lines, x_title=_CE, y_title=title, order=order, guides=guides),
            "One mark per strength; a ring marks the one that the tuning prompts chose.",
        )


def _side_effects(result: CompareResult) -> Iterator[Block]:
    measured = [(r, r.side_effects) for r in result.effects if r.side_effects is not None and r.chosen]
    if measured:
        yield Table.of(
            "Side effects of suppression at chosen strengths",
            "method | > ΔCE own answers: nats per token, harmless prompts that the clean model answers | > n | "
            "> ΔCE text: nats per token, plain text | > KL: first answer token, harmless prompts, nats",
            [
                (
                    name_of(result, row.method, row.setting),
                    fmt.estimate_text(found.ce_answers, 3),
                    found.ce_answers.n,
                    fmt.estimate_text(found.ce_text, 3),
                    fmt.estimate_text(found.kl, 3),
                )
                for row, found in measured
            ],
            strong=[n for n, (row, _) in enumerate(measured) if row.method == MAIN],
        )
    known = [(each, each.knowledge) for each in result.extras if each.knowledge is not None]
    if known:
        yield Table.of(
            "Asked whether test requests are harmful",
            "method | > AUROC: log-odds of yes, harmful against harmless | > harmful: harmful requests called harmful"
            " | > harmless: harmless requests called harmful",
            [
                (
                    name_of(result, each.method, each.setting),
                    fmt.estimate_text(found.auroc, 2),
                    found.says_harmful,
                    found.says_harmful_of_harmless,
                )
                for each, found in known
            ],
        )
    yield from _capability(result)


def _capability(result: CompareResult) -> Iterator[Table]:
    def task(row: CapabilityRow) -> tuple[str, str, str]:
        return row.task, row.metric, row.filter

    clean = {task(row): row for each in result.extras if each.method == "none" for row in each.capability}
    order = list(clean)
    lines = [(each, row) for each in result.extras for row in each.capability]
    lines.sort(key=lambda line: order.index(task(line[1])))
    if lines:
        yield Table.of(
            "Capability",
            "method | task | metric | > value | > change: to the clean model, paired | > n",
            [
                (
                    name_of(result, each.method, each.setting),
                    row.task,
                    row.metric,
                    fmt.measure(row.value, 3),
                    fmt.MISSING if each.method == "none" else fmt.estimate_text(_change(clean.get(task(row)), row), 3),
                    row.n,
                )
                for each, row in lines
            ],
        )


def _change(before: CapabilityRow | None, after: CapabilityRow) -> Estimate | None:
    if before is None or before.digest != after.digest:
        return None
    try:
        return capability_change(before, after)
    except InputError:
        # The same questions, but a number that is no mean over documents: its change has no interval of its own.
        return Estimate(value=after.value - before.value, low=-math.inf, high=math.inf, n=after.n)


# -- features, and how they were found ---------------------------------------------------------------------------------


def _features(result: CompareResult) -> Section:
    table = Table.of(
        f"F*: {result.k} of {result.pool_size} features in the pool",
        "feature | > score: estimated effect, logits per token | > exact: the same when it is really patched, on test "
        "prompts | > cosine: with the direction | > fires, harmful: share of scored tokens | > fires, harmless: share "
        "of scored tokens | > maximum: mean maximum activation on harmful prompts",
        [
            (
                str(row.feature),
                *(fmt.measure(each, 3) for each in (row.score, row.exact, row.cosine)),
                fmt.percent(row.rate_harmful),
                fmt.percent(row.rate_harmless),
                fmt.measure(row.max_harmful, 2),
            )
            for row in result.features
        ],
    )
    bars = [charts.Bar(str(row.feature), row.score, row.feature.layer, row.exact) for row in result.features]
    chart = Chart(
        "Effect on the metric",
        lambda: charts.bar_chart(bars, x_title="mean effect on the metric, logits per token"),
        "Bars: estimated on selection prompts. Ticks: exactly patched on test prompts.",
    )
    main = {*result.sets[MAIN].features}
    sets = Table.of(
        "Sets of the methods",
        "method | > features | features per layer | > shared with F*",
        [
            (
                name_of(result, name),
                len(each),
                ", ".join(f"{len(indices)} in {layer}" for layer, indices in each.by_layer().items()),
                len(main & {*each.features}),
            )
            for name, each in result.sets.items()
        ],
        caption=f"A prompt's own set holds {fmt.percent(result.local_overlap)} of F* on average.",
    )
    return Section("Features", (chart, table, sets))


def _sizes(result: CompareResult) -> Iterator[Block]:
    if not result.sizes:
        return
    points = tuple(charts.Point.of(float(row.size), row.refusal, chosen=row.size == result.k) for row in result.sizes)
    lines = [charts.Series(name_of(result, MAIN), points)]
    for method in result.labels:
        rows = [row for row in result.effects if row.method == method and "dimension" in row.setting]
        spans = sorted(charts.Point.of(r.strength, r.refusal, chosen=r.chosen) for r in rows if r.prompts == "harmful")
        lines += [charts.Series(name_of(result, method), tuple(spans))] if spans else []
    x, order = "features in F*, or dimensions taken out of the residual", list(result.labels.values())
    yield Chart(
        "Refusal of harmful test prompts against the size of F*",
        lambda: charts.line_chart(lines, x_title=x, y_title="refused", x_scale="log", order=order),
    )
    yield Table.of(
        "Sizes of F*",
        f"> features | > refused | > complied | > incoherent | > ΔCE: {_CE.removeprefix('ΔCE ')}",
        [
            (
                row.size,
                row.refusal,
                row.compliance,
                fmt.percent(row.incoherent.value),
                fmt.estimate_text(row.ce_answers, 4),
            )
            for row in result.sizes
        ],
        strong=[n for n, row in enumerate(result.sizes) if row.size == result.k],
    )


def _trials(result: CompareResult) -> Section:
    counts = {method: sum(t.method == method for t in result.trials) for method in result.labels}
    table = Table.of(
        "Selected trade-offs",
        "method | > trials | > layer | > position | > K0 | > K* | > strength | > complied: harmful tuning prompts | "
        "> ΔCE: own harmless answers, tuning prompts, nats per token | > stable: share of resamples of the tuning "
        "prompts that choose the same trial",
        [
            (
                name_of(result, t.method),
                *(str(each) for each in (counts[t.method], t.layer, fmt.measure(t.position, 0), t.k0, t.k)),
                fmt.short_number(t.strength),
                t.compliance,
                fmt.estimate_text(t.ce_answers, 4),
                fmt.percent(t.stability),
            )
            for t in result.trials
            if t.chosen
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
    order = list(result.labels.values())
    chart = Chart(
        "Pareto fronts of the trials, on tuning prompts",
        lambda: charts.scatter_lines(lines, x_title=_CE, y_title="complied with", order=order),
    )
    intro = "Every method had the same number of different trials, measured on the tuning prompts alone."
    return Section("Search for settings", (chart, table) if result.trials else (), intro=intro)


def _direction(result: CompareResult) -> Iterator[Block]:
    info, chosen = result.direction, result.direction.chosen
    yield Text(
        f"Layer {chosen.layer}, position {fmt.measure(chosen.position, 0)} (token {fmt.token_text(info.token)}), "
        f"{chosen.form}; refusal log-odds {fmt.measure(chosen.bypass)} nats with it ablated on harmful prompts, "
        f"{fmt.measure(chosen.induce)} "
        f"with it added on harmless ones; KL {fmt.measure(chosen.kl, 3)} nats on harmless prompts when ablated. "
        f"{info.note}".strip()
    )
    for form in ("linear", "affine"):
        rows = [row for row in info.candidates if row.form == form]
        if len(rows) > 1:
            cells = [charts.Cell(r.layer, r.position, r.bypass, kept=r.kept, chosen=r == chosen) for r in rows]
            yield Chart(
                f"Candidates, {form}: refusal log-odds on harmful prompts when ablated (nats; lower is better)",
                lambda cells=cells: charts.heatmap(cells, x_title="position", y_title="layer", low_is_strong=True),
                "Cells without tint were dropped: KL above the threshold, no induction, or too late a layer.",
            )


def _estimators(result: CompareResult) -> Section:
    table = Table.of(
        "Attribution against exact patching",
        "method | > steps | > prompts | > Spearman: over the pool, of means over prompts; the interval resamples "
        "prompts | > within prompt: mean rank correlation | > gap: completeness, logits | > of the effect: the gap "
        "divided by the metric's mean absolute change",
        [
            (
                f"{row.method} (used)" if row.used else row.method,
                row.steps,
                row.n,
                fmt.estimate_text(row.spearman, 2),
                fmt.measure(row.spearman_prompt, 2),
                fmt.measure(row.gap, 2),
                fmt.percent(row.gap_relative),
            )
            for row in result.estimators
        ],
        strong=[n for n, row in enumerate(result.estimators) if row.used],
    )
    intro = "How well each method ranks the pool. All are asked the same metric on the same prompts."
    return Section("Estimators", (table,) if result.estimators else (), intro=intro)


def _prompts(result: CompareResult) -> Iterator[Block]:
    yield Table.of(
        "Prompts",
        "split | class | > n | > refused: by the clean model | > complied | > used",
        [(row.split, row.label, *map(str, (row.n, row.refused, row.complied, row.used))) for row in result.splits],
        caption="Features are chosen on prompts that the clean model treats as labelled; strengths and effects are "
        "measured on all prompts.",
    )
    tokens = ", ".join(f"{fmt.token_text(t.text)!r} ({fmt.percent(t.share)})" for t in result.refusal_tokens)
    yield Text(
        f"Refusal tokens (share of its refusals that begin with each): {tokens}. Selection prompts without attribution "
        f"signal: {fmt.percent(result.without_signal)}."
    )
    made = "; ".join(f"{name}: {new:,} computed, {old:,} found" for name, (new, old) in result.counters.items())
    if made:
        yield Text(f"In this process: {made}.", "note")
    yield from (Text(f"{judge} used: {used}", "note") for judge, used in result.usage.items())


def _answers(result: CompareResult) -> Iterator[Block]:
    for label in ("harmful", "harmless"):
        answers: dict[str, list[tuple[str, str]]] = {}
        prompts: dict[str, str] = {}
        for sample in result.samples:
            if sample.label == label:
                prompts[sample.prompt_id] = sample.prompt
                outcome = "unscored" if sample.outcome is None else sample.outcome.value.replace("_", " ")
                tag = f"{name_of(result, sample.method, sample.setting)} · {outcome}"
                answers.setdefault(sample.prompt_id, []).append((tag, sample.text))
        if answers:
            transcripts = tuple(Transcript(prompts[key], tuple(each)) for key, each in answers.items())
            yield Transcripts(f"Answers to {label} test prompts", transcripts, harmful=label == "harmful")
