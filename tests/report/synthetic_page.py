"""A page with every block, and markup and Markdown in every field. Nothing harmful is written here."""

from __future__ import annotations

from demur.report.blocks import Chart, Page, Section, Table, Text, Token, Tokens, Transcript, Transcripts
from demur.report.charts import (
    Bar,
    Cell,
    Point,
    Series,
    Spread,
    bar_chart,
    heatmap,
    line_chart,
    scatter_lines,
    strip_chart,
)
from demur.stats import Estimate, wilson

INJECTION = "<script>alert('x')</script>"
HARMFUL_PROMPT = f"Synthetic harmful prompt {INJECTION}"
MEAN = Estimate(value=0.25, low=0.1, high=0.4, n=2)
HARMFUL_ANSWER = "Synthetic filler in place of a harmful answer."
METHODS = ("F* (CosSim+AP)", "AP", "ActDiff", "CosSim", "random features", "direction")


def marked(text: str) -> str:
    """The text with markup that must not take effect."""
    return f"{text} {INJECTION}"


def effects() -> Table:
    """Ten columns, as wide as a study's table becomes; the last one decides the finding."""
    columns = ["method", "strength", "> n", "refused", "complied", "> incoherent", "> ΔCE, own answers", "> KL, nats"]
    rows = [
        [
            *(name, f"c = −{n}", "97+3", f"{90 - 9 * n}% [{80 - 9 * n}–{95 - 8 * n}]", f"{8 * n}% [{5 * n}–{11 * n}]"),
            *(f"{n}%", f"0.0{n}2 [0.0{n}0–0.0{n}8]", f"0.1{n}0", f"0.0{n}3", f"0.{n}61"),
        ]
        for n, name in enumerate(METHODS)
    ]
    return Table.of(
        marked("Harmful test prompts"),
        [*columns, "> p", "> p adjusted"],
        rows,
        caption=marked("Brackets hold 95 % intervals"),
        strong=[0],
    )


def line() -> Chart:
    """Refusal over strengths with a level line."""

    def points(*refused: int) -> tuple[Point, ...]:
        pairs = zip((1.0, 0.25, -0.125, -3.0), refused, strict=True)
        return tuple(Point.of(x, wilson(k, 100), chosen=x == -0.125) for x, k in pairs)

    series = [Series(METHODS[0], points(95, 60, 20, 10)), Series(METHODS[4], points(95, 93, 92, 90))]
    return Chart(
        marked("Refusal over strength"),
        lambda: line_chart(
            series, x_title="scale factor c", y_title="refused", order=METHODS, reverse=True, rules={"clean": 0.95}
        ),
        marked("Bands are 95 % intervals."),
    )


def trade_off() -> Chart:
    """Every method at three side effects."""
    series = [
        Series(
            name, tuple(Point(0.004 * (1 + n) * 6**step, 0.3 * step + 0.03 * n, chosen=step == 1) for step in (0, 1, 2))
        )
        for n, name in enumerate(METHODS)
    ]
    return Chart(
        "Compliance against ΔCE",
        lambda: scatter_lines(
            series, x_title="ΔCE, nats per token", y_title="complied with", order=METHODS, guides=(0.02, 0.1)
        ),
    )


def details() -> Section:
    """Bars, a heat map, a folded table and both kinds of transcripts."""
    bars = [Bar(f"{n % 4}:{n * 37}", 2 - n / 7, n % 4, 1.9 - n / 7 if n < 9 else None) for n in range(12)]
    cells = [
        Cell(layer, position, 6 - 1.5 * layer + 0.5 * abs(position + 2), 2 <= layer <= 4, (layer, position) == (4, -2))
        for layer in range(7)
        for position in (-4, -3, -2, -1)
    ]
    features = Table.of(marked("All features"), ["feature", "> score"], [("3:1111", "2.000")] * 3, folded=True)
    return Section(
        marked("Details"),
        (
            Chart("Effect of each feature", lambda: bar_chart(bars, x_title="mean effect, logits")),
            Chart("Candidates", lambda: heatmap(cells, x_title="position", y_title="layer", low_is_strong=True)),
            Chart("Nothing measured", lambda: line_chart([], x_title="x", y_title="y")),
            features,
            Chart(
                "Every prompt",
                lambda: strip_chart(
                    [Spread("won", (0.1, 0.4, float("nan")), MEAN), Spread("none", (float("nan"),), MEAN)],
                    x_title="drop",
                ),
            ),
            Tokens(
                marked("Tokens"),
                (marked("harm"), marked("refusal")),
                ((marked("prompt"), (Token(marked(" bomb"), 1.0, 0.2), Token("\n", 0.0, 0.6), Token("the", 0.01))),),
                caption=marked("1 is the strongest."),
            ),
            Transcripts(
                marked("Harmful"),
                (Transcript(HARMFUL_PROMPT, ((marked("F*, c = −3"), marked(HARMFUL_ANSWER)), ("clean", "I cannot."))),),
                harmful=True,
            ),
            Transcripts(
                marked("Harmless"),
                (
                    Transcript(
                        marked("How do I cook soup?"), ((marked("clean"), "1. Boil water.\n2. *Stir* | serve."),)
                    ),
                ),
                harmful=False,
            ),
        ),
    )


def page() -> Page:
    """The page."""
    return Page(
        title=marked("demur study: gemma"),
        sections=(
            Section(
                marked("Finding"),
                (
                    Text(marked("F* cut refusal from 95% [89–98] to 10% [6–17]."), "verdict"),
                    Text(marked("35 answers are few."), "warning"),
                    Text(marked("The judge is uncertain."), "warning"),
                    Text(marked("The judge is uncertain."), "warning"),
                    effects(),
                ),
                brief=True,
                intro=marked("Measured on test prompts."),
            ),
            Section(marked("Strengths"), (line(), trade_off(), Text(marked("A note."), "note"))),
            details(),
            Section("More", (Text(marked("Plain text.")),)),
        ),
        command=marked("demur study --config study.toml"),
        config='model = "<b>.csv"\n',
        facts=((marked("model"), marked("gemma")), ("seconds", "3")),
    )
