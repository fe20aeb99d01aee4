"""How numbers are written in every view: terminal, HTML and Markdown.

nan, None and rates of nothing are written as a dash (`MISSING`); a minus is a real minus sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from demur.stats import Estimate
    from demur.types import Rate

MISSING: Final = "–"


def measure(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals: `−1.25`. Never a negative zero."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def short_number(value: float | None) -> str:
    """A number with no more digits than it needs, six at most: `−3`, `0.25`."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:g}".replace("-", "−")


def percent(fraction: float | None) -> str:
    """A fraction in whole percent: `91%`. Only 0 and 1 themselves are written 0% and 100%."""
    if fraction is None or math.isnan(fraction):
        return MISSING
    if 0 < fraction < 0.005:
        return "<1%"
    if 0.995 <= fraction < 1:
        return ">99%"
    return f"{measure(100 * fraction, 0)}%"


def is_known(rate: Rate | Estimate | None) -> bool:
    """Whether anything was scored, so that there is a value and an interval to write."""
    return rate is not None and rate.n > 0 and all(map(math.isfinite, (rate.value, rate.low, rate.high)))


def interval(rate: Rate | Estimate | None) -> str:
    """The 95 % interval of a rate in whole percent: `84–95`."""
    return span(100 * rate.low, 100 * rate.high, 0) if rate is not None and is_known(rate) else MISSING


def rate_text(rate: Rate | Estimate | None) -> str:
    """A rate and its 95 % interval in whole percent: `91% [84–95]`."""
    return f"{percent(rate.value)} [{interval(rate)}]" if rate is not None and is_known(rate) else MISSING


def cell_text(value: str | int | Rate | Estimate | None) -> str:
    """What a table's cell says: text and whole numbers as they are, a rate with its interval, None as a dash."""
    return str(value) if isinstance(value, str | int) else rate_text(value)


def estimate_text(estimate: Estimate | Rate | None, digits: int = 2) -> str:
    """A number with `digits` decimals and its 95 % interval: `0.91 [0.84–0.95]`; without one where it is unknown."""
    if estimate is None or not math.isfinite(estimate.value):
        return MISSING
    text = measure(estimate.value, digits)
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return f"{text} [{span(estimate.low, estimate.high, digits)}]" if known else text


def points_text(difference: Estimate | None) -> str:
    """A difference of two rates in percentage points, with its 95 % interval: `+42 [30 to 54]`."""
    if difference is None or not math.isfinite(difference.value):
        return MISSING
    low, value, high = (measure(100 * each, 0) for each in (difference.low, difference.value, difference.high))
    sign = "+" if difference.value > 0 and value != "0" else ""
    known = math.isfinite(difference.low) and math.isfinite(difference.high)
    return f"{sign}{value} [{low} to {high}]" if known else f"{sign}{value}"


def span(low: float, high: float, digits: int = 2) -> str:
    """An interval: `0.84–0.95`, or `−0.01 to 0.03` where a dash would hide a minus sign."""
    return f"{measure(low, digits)}{' to ' if min(low, high) < 0 else '–'}{measure(high, digits)}"


def count_text(rate: Rate | Estimate, *, unit: str = " unscored") -> str:
    """How many answers were scored, and how many could not be: `97+3 unscored`, or `97` if all were. With `unit=""` the
    cell reads `97+3`, for a column whose help says what follows the plus."""
    return f"{rate.n}+{rate.unscored}{unit}" if rate.unscored else str(rate.n)


def p_text(p: float | None) -> str:
    """A p value to the digits that matter: `<0.001`, `0.012`, `0.50`."""
    if p is None or math.isnan(p):
        return MISSING
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds in the two units that matter: `1.5 s`, `2 min 05 s`, `1 h 01 min`."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    hours, minutes, rest = round(seconds) // 3600, round(seconds) // 60 % 60, round(seconds) % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def token_text(token: str) -> str:
    """A token with control characters made visible: a line feed as `\\n`."""
    return repr(token)[1:-1]


def model_title(name: str) -> str:
    """A model's name for a heading: a hub id unchanged, of a folder the last part that says something."""
    path = PurePath(name)
    if len(path.parts) == 2 and path.parts[0] not in {path.anchor, ".."}:
        return name
    parts = [part for part in path.parts if part not in {path.anchor, ".", "..", "model"}]
    return parts[-1] if parts else name


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them: `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def bytes_text(size: float | None) -> str:
    """Bytes in the decimal unit that fits: `81.9 kB`, `5.2 GB`; "unknown" where there is no number."""
    if size is None:
        return "unknown"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size:.0f} bytes"
