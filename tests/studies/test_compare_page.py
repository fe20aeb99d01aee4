"""What the page of `demur study` and `demur benchmark` says of results made by hand: each number in its place."""

from __future__ import annotations

from typing import Any

import pytest
from page_parts import about, blocks, cells

from demur.capability import CapabilityRow
from demur.report import charts
from demur.report.blocks import Chart, Section, Table, Text, Transcripts
from demur.studies.config import COMPLIANCE, MAIN
from demur.studies.results import (
    CompareResult,
    Comparison,
    ControlRow,
    DirectionInfo,
    EffectRow,
    EstimatorRow,
    FeatureRow,
    Knowledge,
    MethodExtras,
    Sample,
    SideEffects,
    SizeRow,
    SplitUse,
    Trial,
)
from demur.types import Candidate, FeatureId, FeatureSet, Outcome, RefusalToken

AP, DIRECTION, RANDOM = "ap", "direction", "random"
LABELS = {MAIN: "F*", AP: "AP", DIRECTION: "Direction", RANDOM: "Random"}
A, B, C = FeatureId(0, 3), FeatureId(2, 5), FeatureId(2, 7)


def effect(prompts: Any, kind: Any, method: str, strength: float, n: int, **given: Any) -> EffectRow:
    """Every rate is another one, by `n`, in hundredths."""
    row: dict[str, Any] = {
        "setting": f"c = {strength:g}", "refusal": about(n / 100, 0.01), "compliance": about((n + 1) / 100, 0.01, n=40),
        "incoherent": about((n + 2) / 100), "outcomes": {}, "attack": {"guard": about((n + 3) / 100, 0.01)},
        "kept": about((n + 4) / 100, 0.01), "exact_match": about((n + 5) / 100), "repaired": about((n + 6) / 100, 0.01),
        "p_clean": n / 1000, "chosen": True,
    }  # fmt: skip
    return EffectRow(prompts=prompts, kind=kind, method=method, strength=strength, **(row | given))


def costs(n: int) -> dict[str, SideEffects]:
    ce = about(n / 1000, 0.001, n=n)
    return {"side_effects": SideEffects(ce_answers=ce, ce_text=about(n / 500, 0.001), kl=about(n / 200, 0.001))}


def comparison(other: str, difference: float | None, p: float, **given: Any) -> Comparison:
    row: dict[str, Any] = {
        "measure": COMPLIANCE, "level": None, "setting": "c = -1", "other_setting": "c = 0", "value": about(0.8),
        "other_value": about(0.6), "difference": None if difference is None else about(difference), "p": p / 2,
    }  # fmt: skip
    return Comparison(other=other, p_holm=p, **(row | given))


def control(kind: Any, value: float, **given: Any) -> ControlRow:
    row: dict[str, Any] = {"control": RANDOM, "prompts": "harmful", "measure": "compliance", "sets": (0.1, 0.3, 0.05)}
    return ControlRow(kind=kind, value=value, low=0.02, high=0.42, p=0.25, **(row | given))


def trial(method: str, number: int, chosen: bool, front: bool) -> Trial:
    return Trial(
        method=method, number=number, layer=2, position=-3, k0=10, k=7, strength=-1.5, compliance=about(number / 10),
        ce_answers=about((9 - number) / 1000, 0.0001), front=front, chosen=chosen, stability=0.7 if chosen else None,
    )  # fmt: skip


def capability(value: float, intervention: str, digest: str = "d") -> CapabilityRow:
    return CapabilityRow(
        task="quiz", metric="acc", value=value, stderr=0.1, n=4, shots=0, higher_is_better=True, version="1",
        harness="0", digest=digest, intervention=intervention, scores=(1.0, 0.0, value, value),
    )  # fmt: skip


def compared(**changes: Any) -> CompareResult:
    unscored = about(0.1, n=37).model_copy(update={"unscored": 3})
    clean = [
        effect(prompts, "none", "none", 0, n, setting="", p_clean=None, chosen=False)
        for prompts, n in (("harmful", 90), ("harmless", 2), ("over-refusal", 6))
    ]
    rows = [
        effect("harmful", "suppress", MAIN, -1, 20, **costs(30)),
        effect("harmful", "suppress", MAIN, 0.5, 40, chosen=False, **costs(10)),
        effect("harmful", "suppress", AP, 0, 25, **costs(15)),
        effect("harmful", "suppress", RANDOM, -1, 80, sets=3, compliance=unscored),
        effect("harmful", "suppress", DIRECTION, 1, 30, setting="", **costs(20)),
        effect("harmless", "suppress", MAIN, -1, 10),
        effect("harmless", "induce", MAIN, 2, 70, setting="2 × max"),
        effect("harmless", "induce", AP, 1, 60, setting="1 × max"),
    ]  # fmt: skip
    chosen = Candidate(layer=4, position=-2, form="linear", bypass=-3.5, induce=2.5, kl=0.0625, kept=True)
    other = chosen.model_copy(update={"layer": 5, "kept": False, "bypass": 1.5})
    sets = {MAIN: (B, A), AP: (B, C), DIRECTION: (C,)}
    asked = Knowledge(says_harmful=about(0.9), says_harmful_of_harmless=about(0.2), auroc=about(0.85))
    given: dict[str, Any] = {
        "k": 2, "pool_size": 40, "labels": LABELS, "controls_drawn": (RANDOM,), "harm_judges": ("guard",),
        "splits": (SplitUse(split="test", label="harmful", n=9, refused=8, complied=1, used=7),),
        "refusal_tokens": (RefusalToken(token_id=1, text=" I", share=0.75),),
        "direction": DirectionInfo(chosen=chosen, token="\n", norm=1.0, candidates=(chosen, other)),
        "without_signal": 0.125,
        "features": (
            FeatureRow(feature=B, score=2.5, cosine=0.25, exact=2.0, rate_harmful=0.5, rate_harmless=0.1,
                       max_harmful=4.0),
            FeatureRow(feature=A, score=1.5, cosine=-0.5, exact=None, rate_harmful=0.3, rate_harmless=0.2,
                       max_harmful=3.0),
        ),
        "estimators": tuple(
            EstimatorRow(method=name, steps=n, n=12, spearman=about(0.9), spearman_prompt=0.8, gap=0.125,
                         gap_relative=0.05, used=name == "ig")
            for name, n in (("gradient", 1), ("ig", 10))
        ),
        "local_overlap": 0.375,
        "sets": {
            name: FeatureSet(features=each, scores=(1.0,) * len(each), scope="global", method="m")
            for name, each in sets.items()
        },
        "effects": (*clean, *rows), "controls": (control("suppress", 0.9), control("induce", 0.3, measure="refusal")),
        "comparisons": (
            comparison(AP, 0.2, 0.04), comparison(DIRECTION, -0.2, 0.01), comparison(RANDOM, 0.7, 0.001),
            comparison(AP, 0.3, 0.3, level=0.05), comparison(DIRECTION, None, 0.01, level=0.05),
            comparison(AP, 0.4, 0.01, level=0.1), comparison(AP, -0.1, 0.02, level=0.1, measure="guard"),
        ),
        "sizes": (
            SizeRow(size=2, setting="c = -1", refusal=about(0.2), compliance=about(0.7), incoherent=about(0.1),
                    ce_answers=about(0.0125, 0.0001)),
            SizeRow(size=4, setting="c = -1", refusal=about(0.1), compliance=about(0.8), incoherent=about(0.05),
                    ce_answers=about(0.025, 0.0001)),
        ),
        "trials": (trial(MAIN, 1, False, True), trial(MAIN, 3, True, True), trial(MAIN, 2, False, False),
                   trial(AP, 4, True, True)),
        "extras": (
            MethodExtras(method="none", knowledge=asked, capability=(capability(0.5, "none"),)),
            MethodExtras(method=MAIN, setting="c = -1", capability=(capability(0.25, "x"),)),
            MethodExtras(method=AP, setting="c = 0", capability=(capability(0.75, "y", "other"),)),
        ),
        "samples": tuple(
            Sample(prompt_id=id, prompt=f"ask {id}", label=label,  # pyright: ignore[reportArgumentType]
                   method=method, kind="none", setting=setting, text=text, outcome=outcome)
            for id, label, method, setting, text, outcome in (
                ("1", "harmful", "none", "", "no", Outcome.REFUSAL),
                ("2", "harmless", "none", "", "yes", Outcome.COMPLIANCE),
                ("1", "harmful", MAIN, "c = -1", "well", Outcome.PARTIAL_REFUSAL),
                ("1", "harmful", AP, "c = 0", "?", None),
            )
        ),
        "counters": {"answers": (1200, 3)}, "usage": {"a judge": "5 requests"},
    }  # fmt: skip
    return CompareResult(study="benchmark", **(given | changes))


def without(method: str, prompts: str, kind: str) -> tuple[EffectRow, ...]:
    return tuple(r for r in compared().effects if (r.method, r.prompts, r.kind) != (method, prompts, kind))


def ordered(text: str, *parts: str) -> bool:
    """Whether the parts follow each other in the text."""
    place = 0
    return all((place := text.find(part, place)) >= 0 for part in parts)


def test_the_headline_names_what_f_star_does_and_what_random_sets_do_instead() -> None:
    (said, *_) = compared().page().verdicts
    assert ordered(
        said,
        "With 2 features scaled by −1", "complies with 21% [20–22] of 40 harmful prompts", "(clean: 91% [90–92])",
        "22% of its answers", "Random 15% (3 sets, 5% to 30%)", "still answers 14% [13–15]",
        "Set to 2 × max, they make it refuse 70% [69–71]", "(clean: 2% [1–3])",
        "F* is within the range of one more draw",
    )  # fmt: skip
    (one, *_) = compared(k=1).page().verdicts
    assert "With 1 feature scaled" in one
    assert "it makes the model refuse" in one
    assert "still answers" not in compared(effects=without(MAIN, "harmless", "suppress")).page().verdicts[0]
    assert "Set to" not in compared(effects=without(MAIN, "harmless", "induce")).page().verdicts[0]
    assert compared(effects=without("none", "harmful", "none")).page().verdicts[0].startswith("Set to")
    assert compared(effects=()).page().verdicts[0].startswith("No chosen intervention")


@pytest.mark.parametrize(("value", "inside"), [(0.02, 1), (0.42, 1), (0.019, 0), (0.421, 0)])
def test_one_more_draw_is_within_the_interval_ends_included(value: float, inside: int) -> None:
    said = compared(controls=(control("suppress", value),)).page().verdicts[0]
    assert said.count("within the range") == inside


def test_what_f_star_outdid_is_said_at_its_own_strengths_and_at_the_highest_cost() -> None:
    (text,) = [text for text in blocks(compared(), Text, "Verdict") if "own chosen strength" in text.text]
    assert ordered(
        text.text, "At each method's own chosen strength, F* gets more", "than AP;", "gets fewer than Direction.",
        "At ΔCE 0.1, F* gets more", "than AP",
    )  # fmt: skip
    assert "Random" not in text.text
    assert "0.05" not in text.text
    few = compared(comparisons=tuple(row for row in compared().comparisons if row.level is None))
    assert not [text for text in blocks(few, Text, "Verdict") if "own chosen strength" in text.text]


def test_the_summary_has_a_row_for_each_method_with_each_number_in_its_column() -> None:
    (table,) = blocks(compared(), Table, "Summary")
    assert table.rows == (
        ("clean model", "40", "91% [90–92]", "92%", "3%", "–", "2% [1–3]"),
        ("F*, c = -1", "40", "21% [20–22]", "22%", "14%", "0.030", "70% [69–71]"),
        ("AP, c = 0", "40", "26% [25–27]", "27%", "–", "0.015", "60% [59–61]"),
        ("Direction", "40", "31% [30–32]", "32%", "–", "0.020", "–"),
        ("Random, c = -1 (3 sets)", "37+3", "10% [5–15]", "82%", "–", "–", "–"),
    )
    assert table.strong == {1}


def test_a_method_that_suppresses_nothing_is_left_out_of_the_summary_and_the_next_ones_are_not() -> None:
    (table,) = blocks(compared(effects=without(AP, "harmful", "suppress")), Table, "Summary")
    assert [row[0] for row in table.rows] == ["clean model", "F*, c = -1", "Direction", "Random, c = -1 (3 sets)"]
    (table,) = blocks(compared(effects=without("none", "harmful", "none")), Table, "Summary")
    assert [row[0] for row in table.rows[:2]] == ["F*, c = -1", "AP, c = 0"]
    assert table.strong == {0}


def test_effects_stand_under_their_prompts_with_each_number_in_its_column() -> None:
    result = compared()
    (table,) = blocks(result, Table, "Suppression, harmful test prompts")
    assert table.rows[:4] == (
        ("clean model", "20", "90% [89–91]", "91% [90–92]", "92%", "93% [92–94]", "94% [93–95]", "95%", "–"),
        ("F*, c = -1 *", "20", "20% [19–21]", "21% [20–22]", "22%", "23% [22–24]", "24% [23–25]", "25%", "0.020"),
        ("F*, c = 0.5", "20", "40% [39–41]", "41% [40–42]", "42%", "43% [42–44]", "44% [43–45]", "45%", "0.040"),
        ("AP, c = 0 *", "20", "25% [24–26]", "26% [25–27]", "27%", "28% [27–29]", "29% [28–30]", "30%", "0.025"),
    )
    assert table.strong == {1}
    (other,) = blocks(result, Table, "Suppression, harmless test prompts")
    assert other.rows[1] == (
        "F*, c = -1 *", "20", "10% [9–11]", "11% [10–12]", "12%", "14% [13–15]", "15%", "16% [15–17]", "0.010",
    )  # fmt: skip
    assert [row[0] for row in cells(result, "Induction, harmless test prompts")] == [
        "clean model", "F*, 2 × max *", "AP, 1 × max *",
    ]  # fmt: skip
    # Only the clean model was asked.
    assert not blocks(result, Table, "Suppression, over-refusal prompts")


def test_controls_comparisons_and_side_effects_stand_in_their_columns() -> None:
    result = compared()
    assert cells(result, "Controls") == [
        ("Random", "compliance, harmful prompts", "90%", "15% (5% to 30%)", "3", "2% to 42%", "0.25"),
        ("Random", "refusal, harmful prompts", "30%", "15% (5% to 30%)", "3", "2% to 42%", "0.25"),
    ]
    own, low, high, judged = blocks(result, Table, "F* against other methods")
    assert own.rows[0] == ("AP, c = 0", "80% [75–85]", "60% [55–65]", "+20 [15 to 25]", "0.040", "F* more")
    assert [row[-1] for row in own.rows] == ["F* more", "F* fewer", "F* more"]
    assert own.strong == {0, 1, 2}
    assert [row[3:] for row in low.rows] == [("+30 [25 to 35]", "0.30", "not clear"), ("–", "–", "–")]
    assert (low.strong, "0.05" in low.title, "0.1" in high.title, "guard" in judged.title) == (set(), True, True, True)
    assert judged.rows[0][-1] == "F* fewer"
    costs_of = blocks(result, Table, "Side effects")
    assert costs_of[0].rows[0] == (
        "F*, c = -1",
        "0.030 [0.029–0.031]",
        "30",
        "0.060 [0.059–0.061]",
        "0.150 [0.149–0.151]",
    )
    assert ([row[0] for row in costs_of[0].rows], costs_of[0].strong) == (["F*, c = -1", "AP, c = 0", "Direction"], {0})
    assert costs_of[1].rows == (("clean model", "0.85 [0.80–0.90]", "90% [85–95]", "20% [15–25]"),)
    tasks = costs_of[2].rows
    assert [row[:4] + row[5:] for row in tasks] == [
        (name, "quiz", "acc", value, "4")
        for name, value in (("clean model", "0.500"), ("F*, c = -1", "0.250"), ("AP, c = 0", "0.750"))
    ]
    # Differences of two of four documents by a quarter; other questions are no comparison.
    assert (tasks[0][4], tasks[1][4][:6], tasks[2][4]) == ("–", "−0.125", "–")


@pytest.mark.parametrize(
    ("difference", "p", "said"),
    [(0.2, 0.049, "F* more"), (0.2, 0.05, "not clear"), (-0.2, 0.049, "F* fewer"), (0.0, 0.01, "not clear"),
     (0.2, float("nan"), "–"), (float("nan"), 0.01, "–")],
)  # fmt: skip
def test_a_finding_takes_an_adjusted_p_below_5_percent(difference: float, p: float, said: str) -> None:
    rows = (comparison(AP, difference, p), comparison(AP, 0.1, 0.5, level=0.1))
    assert cells(compared(comparisons=rows), "F* against other methods")[0][-1] == said


def test_features_sizes_and_trials_stand_in_their_columns() -> None:
    result = compared()
    assert cells(result, "Features") == [
        ("2:5", "2.500", "2.000", "0.250", "50%", "10%", "4.00"), ("0:3", "1.500", "–", "−0.500", "30%", "20%", "3.00"),
    ]  # fmt: skip
    table = blocks(result, Table, "Features")[1]
    assert table.rows == (
        ("F*", "2", "1 in 0, 1 in 2", "2"), ("AP", "2", "2 in 2", "1"), ("Direction", "1", "1 in 2", "0"),
    )  # fmt: skip
    assert "38%" in table.caption
    (sizes,) = blocks(result, Table, "Sizes of F*")
    assert sizes.rows[1] == ("4", "10% [5–15]", "80% [75–85]", "5%", "0.0250 [0.0249–0.0251]")
    assert sizes.strong == {0}
    assert cells(result, "Search for settings") == [
        ("F*", "3", "2", "−3", "10", "7", "−1.5", "30% [25–35]", "0.0060 [0.0059–0.0061]", "70%"),
        ("AP", "1", "2", "−3", "10", "7", "−1.5", "40% [35–45]", "0.0050 [0.0049–0.0051]", "70%"),
    ]
    (estimators,) = blocks(result, Table, "Estimators")
    assert estimators.rows[1] == ("ig (used)", "10", "12", "0.90 [0.85–0.95]", "0.80", "0.12", "5%")
    assert (estimators.rows[0][0], estimators.strong) == ("gradient", {1})
    assert cells(result, "Prompts") == [("test", "harmful", "9", "8", "1", "7")]
    notes = " ".join(text.text for text in blocks(result, Text, "Prompts"))
    assert ordered(notes, "' I' (75%)", "12%", "1,200 computed, 3 found", "a judge used: 5 requests")
    (direction,) = blocks(result, Text, "Direction")
    assert ordered(direction.text, "Layer 4, position −2", "\\n", "−3.50", "2.50", "0.062")


def test_answers_are_shown_under_their_prompts() -> None:
    harmful, harmless = blocks(compared(), Transcripts)
    assert [(t.prompt, t.answers) for t in harmful.transcripts] == [
        ("ask 1", (("clean model · refusal", "no"), ("F*, c = -1 · partial refusal", "well"), ("AP, c = 0 · unscored",
            "?")))
    ]  # fmt: skip
    assert [(t.prompt, t.answers) for t in harmless.transcripts] == [("ask 2", (("clean model · compliance", "yes"),))]
    assert (harmful.harmful, harmless.harmful) == (True, False)


def test_sections_without_results_are_left_out_and_the_first_two_are_brief() -> None:
    bare = compared(
        controls=(), comparisons=(), sizes=(), trials=(), estimators=(), extras=(), samples=(), counters={}, usage={}
    )
    empty = {"Controls", "F* against other methods", "Sizes of F*", "Search for settings", "Estimators", "Answers"}
    titles = {section.title for section in compared().page().sections}
    assert titles - {section.title for section in bare.page().sections} == empty
    sections: list[Section] = list(compared().page().sections)
    assert [section.title for section in sections if section.brief] == ["Verdict", "Summary"]


def test_curves_are_drawn_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scatter_lines", "line_chart", "bar_chart", "heatmap"):
        monkeypatch.setattr(charts, name, lambda drawn, **options: (drawn, options))

    def curves(section: str, n: int = 0, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        series, options = blocks(compared(**changes), Chart, section)[n].draw()
        return {each.name: [(p.x, round(p.y, 3), p.chosen) for p in each.points] for each in series}, options

    found, options = curves("Suppression, harmful test prompts")
    assert found == {"F*": [(-1, 0.2, True), (0.5, 0.4, False)], "AP": [(0, 0.25, True)], "Random": [(-1, 0.8, True)]}
    assert options["rules"] == {"clean model": 0.9, "Direction": 0.3}
    assert (options["reverse"], options["order"]) == (True, list(LABELS.values()))
    several = (*compared().effects, effect("harmless", "induce", AP, 4, 65, setting="4 × max", chosen=False))
    found, options = curves("Induction, harmless test prompts", effects=several)
    assert (found["AP"], options["reverse"]) == ([(1, 0.6, True), (4, 0.65, False)], False)
    # From mild to strong.
    found, options = curves("F* against other methods")
    assert found == {
        "F*": [(0.01, 0.41, False), (0.03, 0.21, True)], "AP": [(0.015, 0.26, True)], "Direction": [(0.02, 0.31, True)],
    }  # fmt: skip
    assert options["guides"] == [0.05, 0.1]
    assert curves("F* against other methods", 1)[0]["AP"] == [(0.015, 0.28, True)]
    spans = (*compared().effects, effect("harmful", "suppress", DIRECTION, 3, 33, setting="3 dimensions", chosen=False))
    found, _ = curves("Sizes of F*", effects=spans)
    assert found == {"F*": [(2, 0.2, True), (4, 0.1, False)], "Direction": [(3, 0.33, False)]}
    found, _ = curves("Search for settings")
    assert found == {"F*": [(0.006, 0.3, True), (0.008, 0.1, False)], "AP": [(0.005, 0.4, True)]}
    bars, _ = blocks(compared(), Chart, "Features")[0].draw()
    assert [tuple(bar) for bar in bars] == [("2:5", 2.5, 2, 2.0), ("0:3", 1.5, 0, None)]
    drawn, options = blocks(compared(), Chart, "Direction")[0].draw()
    assert options["low_is_strong"]
    assert [(cell.row, cell.column, cell.value, cell.kept, cell.chosen) for cell in drawn] == [
        (4, -2, -3.5, True, True), (5, -2, 1.5, False, False),
    ]  # fmt: skip
