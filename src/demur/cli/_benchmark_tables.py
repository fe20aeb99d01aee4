"""The benchmark's results as tables for a terminal, in the same words as the report's."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from demur import report
from demur.cli._tables import plain_table
from demur.report import benchmark as words
from demur.stats import Estimate
from demur.studies.benchmark.config import MAIN
from demur.studies.benchmark.results import BenchmarkResult, Method


def benchmark_tables(result: BenchmarkResult) -> list[RenderableType]:
    """Headline, warnings, suppression, comparisons, induction, side effects, sizes, the search's choice and counters,
    ready to print one after another."""
    parts: list[RenderableType] = [Text(words.headline(result), "bold"), _claims(result)]
    parts += [Text(f"warning: {warning}", "yellow") for warning in result.warnings]
    parts += [_suppression(result)]
    if result.judges:
        parts += [_attack(result)]
    parts += [_comparisons(result, group) for group in words.groups(result)]
    if result.induction:
        parts += [_induction(result)]
    if result.side_effects:
        parts += [_side_effects(result)]
    if words.capability_lines(result):
        parts += [_capability(result)]
    if result.curve:
        parts += [_sizes(result)]
    knee = words.knee(result)
    if result.tuning is not None and knee is not None:
        parts += [
            Text(
                f"search: the knee of {len(result.tuning.trials)} trials is trial {knee.number}: "
                f"{words.trial_text(knee)}; {report.percent(knee.suppression)} of harmful tuning prompts complied "
                f"with, damage {report.measure(knee.damage, 4)} nats per token"
            )
        ]
    return [*parts, Text(words.counters_text(result.counters))]


def _claims(result: BenchmarkResult) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(width=24)
    table.add_column()
    for claim in words.claims(result):
        table.add_row(claim.where, claim.text)
    return _caption(
        table,
        "differences: F* less the other, percentage points of prompts; brackets: 95% intervals; more, fewer: paired "
        "test with Holm-adjusted p < 0.05",
    )


def _caption(table: Table, text: str) -> Table:
    table.caption = text
    table.caption_justify = "left"
    return table


def _style(method: Method) -> str:
    return "bold" if method == MAIN else ""


def _suppression(result: BenchmarkResult) -> RenderableType:
    table = plain_table(
        "Harmful test prompts, each method at its chosen strength",
        "method",
        "n",
        "refused",
        "complied",
        "garbled",
        "answers",
        "text",
        "KL",
        numbers=7,
    )
    for row in words.chosen_rows(result):
        damage = row.damage
        table.add_row(
            words.method_text(row.method, "suppress", row.strength, result),
            words.count_text(row.behaviour.refusal),
            report.rate_text(row.behaviour.refusal),
            report.rate_text(row.behaviour.compliance),
            words.incoherent_text(row),
            report.measure(None if damage is None else damage.answers.value, 3),
            report.measure(None if damage is None or damage.text is None else damage.text.value, 3),
            report.measure(None if damage is None else damage.kl.value, 3),
            style=_style(row.method),
        )
    return _caption(
        table,
        "n: scored answers, + unscored; brackets: 95% intervals; answers, text: rise of cross-entropy, nats per token; "
        "KL: of the first answer token on harmless prompts, nats",
    )


def _attack(result: BenchmarkResult) -> RenderableType:
    # One row a judge and method: judges' names are too long for columns.
    table = plain_table("Attack success, by judge of harm", "method", "judge", "n", "success", numbers=2)
    for judge in result.judges:
        for row in words.chosen_rows(result):
            attack = row.behaviour.attack.get(judge)
            table.add_row(
                words.method_text(row.method, "suppress", row.strength, result),
                judge,
                "" if attack is None else words.count_text(attack),
                report.rate_text(attack),
                style=_style(row.method),
            )
    return table


def _comparisons(result: BenchmarkResult, group: words.Group) -> RenderableType:
    table = plain_table(
        f"{words.budget_text(group.budgets)}: {words.measure_text(group.measure)}",
        "F* against",
        "strengths",
        "difference",
        "damage",
        "p",
        "p adjusted",
        "finding",
        numbers=5,
    )
    for row in group.rows:
        found = words.finding(row)
        table.add_row(
            words.METHOD_NAMES[row.other],
            words.pair_text(row, result),
            words.points_text(row.difference),
            f"{report.measure(row.damage, 3)} / {report.measure(row.other_damage, 3)}",
            report.p_text(None if found == "missing" else row.p),
            report.p_text(None if found == "missing" else row.p_holm),
            words.FINDING_NAMES[found],
            style="bold" if found in ("more", "fewer") else "",
        )
    return _caption(table, "strengths, damage on own answers: F* / other; p adjusted: Holm, over this table")


def _induction(result: BenchmarkResult) -> RenderableType:
    table = plain_table(
        "Harmless test prompts, refusal induced at chosen strengths",
        "method",
        "n",
        "refused",
        "complied",
        "garbled",
        numbers=4,
    )
    for row in words.chosen_induction(result):
        table.add_row(
            words.method_text(row.method, "induce", row.strength, result),
            words.count_text(row.behaviour.refusal),
            report.rate_text(row.behaviour.refusal),
            report.rate_text(row.behaviour.compliance),
            words.incoherent_text(row),
            style=_style(row.method),
        )
    return table


def _side_effects(result: BenchmarkResult) -> RenderableType:
    table = plain_table(
        "Side effects of suppression",
        "method",
        "unchanged",
        "refused",
        "over-refused",
        "AUROC",
        "says harmful",
        numbers=5,
    )
    for row in result.side_effects:
        known = row.knowledge
        table.add_row(
            words.method_text(row.method, "suppress", row.strength, result),
            report.rate_text(None if row.method == "none" else row.harmless.unchanged),
            report.rate_text(row.harmless.refusal),
            report.rate_text(None if row.over_refusal is None else row.over_refusal.refusal),
            words.number_text(None if known is None else known.auroc, 2),
            _two(None if known is None else (known.says_harmful, known.says_harmful_of_harmless)),
            style=_style(row.method),
        )
    return _caption(
        table,
        "unchanged, refused: answers to harmless prompts; over-refused: harmless prompts that look harmful; AUROC: "
        "harmful against harmless when asked; says harmful: of harmful / of harmless",
    )


def _two(shares: tuple[Estimate, Estimate] | None) -> str:
    return "–" if shares is None else " / ".join(report.percent(share.value) for share in shares)


def _capability(result: BenchmarkResult) -> RenderableType:
    table = plain_table("Capability", "method", "task", "metric", "value", "change", "n", numbers=3)
    for line in words.capability_lines(result):
        name = words.METHOD_NAMES[line.method]
        table.add_row(
            f"{name}, {line.strength}" if line.strength else name,
            line.row.task,
            line.row.metric,
            report.measure(line.row.value, 3),
            words.number_text(line.change),
            str(line.row.n),
            style=_style(line.method),
        )
    return _caption(table, "change: to the clean model on the same questions, paired")


def _sizes(result: BenchmarkResult) -> RenderableType:
    table = plain_table("Sizes of F*", "features", "strength", "refused", "complied", "damage", numbers=4)
    for row in result.curve:
        table.add_row(
            str(row.size),
            words.setting(MAIN, "suppress", row.strength, result),
            report.rate_text(row.refusal),
            report.rate_text(row.compliance),
            words.number_text(row.damage, 4),
            style="bold" if row.size == result.k else "",
        )
    return _caption(table, "damage: rise of cross-entropy on own harmless answers, nats per token")


__all__ = ["benchmark_tables"]
