"""How the explanation of one prompt is shown: the finding, the tokens, features, words, and what changes the answer."""

from __future__ import annotations

from collections.abc import Iterator

from demur.report import format as fmt
from demur.report.blocks import Block, Section, Table, Text, Token, Tokens, Transcript, Transcripts
from demur.stats import spearman
from demur.studies.explain import LOCAL, Explanation, Reading
from demur.types import Outcome

_HALF = 0.5
"""A signal below this share of a refused prompt's counts as suppressed in words."""
_ROWS = 12


def explain_sections(result: Explanation) -> tuple[Section, ...]:
    """The sections of an explanation."""
    sections = (
        Section("Verdict", (Text(_verdict(result), "verdict"),), brief=True),
        Section("Token by token", (_tokens(result),), brief=True),
        Section("Prompt" if result.plain is None else "Prompt and plain version", (_readings(result),), brief=True),
        Section("What changes the answer", tuple(_changes(result)), brief=True),
        Section("Words", tuple(_words(result))),
        Section("Features", (_features(result),)),
        Section("Answers", (_answers(result),)),
    )
    return tuple(section for section in sections if section.blocks)


def _verdict(result: Explanation) -> str:
    prompt, plain = result.prompt, result.plain
    said = [f"{_done(prompt.outcome)} (P(refuse) {fmt.measure(prompt.p_refuse)})."]
    if plain is not None:
        said.append(f"Plain version: {_done(plain.outcome).lower()} (P(refuse) {fmt.measure(plain.p_refuse)}).")
    base = (1.0, 1.0) if plain is None else (plain.harm, plain.refusal)
    what = "a refused request" if plain is None else "the plain version"
    parts = [
        f"{_size(value, start)} {name} signal ({fmt.measure(value)}, {fmt.measure(start)})"
        for name, value, start in zip(("harm", "refusal"), (prompt.harm, prompt.refusal), base, strict=True)
    ]
    said.append(f"Beside {what} it has {fmt.listed(parts)}.")
    changed = (
        f"With {row.what}: {_done(row.outcome).lower()} (P(refuse) {fmt.measure(row.p_refuse)})"
        for row in result.changes
    )
    return " ".join((*said, *(f"{each}." for each in changed)))


def _done(outcome: Outcome | None) -> str:
    return "Not judged" if outcome is None else _DONE[outcome]


_DONE = {
    Outcome.REFUSAL: "Refused",
    Outcome.PARTIAL_REFUSAL: "Partly refused",
    Outcome.COMPLIANCE: "Answered",
    Outcome.INCOHERENT: "Answered without sense",
}


def _size(value: float, start: float) -> str:
    if value < _HALF * start:
        return "less than half the"
    return "more than twice the" if value > start / _HALF else "much the same"


def _tokens(result: Explanation) -> Tokens:
    lines = [reading for reading in (result.prompt, result.plain) if reading is not None]
    every = [token for each in lines for token in each.tokens]
    harm, refusal = (max((getattr(t, name) for t in every), default=0.0) or 1.0 for name in ("harm", "refusal"))
    return Tokens(
        "Harm and refusal features, token by token",
        ("harm features", "refusal features"),
        tuple((_name(e), tuple(Token(t.text, t.harm / harm, t.refusal / refusal) for t in e.tokens)) for e in lines),
        caption="Sum of the features' activations at a token; the strongest token shown has the full colour: "
        f"{fmt.measure(harm)} of the harm, {fmt.measure(refusal)} of the refusal signal of a refused request. The "
        "template's tokens are shown as the model reads them",
    )


def _name(reading: Reading) -> str:
    return "prompt" if reading.name == "prompt" else "plain version"


def _readings(result: Explanation) -> Table:
    rows = [reading for reading in (result.prompt, result.plain) if reading is not None]
    harm, refusal = result.harmless
    return Table.of(
        "Signals",
        "what | > P(refuse) | > harm signal | > refusal signal | outcome",
        [
            *(
                [
                    *(_name(row), fmt.measure(row.p_refuse), fmt.measure(row.harm), fmt.measure(row.refusal)),
                    row.outcome or fmt.MISSING,
                ]
                for row in rows
            ),
            ["refused harmful prompts, mean", None, "1.00", "1.00", None],
            ["answered harmless prompts, mean", None, fmt.measure(harm), fmt.measure(refusal), None],
        ],
        caption="The harm signal is read on the user's words, the refusal signal on the template's tokens after them",
        strong=[0],
    )


def _changes(result: Explanation) -> Iterator[Block]:
    if not result.changes:
        return
    yield Table.of(
        "Restored or taken out",
        "what | > features | > P(refuse) | outcome",
        ([row.what, row.features, fmt.measure(row.p_refuse), row.outcome or fmt.MISSING] for row in result.changes),
        caption=f"Unchanged: P(refuse) {fmt.measure(result.prompt.p_refuse)}. An outcome that stays as it is would "
        "refute that these features decide it",
    )
    if result.patches:
        back = any(row.what == LOCAL and row.p_refuse >= _HALF for row in result.changes)
        yield Table.of(
            "Local patches" + ("" if back else ", which do not bring refusal back"),
            "feature | kind | at token | > here | > on the plain version",
            (
                [
                    *(str(row.feature), row.kind, f"'{fmt.token_text(row.token)}'"),
                    *(fmt.measure(row.before), fmt.measure(row.value)),
                ]
                for row in result.patches
            ),
            caption="The fewest features, each at one token, that bring refusal back when they are as on the plain "
            "version, found greedily",
        )


def _words(result: Explanation) -> Iterator[Block]:
    if result.words:
        agreed = spearman([row.ig for row in result.words], [row.refusal for row in result.words])
        yield Table.of(
            "Words that matter most when they are left out",
            "words | > refusal signal | > estimated: by integrated gradients | > harm signal | > P(refuse)",
            (
                [row.words, *(_signed(each) for each in (row.refusal, row.ig, row.harm, row.p_refuse))]
                for row in result.words[:_ROWS]
            ),
            caption="Change when the words are left out of the prompt: a rise says that they suppressed it. The "
            "estimate is of the refusal signal's (rank correlation over the "
            f"{len(result.words)} words {fmt.measure(agreed)})",
        )


def _signed(value: float) -> str:
    text = fmt.measure(value)
    return f"+{text}" if value > 0 and text != "0.00" else text


def _features(result: Explanation) -> Table:
    return Table.of(
        "Harm and refusal features",
        "feature | kind | > prompt | > plain version | > refused harmful prompts | > answered harmless prompts",
        (
            [
                *(str(row.feature), row.kind, fmt.measure(row.prompt), fmt.measure(row.plain)),
                *(fmt.measure(row.harmful), fmt.measure(row.harmless)),
            ]
            for row in result.levels
        ),
        caption="Activation: of harm features the maximum over the user's words, of refusal features the mean over the "
        "template's tokens after them; the most suppressed first",
        folded=len(result.levels) > 2 * _ROWS,
    )


def _answers(result: Explanation) -> Transcripts:
    changed = tuple((row.what, row.answer) for row in result.changes)
    shown = [Transcript(result.prompt.text, (("as it is", result.prompt.answer), *changed))]
    if result.plain is not None:
        shown.append(Transcript(result.plain.text, (("as it is", result.plain.answer),)))
    return Transcripts("Answers", tuple(shown), harmful=True)
