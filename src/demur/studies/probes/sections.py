"""How probes are shown: what is caught at one false alarm in a hundred first; then where that breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Column, Section, Table, Text
from demur.studies.probes.results import (
    ALL,
    DENSE,
    FPRS,
    ProbesResult,
    RankRow,
    SetRow,
    Target,
)

ALPHA = 0.05


def probe_sections(result: ProbesResult) -> tuple[Section, ...]:
    """The sections of the study `probes`."""
    sections = (
        Section("Verdict", (*_verdict(result), *_doubts(result)), brief=True),
        *_caught(result),
        _benign(result),
        _held_out(result),
        _long(result),
        _two_axes(result),
        _streaming(result),
        _cascade(result),
        _refusal(result),
        _calibration(result),
        _paper(result),
        Section("Probes and prompts", tuple(_details(result))),
    )
    return tuple(section for section in sections if section.blocks)


def _representations(result: ProbesResult, target: Target = "harmful") -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.representation for row in result.probes if row.target == target))


def _sets(result: ProbesResult, *kinds: str) -> tuple[SetRow, ...]:
    return tuple(row for row in result.sets if row.kind in kinds)


def _strong(result: ProbesResult, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(n for n, name in enumerate(names) if name == result.winner)


# -- verdict -------------------------------------------------------------------------------------------------------


def _verdict(result: ProbesResult) -> Iterator[Text]:
    matched = {row.representation: row for row in result.matched}
    less = [row.representation for row in result.matched if row.p_holm < ALPHA]
    rest = [row.representation for row in result.matched if row.difference is not None and row.p_holm >= ALPHA]
    said = [
        f"At equal false alarms, 1 % of benign prompts plain and in the same wrappers, {result.best} flags "
        f"{fmt.rate_text(matched[result.best].tpr)} of all adversarial harmful prompts."
    ]
    if less:
        said.append(f"That is significantly more than {fmt.listed(less)}.")
    if rest:
        said.append(f"It is not significantly more than {fmt.listed(rest)}.")
    own = matched[result.winner]
    said.append(
        f"The validation prompts, which hold no attack, chose {result.winner} for the guard. At its threshold, set "
        f"before, it flags {fmt.rate_text(result.flag(result.winner, ALL))} of the attacks, "
        f"{fmt.rate_text(result.flag(result.winner, 'plain benign'))} of plain benign prompts and "
        f"{fmt.rate_text(own.alarms)} of benign prompts once wrapped ones count."
    )
    yield Text(" ".join(said), "verdict")


def _doubts(result: ProbesResult) -> Iterator[Text]:
    for row in _sets(result, "plain", "wrapped", "benign", "over-refusal", "long"):
        if row.positive:
            continue
        share = result.flag(result.winner, row.name)
        if share is not None and share.n and share.low > 3 * FPRS[0]:
            yield Text(
                f"the guard's threshold was set for 1 % false alarms, and flags {fmt.rate_text(share)} of the set "
                f"“{row.name}”: on prompts like these it raises more",
                "warning",
            )


# -- tables --------------------------------------------------------------------------------------------------------


def _share_table(
    result: ProbesResult, title: str, columns: Sequence[str], fpr: float, caption: str, folded: bool = False
) -> Table:
    names = _representations(result)
    rows = [[name, *(result.flag(name, column, fpr) for column in columns)] for name in names]
    heads = [Column("representation"), *(Column(column, numeric=True) for column in columns)]
    return Table.of(title, heads, rows, caption=caption, strong=_strong(result, names), folded=folded)


def _caught(result: ProbesResult) -> Iterator[Section]:
    attacks = [row.name for row in _sets(result, "attack")]
    columns = ["plain harmful", *attacks, *([ALL] if len(attacks) > 1 else [])]
    caption = (
        f"Share flagged, with Wilson's 95 % interval. Probes were fitted on plain prompts; {result.negatives} benign "
        "validation prompts set the thresholds; no attack chose anything. In bold the guard's probe."
    )
    tables = [
        _share_table(result, f"Harmful prompts flagged at {fmt.percent(fpr)} FPR", columns, fpr, caption, fpr != 0.01)
        for fpr in FPRS
    ]
    yield Section(
        "Is the request harmful?",
        (tables[0],),
        brief=True,
        intro="Positives are harmful by the data's labels, whether the model refuses them or not.",
    )
    yield Section("Which representation wins?", (_matched(result), tables[1], *_ranking(result, "harmful")))


def _matched(result: ProbesResult) -> Table:
    rows = [
        [row.representation, row.tpr, fmt.points_text(row.difference), fmt.p_text(row.p_holm), row.alarms]
        for row in result.matched
    ]
    names = [row.representation for row in result.matched]
    return Table.of(
        "All attacks at equal false alarms",
        "representation | > flagged: threshold moved to 1 % of the benign test prompts, plain and wrapped | > points "
        "against the best | > p: resampled prompts, adjusted by Holm | > false alarms before: on the same benign "
        "prompts at the threshold that was set on validation prompts",
        rows,
        caption="At thresholds that were set before, a representation may catch more because it flags more of "
        "everything: read its last column. Here all of them raise the same alarms.",
        strong=_strong(result, names),
    )


def _ranking(result: ProbesResult, target: Target) -> Iterator[Block]:
    families = tuple(dict.fromkeys(row.prompts for row in result.ranks if row.target == target))
    rows = {(row.representation, row.prompts): row for row in result.ranks if row.target == target}
    names = _representations(result, target)

    def cell(name: str, family: str) -> str:
        row = rows.get((name, family))
        return fmt.MISSING if row is None else fmt.estimate_text(row.auroc)

    yield Table.of(
        "AUROC",
        [Column("representation"), *(Column(family, numeric=True) for family in families)],
        [[name, *(cell(name, family) for family in families)] for name in names],
        caption="Ranking alone, at no threshold; 95 % intervals over prompts.",
        strong=_strong(result, names) if target == "harmful" else (),
        folded=target == "harmful",
    )

    def told(row: RankRow) -> list[str]:
        return [row.representation, row.prompts, fmt.measure(row.f1), fmt.measure(row.ece),
                fmt.estimate_text(row.difference), fmt.p_text(row.p), fmt.p_text(row.p_holm)]  # fmt: skip

    yield Table.of(
        f"F1, calibration, and AUROC against the {DENSE}",
        "representation | prompts | > F1: at 1 % FPR | > ECE: expected calibration error | > AUROC difference | "
        "> p: DeLong | > p (Holm)",
        [told(row) for row in rows.values()],
        folded=True,
    )


def _benign(result: ProbesResult) -> Section:
    columns = [row.name for row in _sets(result, "plain", "wrapped", "over-refusal", "benign") if not row.positive]
    table = _share_table(
        result,
        "Benign prompts flagged at 1% FPR",
        columns,
        0.01,
        "The false-positive rate that really came out. The threshold knows plain benign prompts only; every column "
        "above its 1 % is a kind of benign prompt on which a guard would raise more alarms than promised.",
    )
    return Section("False alarms", (table,))


def _held_out(result: ProbesResult) -> Section:
    if not result.held_out:
        return Section("A family held out", ())
    rows = [
        [row.family, row.representation, row.plain, row.others, fmt.points_text(row.difference), row.plain_alarms,
         row.others_alarms]
        for row in result.held_out
    ]  # fmt: skip
    table = Table.of(
        "Trained on plain prompts, and on all other families too",
        "family | representation | > caught, plain training | > caught, other families too | > difference | "
        "> false alarms, plain training | > false alarms, other families too",
        rows,
        caption="TPR at 1 % FPR on the family that no training prompt is of, on requests that none holds.",
    )
    return Section("A family held out", (table,))


def _long(result: ProbesResult) -> Section:
    rows = _sets(result, "long")
    if not rows:
        return Section("Long inputs", ())
    table = _share_table(
        result,
        "Flagged at 1% FPR in long benign text",
        ["plain harmful", *(row.name for row in rows)],
        0.01,
        "Columns two to four hold a harmful request in long text: what they lack against “plain harmful” is lost to "
        "length. The last two hold none, and should not be flagged.",
    )
    return Section("Long inputs", (table,))


def _two_axes(result: ProbesResult) -> Section:
    rows = [[r.group, r.harmless, r.refused, r.jailbreak, r.over_refusal] for r in result.verdicts]
    table = Table.of(
        "Verdicts",
        "prompts | > harmless | > refused: harmful, and will be refused | > jailbreak: harmful, and will not be "
        "refused | > over-refusal: harmless, and will be refused",
        rows,
        caption="Harmful at the 1 % threshold; refusing where P(refuse) is above that of all but 5 % of "
        "the validation prompts that the model refused. What stays below is refused less surely than plain requests.",
    )
    won = next((row for row in result.verdicts if row.group == "attacks that succeeded"), None)
    if won is None:
        return Section("Two axes: succeeded jailbreaks", (Text("No attack succeeded.", "note"), table))
    text = (
        f"“Harmful and not refusing” is the verdict on {fmt.rate_text(won.jailbreak)} of the attacks that succeeded. "
        f"P(harmful) · (1 − P(refuse)) ranks them above all other prompts with an AUROC of "
        f"{fmt.estimate_text(result.jailbreak_auroc)}."
    )
    return Section("Two axes: succeeded jailbreaks", (Text(text), table))


def _streaming(result: ProbesResult) -> Section:
    row = result.stream
    if row is None:
        return Section("Streaming", ())
    table = Table.of(
        "Answers stopped while they were written",
        "layer | > window: answer tokens | > fitted on: complied-with harmful requests | > succeeded attacks stopped | "
        "> tokens out before the stop: median | > 90th percentile | > plain benign stopped | > wrapped benign stopped "
        "| > over-refusal stopped",
        [
            [str(row.layer), row.window, row.trained_on, row.stopped, fmt.short_number(row.tokens),
             fmt.short_number(row.tokens_90), row.benign, row.wrapped, row.over_refusal]
        ],
        caption="The threshold stops no benign validation answer. Wrapped prompts are benign "
        "requests in the attacks' texts. Scores come from the pass that writes the token.",
    )  # fmt: skip
    if row.equal is None:
        return Section("Streaming", (table,))
    text = (
        f"With the threshold moved to where {fmt.rate_text(row.equal.alarms)} of these benign answers, plain and "
        f"wrapped, would be stopped, {fmt.rate_text(row.equal.stopped)} of the succeeded attacks are, after "
        f"{fmt.short_number(row.equal.tokens)} tokens (median)."
    )
    return Section("Streaming", (table, Text(text)))


def _cascade(result: ProbesResult) -> Section:
    rows = [
        [fmt.percent(r.passed), r.second, r.second_attacks, fmt.percent(r.cost), r.tpr, r.fpr] for r in result.cascade
    ]
    if not rows:
        return Section("Cascade", ())
    table = Table.of(
        "A shallow probe first",
        "> set to pass on: share of validation negatives | > benign passed on | > attacks passed on | > cost: layers "
        "run for a benign prompt, of all | > attacks flagged | > benign flagged",
        rows,
        caption=f"First stage: the best dense residual of the first third of the layers. Second: {result.winner}. Both "
        "thresholds together flag at most 1 % of validation negatives. What is passed on could go to any judge "
        "instead: the second and third columns are what that would cost and could catch.",
    )
    return Section("Cascade", (table,))


def _refusal(result: ProbesResult) -> Section:
    return Section(
        "Will the model refuse?",
        tuple(_ranking(result, "refuse")),
        intro="Another question, with labels from the model's own judged answers: positives are the prompts that it "
        "refused. All but the dense residual are read at the last token. A probe that follows refusal misses what gets "
        "past refusal, so it is no detector of harm.",
    )


def _calibration(result: ProbesResult) -> Section:
    series = [
        charts.Series(
            f"{each.representation}, {each.prompts}",
            tuple(charts.Point.of(row.predicted, row.observed) for row in each.rows),
        )
        for each in result.reliability
    ]
    diagonal = charts.Series("perfect", (charts.Point(0.0, 0.0), charts.Point(1.0, 1.0)))
    chart = Chart(
        "Reliability",
        lambda: charts.line_chart([*series, diagonal], x_title="predicted probability of harm", y_title="harmful"),
        "Ten bins of equal counts. Calibrated on plain validation prompts: under attack probabilities mean less.",
    )
    return Section("Calibration", (chart,))


def _paper(result: ProbesResult) -> Section:
    if not result.paper:
        return Section("The paper's labels", ())
    table = Table.of(
        "Accuracy by the paper's labels, and what it is as detection",
        "representation | > plain harmful | > succeeded attacks: counted right when called benign | > the same as "
        "detection: called harmful",
        [[row.representation, row.plain, row.succeeded, row.as_harm] for row in result.paper],
    )
    text = (
        "The paper (section 4.4) gives succeeded attacks the label of the benign class, so a probe is right about them "
        "when it calls them benign: that measures whether it follows the model's behaviour. Read as detection the same "
        "numbers turn round (last column). There are also no benign test prompts, hence no false-alarm rate: a probe "
        "that calls every adversarial prompt benign would be perfect. This is why it is not detection."
    )
    return Section("The paper's labels", (Text(text), table))


def _details(result: ProbesResult) -> Iterator[Block]:
    yield Table.of(
        "What the validation prompts chose",
        "question | representation | pooling | layer | > values | > used: weight not 0 | > log loss | > AUROC | "
        "> compared: poolings and layers",
        [
            [row.target, row.representation, row.pooling or fmt.MISSING,
             fmt.MISSING if row.layer is None else str(row.layer), row.dim, row.used, fmt.measure(row.loss, 3),
             fmt.measure(row.auroc, 3), row.tried]
            for row in result.probes
        ],
        folded=True,
    )  # fmt: skip
    yield Table.of(
        "Prompts",
        "set | kind | label | > prompts | > refused | > succeeded: among those that succeeded or failed",
        [[r.name, r.kind, "harmful" if r.positive else "benign", r.n, r.refused, r.succeeded] for r in result.sets],
    )
