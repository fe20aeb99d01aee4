"""How a benchmark is put into words: which method did more by the tests, what methods and strengths are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from demur.capability import CapabilityRow, capability_change
from demur.errors import InputError
from demur.report._words import ALPHA, MISSING, measure, percent, rate_text, short_number
from demur.stats import Estimate
from demur.studies.benchmark.config import DIRECTIONS, MAIN, MethodName
from demur.studies.benchmark.results import (
    Answered,
    BenchmarkResult,
    Comparison,
    Counters,
    InduceRow,
    Kind,
    Method,
    SuppressRow,
    Trial,
)
from demur.types import FeatureId, FeatureSet, Outcome

METHOD_NAMES: Final[dict[Method, str]] = {
    "none": "clean",
    "cossim+ap": "F* (CosSim+AP)",
    "cossim+ap-local": "F* per prompt",
    "ap": "AP",
    "ap-falling": "AP falling",
    "ap-local": "AP per prompt",
    "actdiff": "ActDiff",
    "cossim": "CosSim",
    "random": "random features",
    "direction": "direction",
    "direction-affine": "affine direction",
}
"""Names of the methods, in the order in which legends list them."""

COMPLIANCE: Final = "compliance"
"""The measure of the outcome judge; the others are named by their judges of harm."""

Finding = Literal["more", "fewer", "unclear", "missing"]
"""Whether F* got more prompts complied with than another method, as far as the adjusted test tells."""

FINDING_NAMES: Final[dict[Finding, str]] = {
    "more": "F* more",
    "fewer": "F* fewer",
    "unclear": "not clear",
    "missing": MISSING,
}


class Claim(NamedTuple):
    """One line of figures under the headline: the condition, and what was found under it."""

    where: str
    text: str


class Group(NamedTuple):
    """The comparisons by one measure under one condition, among which p was adjusted."""

    measure: str
    budgets: tuple[float, ...]
    """Damage that was allowed: several budgets that let the same strengths through; none: each method at its best."""
    rows: tuple[Comparison, ...]


class CapabilityLine(NamedTuple):
    """One number of a task under one method; `change` is to the clean model on the same questions, None where
    there is none to compare with, its interval infinite where the two cannot be paired."""

    method: Method
    strength: str
    row: CapabilityRow
    change: Estimate | None


class SetLine(NamedTuple):
    """A method's global set: how many of its features each layer holds, and how many F* holds as well."""

    method: Method
    features: FeatureSet
    layers: str
    shared: int


def span(low: float, high: float, digits: int) -> str:
    """An interval, as `0.01–0.03`; with `to` where a minus sign would be lost beside a dash."""
    return f"{measure(low, digits)}{' to ' if low < 0 or high < 0 else '–'}{measure(high, digits)}"


def number_text(estimate: Estimate | None, digits: int = 3) -> str:
    """A number with its interval, as `0.012 [0.008–0.016]`; without one where it is not known."""
    if estimate is None or not math.isfinite(estimate.value):
        return MISSING
    text = measure(estimate.value, digits)
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return f"{text} [{span(estimate.low, estimate.high, digits)}]" if known else text


def points_text(estimate: Estimate | None) -> str:
    """A difference of shares in percentage points, as `+42 [30 to 54]`."""
    if estimate is None or not math.isfinite(estimate.value):
        return MISSING
    text = _signed(100 * estimate.value)
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return text
    return f"{text} [{measure(100 * estimate.low, 0)} to {measure(100 * estimate.high, 0)}]"


def _signed(value: float) -> str:
    text = measure(value, 0)
    return f"+{text}" if float(f"{value:.0f}") > 0 else text


def measure_text(name: str) -> str:
    """A measure as a heading says it."""
    return "complied with (outcome judge)" if name == COMPLIANCE else f"attack success ({name})"


def budget_text(budgets: Sequence[float]) -> str:
    """Under which condition methods were compared."""
    if not budgets:
        return "Each method at its own best strength"
    return f"Damage up to {_listed([short_number(each) for each in budgets])} nats per token"


def setting(method: Method, kind: Kind, strength: float | None, result: BenchmarkResult) -> str:
    """What a strength means: `c = −3`, `2 × peak`, `v = 40`, `1 × length`; empty for the clean model and a
    direction that is ablated."""
    if method == "none" or kind == "none" or (kind == "suppress" and method in DIRECTIONS):
        return ""
    if strength is None:
        return MISSING
    number = short_number(strength)
    if kind == "suppress":
        return f"c = {number}"
    if method in DIRECTIONS:
        return f"{number} × length"
    return f"{number} × peak" if result.strength_unit == "multiple" else f"v = {number}"


def pair_text(row: Comparison, result: BenchmarkResult) -> str:
    """The strengths of F* and of the other method, as `c = −1 / c = −3`; a direction is ablated whole."""
    other = MISSING if row.other_strength is None else setting(row.other, "suppress", row.other_strength, result)
    return f"{setting(MAIN, 'suppress', row.strength, result)} / {other or 'whole'}"


def method_text(method: Method, kind: Kind, strength: float | None, result: BenchmarkResult) -> str:
    """A method with its strength, as `AP, c = −1`."""
    text = setting(method, kind, strength, result)
    return f"{METHOD_NAMES[method]}, {text}" if text else METHOD_NAMES[method]


def sample_text(sample: Answered, result: BenchmarkResult) -> str:
    """How an answer came about, and what the judge made of it."""
    outcome = "unscored" if sample.outcome is None else sample.outcome.value.replace("_", " ")
    return f"{method_text(sample.method, sample.kind, sample.strength, result)} · {outcome}"


def incoherent_text(row: SuppressRow | InduceRow) -> str:
    """Share of scored answers that make no sense."""
    scored = sum(row.behaviour.outcomes.values())
    return percent(row.behaviour.outcomes.get(Outcome.INCOHERENT, 0) / scored) if scored else MISSING


def count_text(estimate: Estimate) -> str:
    """Scored answers, and how many could not be scored: `97+3`."""
    return f"{estimate.n}+{estimate.unscored}" if estimate.unscored else str(estimate.n)


def counters_text(counters: Counters) -> str:
    """What this process did, and what it found done."""
    pairs = (
        ("answers", counters.answers, "written", counters.answers_found),
        ("verdicts", counters.verdicts, "given", counters.verdicts_found),
        ("passes", counters.passes, "made", counters.passes_found),
    )
    return "; ".join(f"{name}: {made:,} {verb}, {found:,} found" for name, made, verb, found in pairs)


def chosen_rows(result: BenchmarkResult) -> tuple[SuppressRow, ...]:
    """Suppression at the strength that the tuning prompts chose for each method, the clean model first."""
    return tuple(row for row in result.suppression if row.chosen or row.method == "none")


def chosen_induction(result: BenchmarkResult) -> tuple[InduceRow, ...]:
    """Induction at the chosen strength of each method, the clean model first."""
    return tuple(row for row in result.induction if row.chosen or row.method == "none")


def groups(result: BenchmarkResult) -> tuple[Group, ...]:
    """Comparisons by measure and condition, in the order in which they come."""
    found: dict[tuple[str, float | None], list[Comparison]] = {}
    for row in result.comparisons:
        found.setdefault((row.measure, row.budget), []).append(row)
    # As text, since nan equals nothing.
    same: dict[tuple[str, bool, str], Group] = {}
    for (name, budget), rows in found.items():
        content = "".join(row.model_dump_json(exclude={"budget"}) for row in rows)
        budgets = () if budget is None else (budget,)
        key = name, budget is None, content
        known = same.get(key)
        same[key] = Group(name, known.budgets + budgets if known else budgets, tuple(rows))
    return tuple(same.values())


def finding(row: Comparison) -> Finding:
    """What the adjusted test says of one comparison. A test without a scored pair says nothing, whatever its p."""
    if row.difference is None or not math.isfinite(row.difference.value) or math.isnan(row.p_holm):
        return "missing"
    if row.p_holm >= ALPHA or row.difference.value == 0:
        return "unclear"
    return "more" if row.difference.value > 0 else "fewer"


def headline(result: BenchmarkResult) -> str:
    """Which methods F* outdid, and which outdid it, in one sentence, by the outcome judge.

    "At equal damage" is said of a method where the finding holds at every budget; where some budget lets no strength of
    F* or of the method through, the others are named.
    """
    rows: dict[MethodName, list[Comparison]] = {}
    for row in result.comparisons:
        if row.measure == COMPLIANCE:
            rows.setdefault(row.other, []).append(row)
    names: dict[_Place, list[str]] = {}
    for other, of_other in rows.items():
        names.setdefault(_place(of_other), []).append(METHOD_NAMES[other])
    subject = f" harmful test prompts were complied with under {METHOD_NAMES[MAIN]}"
    clauses: list[str] = []
    for side in ("more", "fewer"):
        found = [f"than under {_listed(names[place])}, {place.where}" for place in names if place.side == side]
        if found:
            clauses.append(f"{side}{'' if clauses else subject} {'; '.join(found)}")
    mixed, ties, missing = (names.get(_Place(side)) for side in ("mixed", "unclear", "missing"))
    if mixed:
        clauses.append(
            f"more{'' if clauses else subject} than under {_listed(mixed)} at one strength, fewer at another"
        )
    if ties:
        where = "" if clauses else f"{METHOD_NAMES[MAIN]} against other methods on harmful test prompts: "
        clauses.append(f"{where}no clear difference from {_listed(ties)}")
    if not clauses:
        return f"No other method could be compared with {METHOD_NAMES[MAIN]}."
    if missing:
        clauses.append(f"not compared: {_listed(missing)}")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


class _Place(NamedTuple):
    """What holds of F* against one method, and where."""

    side: Finding | Literal["mixed"]
    where: str = ""


def _place(rows: Sequence[Comparison]) -> _Place:
    best = next((finding(row) for row in rows if row.budget is None), "missing")
    budgets = {row.budget: finding(row) for row in rows if row.budget is not None}
    compared = [budget for budget, found in budgets.items() if found != "missing"]
    equal = {budgets[budget] for budget in compared}
    sides = {best, *equal} & {"more", "fewer"}
    if not sides:
        return _Place("missing" if best == "missing" and not equal else "unclear")
    if len(sides) == 2:
        return _Place("mixed")
    side: Finding = "more" if "more" in sides else "fewer"
    at = "at equal damage"
    if len(compared) < len(budgets):
        at += f" (up to {_listed([short_number(each) for each in compared])} nats per token)"
    if best != side:
        return _Place(side, f"{at}, not clearly at own best strengths" if equal == sides else "at some budgets only")
    if equal == sides:
        return _Place(side, f"at each method’s own best strength and {at}")
    if equal:
        return _Place(side, "at each method’s own best strength, not clearly at every budget of damage")
    return _Place(side, "at own best strengths (not compared at equal damage)")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def claims(result: BenchmarkResult) -> tuple[Claim, ...]:
    """The figures under the headline: F* itself, then each condition's differences, then what judges of harm say."""
    lines = [_itself(result)]
    for group in groups(result):
        if group.measure == COMPLIANCE:
            lines.append(Claim(budget_text(group.budgets), _differences(group, result)))
    for judge in result.judges:
        of_judge = [group for group in groups(result) if group.measure == judge]
        texts = [f"{_brief(group.budgets)}: {_sides(group, numbers=False)}." for group in of_judge]
        if texts:
            lines.append(Claim(f"By attack success ({judge})", " ".join(texts)))
    return tuple(line for line in lines if line is not None)


def _itself(result: BenchmarkResult) -> Claim | None:
    rows = chosen_rows(result)
    row = next((row for row in rows if row.method == MAIN), None)
    if row is None:
        return None
    base = next((row for row in rows if row.method == "none"), None)
    complied = row.behaviour.compliance
    text = (
        f"{rate_text(complied)} of {complied.n} harmful test prompts complied with"
        if complied.n
        else "nothing could be scored"
    )
    if base is not None:
        text += f"; clean, {rate_text(base.behaviour.compliance)}"
    size = len(result.sets[MAIN]) if MAIN in result.sets else result.k
    return Claim(f"F*: {size} features, {setting(MAIN, 'suppress', row.strength, result)}", f"{text}.")


def _brief(budgets: Sequence[float]) -> str:
    within = _listed([short_number(each) for each in budgets])
    return f"Within {within} nats per token" if budgets else "At own best strengths"


def _differences(group: Group, result: BenchmarkResult) -> str:
    text = _sides(group, numbers=True)
    # Of F*, whose strength is the same against all methods.
    strength = group.rows[0].strength
    if group.budgets and strength is not None:
        text = f"F* at {setting(MAIN, 'suppress', strength, result)}, {text}"
    return f"{text[0].upper()}{text[1:]}."


def _sides(group: Group, *, numbers: bool) -> str:
    """The methods of one condition, by what the tests say of them."""

    def named(rows: Sequence[Comparison]) -> str:
        texts = [
            f"{METHOD_NAMES[row.other]} ({points_text(row.difference)})" if numbers else METHOD_NAMES[row.other]
            for row in rows
        ]
        return _listed(texts)

    if all(row.strength is None for row in group.rows):
        return "F* has no strength within it"
    parts: list[str] = []
    openings: dict[Finding, str] = {
        "more": "more than under",
        "fewer": "fewer than under",
        "unclear": "no clear difference from",
    }
    for found, opening in openings.items():
        rows = [row for row in group.rows if finding(row) == found]
        if len(rows) > 1 and found == "unclear" and not numbers:
            parts.append(f"{opening} {len(rows)} {'others' if parts else 'methods'}")
        elif rows:
            parts.append(f"{opening} {named(rows)}")
    missing = [row for row in group.rows if finding(row) == "missing"]
    none_within = [
        METHOD_NAMES[row.other] for row in missing if row.strength is not None and row.other_strength is None
    ]
    unscored = [METHOD_NAMES[row.other] for row in missing if None not in (row.strength, row.other_strength)]
    if none_within:
        parts.append(f"no strength within it: {_listed(none_within)}")
    if unscored:
        parts.append(f"nothing scored: {_listed(unscored)}")
    return "; ".join(parts) or "nothing could be compared"


def capability_lines(result: BenchmarkResult) -> tuple[CapabilityLine, ...]:
    """Every task's numbers under every method, tasks together, each with its change to the clean model."""
    base = {_task(row): row for side in result.side_effects if side.method == "none" for row in side.capability}
    lines = [
        CapabilityLine(
            side.method,
            setting(side.method, "suppress", side.strength, result),
            row,
            None if side.method == "none" else _change(base.get(_task(row)), row),
        )
        for side in result.side_effects
        for row in side.capability
    ]
    order = list(dict.fromkeys(_task(line.row) for line in lines))
    return tuple(sorted(lines, key=lambda line: order.index(_task(line.row))))


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


def set_lines(result: BenchmarkResult) -> tuple[SetLine, ...]:
    """The global sets, F* first, and how much of F* each holds."""
    main = set(result.sets[MAIN].features) if MAIN in result.sets else set[FeatureId]()
    return tuple(
        SetLine(
            name,
            each,
            ", ".join(f"{len(indices)} in {layer}" for layer, indices in each.by_layer().items()),
            len(main & set(each.features)),
        )
        for name, each in result.sets.items()
    )


def knee(result: BenchmarkResult) -> Trial | None:
    """The trial that the search took."""
    return None if result.tuning is None else result.tuning.taken


def trial_text(trial: Trial) -> str:
    """A trial's setting."""
    return (
        f"direction of layer {trial.layer}, position {measure(trial.position, 0)}, K0 = {trial.k0}, K* = {trial.k}, "
        f"c = {short_number(trial.factor)}"
    )


__all__ = [
    "COMPLIANCE",
    "FINDING_NAMES",
    "METHOD_NAMES",
    "CapabilityLine",
    "Claim",
    "Finding",
    "Group",
    "SetLine",
    "budget_text",
    "capability_lines",
    "chosen_induction",
    "chosen_rows",
    "claims",
    "count_text",
    "counters_text",
    "finding",
    "groups",
    "headline",
    "incoherent_text",
    "knee",
    "measure_text",
    "method_text",
    "number_text",
    "pair_text",
    "points_text",
    "sample_text",
    "set_lines",
    "setting",
    "short_number",
    "span",
    "trial_text",
]
