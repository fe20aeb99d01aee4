"""How a result is put into words: which rows matter, what they are called, how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from demur.stats import Estimate
from demur.studies.results import EffectRow, FeaturesResult, Kind, Method, Sample
from demur.types import Label, Rate

METHOD_NAMES: Final[dict[Method, str]] = {
    "none": "clean",
    "features": "features F*",
    "random": "random features",
    "direction": "direction",
    "direction_affine": "direction, affine",
}
"""Names of the methods, in the order in which tables list them."""

ALPHA: Final = 0.05
"""A paired difference with a smaller p is called one."""

MISSING: Final = "–"


def measure(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals and a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def token_text(token: str) -> str:
    """A token with its white space made visible: a line feed as `\\n`."""
    return repr(token)[1:-1]


def model_title(name: str) -> str:
    """A model's name for a heading: a hub id as it is, of a folder the last part that says something."""
    path = PurePath(name)
    if len(path.parts) == 2 and path.parts[0] != "..":
        return name
    parts = [part for part in path.parts if part not in {path.anchor, ".", "..", "model"}]
    return parts[-1] if parts else name


def percent(fraction: float) -> str:
    """A fraction in whole percent. Only 0 and 1 themselves are written 0% and 100%."""
    if math.isnan(fraction):
        return MISSING
    if 0 < fraction < 0.005:
        return "<1%"
    if 0.995 <= fraction < 1:
        return ">99%"
    return f"{100 * fraction:.0f}%"


def interval(rate: Rate | Estimate) -> str:
    """The 95 % interval in whole percent, as `82–98`."""
    return f"{100 * rate.low:.0f}–{100 * rate.high:.0f}" if is_known(rate) else MISSING


def rate_text(rate: Rate | Estimate | None) -> str:
    """A rate with its interval, as `90% [82–98]`; a dash where nothing was scored."""
    return f"{percent(rate.value)} [{interval(rate)}]" if rate is not None and is_known(rate) else MISSING


def is_known(rate: Rate | Estimate) -> bool:
    """Something was scored, and there is a value and an interval to write down."""
    return rate.n > 0 and all(math.isfinite(each) for each in (rate.value, rate.low, rate.high))


def short_number(value: float) -> str:
    """A number with no more digits than it needs, and a true minus sign."""
    return f"{value:g}".replace("-", "−")


def p_text(p: float | None) -> str:
    """A p-value to the digits that matter."""
    if p is None or math.isnan(p):
        return MISSING
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float) -> str:
    """Wall-clock time in the two units that matter."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole:02d} s" if minutes else f"{whole} s"


def strength_text(row: EffectRow | Sample, result: FeaturesResult) -> str:
    """What the row's strength means: `c = −3`, `2 × peak`, `v = 40`; empty for baseline and directions."""
    if row.kind == "baseline" or row.method in {"direction", "direction_affine"}:
        return ""
    if row.kind == "suppress":
        return f"c = {short_number(row.strength)}"
    return (
        f"{short_number(row.strength)} × peak"
        if result.strength_unit == "multiple"
        else f"v = {short_number(row.strength)}"
    )


def condition(row: EffectRow | Sample) -> str:
    """What was done, as a table's first cell says it."""
    if row.kind == "baseline":
        return METHOD_NAMES["none"]
    verbs = {"suppress": "scaled", "induce": "set"}
    if row.method.startswith("direction"):
        verbs = {"suppress": "ablated", "induce": "added"}
    return f"{METHOD_NAMES[row.method]}, {verbs[row.kind]}"


def find_row(
    rows: Sequence[EffectRow], prompts: Label, kind: Kind, method: Method, strength: float | None = None
) -> EffectRow | None:
    """The row measured on those prompts; without a strength, the chosen one (or the only one)."""
    found = [row for row in rows if (row.prompts, row.kind, row.method) == (prompts, kind, method)]
    if strength is not None:
        found = [row for row in found if row.strength == strength]
    chosen = [row for row in found if row.chosen]
    if chosen:
        return chosen[0]
    return found[0] if len(found) == 1 else None


def key_rows(result: FeaturesResult, prompts: Label) -> tuple[EffectRow, ...]:
    """The rows of the table of effects.

    The baseline, the features at the strength that the tuning split chose, the control at the same strength,
    and the directions. Where no strength was chosen, all of them: choosing one by its test result would be
    reading the test split.
    """
    order = {method: rank for rank, method in enumerate(METHOD_NAMES)}
    rows: list[EffectRow] = []
    for kind in ("baseline", "suppress", "induce"):
        of_kind = [row for row in result.effects if row.prompts == prompts and row.kind == kind]
        strengths = {row.strength for row in of_kind if row.method == "features" and row.chosen}
        rows += sorted(
            (
                row
                for row in of_kind
                if not strengths or row.strength in strengths or row.method.startswith("direction") or row.chosen
            ),
            key=lambda row: order[row.method],
        )
    return tuple(rows)


def curve_rows(result: FeaturesResult, prompts: Label, kind: Kind) -> tuple[EffectRow, ...]:
    """The rows behind one curve, in the order in which the chart draws them."""
    rows = [row for row in result.effects if row.prompts == prompts and row.kind == kind]
    order = list(METHOD_NAMES)
    sign = -1 if kind == "suppress" else 1
    rows.sort(key=lambda row: (order.index(row.method), sign * row.strength))
    return tuple(rows)


def _verdict(baseline: EffectRow, row: EffectRow, control: EffectRow | None) -> str:
    """How refusal went from the baseline to this row, claiming no more than the paired tests on the same prompts."""
    before, after = baseline.refusal, row.refusal
    text = f"refusal from {rate_text(before)} to {rate_text(after)}"
    if row.p_value is None:
        return f"moved {text}, which was not tested"
    if row.p_value >= ALPHA:
        return f"did not clearly change refusal: {rate_text(before)} before, {rate_text(after)} after"
    if row.p_vs_random is None:
        return f"moved {text}, not tested against random features"
    cut = after.value < before.value
    outdone = control is not None and (control.refusal.value < after.value) == cut
    if row.p_vs_random >= ALPHA or outdone:
        return f"moved {text}, not clearly further than random features"
    return f"{'cut' if cut else 'raised'} {text}"


def _clause(result: FeaturesResult, prompts: Label, kind: Kind) -> str | None:
    """One half of the headline, without its final stop."""
    baseline = find_row(result.effects, prompts, "baseline", "none")
    row = find_row(result.effects, prompts, kind, "features")
    if baseline is None or row is None:
        return None
    control = find_row(result.effects, prompts, kind, "random", row.strength)
    k = len(result.features)
    if kind == "suppress":
        act = f"scaling {k} features by {short_number(row.strength)}"
    elif result.strength_unit == "multiple":
        act = f"setting {k} features to {short_number(row.strength)} × their peak"
    else:
        act = f"setting {k} features to {short_number(row.strength)}"
    text = f"on {baseline.refusal.n} {prompts} prompts, {act} {_verdict(baseline, row, control)}"
    return text if control is None else f"{text} (random features: {rate_text(control.refusal)})"


def headline(result: FeaturesResult) -> str:
    """What was found on held-out test prompts, in one sentence; square brackets hold 95 % intervals."""
    clauses = [c for c in (_clause(result, "harmful", "suppress"), _clause(result, "harmless", "induce")) if c]
    if not clauses:
        return "No chosen intervention was measured on test prompts."
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."
