"""What the page of `demur checkpoints` says of a result made by hand: verdict, cells and what charts draw."""

from __future__ import annotations

from typing import Any

import pytest
from page_parts import about, blocks, cells

from demur.report import charts
from demur.report.blocks import Chart, Section, Table, Text
from demur.studies.checkpoints import (
    AnswerRow,
    BehaviourRow,
    CosineRow,
    FitRow,
    KnowingRow,
    PairRows,
    PointRow,
    Result,
    ShiftRow,
)
from demur.studies.checkpoints.rule import Condition, Mechanism, Verdict
from demur.types import FeatureId

HARM, TWIN, REFUSAL = FeatureId(0, 3), FeatureId(2, 4), FeatureId(2, 5)
DRIVES, DIRECTIONS = "Features of each in the other", "Directions by layer"
FEATURES, KNOWING = "Features kept, moved, gained and lost", "Recognised and refused"


def mechanism(n: int, *features: FeatureId) -> Mechanism:
    """Numbers `n`, `n` + 1, ... tenths."""
    own, other, carried, fires = (about((n + k) / 10) for k in range(4))
    return Mechanism(features=features, own=own, other=other, carried=carried, fires=fires)


def shift(feature: FeatureId, status: Any, n: int, **given: Any) -> ShiftRow:
    row: dict[str, Any] = {"refusal": False, **given}
    return ShiftRow(
        feature=feature, status=status, active_before=n + 0.25, active_after=n + 0.5, alone_before=about(n + 0.6),
        alone_after=about(n + 0.7), **row,
    )  # fmt: skip


def knowing(prompts: str, n: int) -> KnowingRow:
    names = ("harmful_before", "harmful_after", "harmful_change", "refuse_before", "refuse_after", "refuse_change",
             "ignored_before", "ignored_after")  # fmt: skip
    return KnowingRow(prompts=prompts, **{name: about((n + k) / 100, 0.01) for k, name in enumerate(names)})


def pair_of(before: str = "old", **changes: Any) -> PairRows:
    conditions = tuple(
        Condition(claim=f"claim {n}", needs=f"above {n}", estimate=about(n + 0.5), holds=holds)
        for n, holds in enumerate((True, False, None))
    )
    after, earlier = mechanism(11, REFUSAL, TWIN), mechanism(21, REFUSAL)
    points: Any = (
        ("after", "harmful", 0.9, 0.8), ("after", "harmful", 0.7, 0.6), ("before", "harmful", 0.5, 0.25),
        ("after", "harmless", 0.1, 0.05), ("before", "harmless", 0.3, 0.15),
    )  # fmt: skip
    given: dict[str, Any] = {
        "verdict": Verdict(kind="not clear", after="hidden", before="open", conditions=conditions),
        "mechanisms": {"after": after, "before": earlier},
        "stars": {"after": mechanism(31, REFUSAL, TWIN, HARM), "before": earlier},
        "behaviour": (
            BehaviourRow(prompts="harmful", after=about(0.7, n=40), before=about(0.3, n=41), difference=about(0.4),
                         p=0.005, p_holm=0.01),
            BehaviourRow(prompts="harmless", after=about(0.1), before=about(0.2), difference=about(-0.1), p=0.2,
                         p_holm=0.4),
        ),
        "answers": (
            AnswerRow(found="after", checkpoint="before", kind="suppress", clean=about(0.9), changed=about(0.2),
                      random=about(0.8), difference=about(-0.6), p=0.03),
            AnswerRow(found="before", checkpoint="after", kind="induce", clean=about(0.1), changed=about(0.6),
                      random=about(0.25), difference=about(0.35), p=0.5),
        ),
        "cosines": (CosineRow(layer=0, cosine=about(0.5), halves=0.75),
                    CosineRow(layer=1, cosine=about(0.25, 0.125), halves=0.875)),
        "features": (
            shift(REFUSAL, "kept", 1, refusal=True),
            shift(HARM, "moved", 2, partner=TWIN, cosine=0.9),
            shift(TWIN, "moved", 3, partner=HARM, cosine=0.9),
            shift(FeatureId(3, 1), "lost", 4),
        ),
        "knowing": (knowing("harmful", 20), knowing("harmless", 40)),
        "points": tuple(
            PointRow(checkpoint=when, prompts=prompts, harmful=harmful, refuse=refuse)
            for when, prompts, harmful, refuse in points
        ),
        "fit": (FitRow(layer=0, after=0.25, before=0.5), FitRow(layer=2, after=0.125, before=0.75)),
    }  # fmt: skip
    return PairRows(before=before, **(given | changes))


def compared(*pairs: PairRows, **changes: Any) -> Result:
    found = pairs or (pair_of(**changes),)
    return Result(study="checkpoints", model="new", factor=-1.5, margin=0.1, pairs=found)


def verdict_of(**changes: Any) -> str:
    (said,) = compared(**changes).page().verdicts
    return said


def ordered(text: str, *parts: str) -> bool:
    """Whether the parts follow each other in the text."""
    place = 0
    return all((place := text.find(part, place)) >= 0 for part in parts)


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_the_verdict_names_what_is_found_in_each_and_what_it_is_in_the_other() -> None:
    said = verdict_of(before="runs/old/model")
    assert said.startswith("From old to MODEL: not clear: ")
    assert ordered(
        said, "Of the 2 refusal features found after", "they fire there and do not drive refusal", "1.30 [1.25–1.35]",
        "of the 1 refusal features found before", "whether they drive refusal there is not clear", "2.30 [2.25–2.35]",
        "Refusal of harmful prompts changed by +40 [35 to 45] points.",
    )  # fmt: skip
    assert "another mechanism" not in said


def test_another_mechanism_in_the_place_of_a_hidden_one_is_named() -> None:
    verdict = Verdict(kind="hidden", after="silent", before="hidden", new_too=True)
    said = verdict_of(verdict=verdict)
    assert ordered(said, "hidden: ", "another mechanism", "Of the 2")
    assert "another mechanism" not in verdict_of(verdict=verdict.model_copy(update={"new_too": False}))


def test_a_checkpoint_without_f_star_is_left_out_of_the_verdict() -> None:
    found = mechanism(21, REFUSAL)
    said = verdict_of(mechanisms={"before": found}, stars={"before": found})
    assert "found after" not in said
    assert ordered(said, "Of the 1 refusal features found before", "whether they drive refusal there is not clear")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("new mechanism", "did not drive it before"),
        ("amplified", "the same features drive refusal, and more strongly"),
        ("weakened", "the same features drive refusal, and less strongly"),
        ("hidden", "still fire on harmful prompts, but no longer drive it"),
        ("removed", "neither fire nor drive it now"),
        ("no change", "as strongly"),
        ("not clear", "more than one"),
    ],
)
def test_every_kind_of_change_is_told_in_its_own_words(kind: Any, words: str) -> None:
    said = verdict_of(verdict=Verdict(kind=kind, after="none", before="none"))
    assert said.startswith(f"From old to MODEL: {kind}: ")
    assert words in said.partition(". ")[0]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("unproven", "no more than random features"),
        ("drives", "they drive refusal there, too"),
        ("hidden", "they fire there and do not drive"),
        ("silent", "they neither fire nor drive"),
        ("undriven", "whether they fire is not clear"),
        ("open", "whether they drive refusal there is not clear"),
    ],
)
def test_every_state_is_told_in_its_own_words(state: Any, words: str) -> None:
    for when in ("after", "before"):
        states: dict[str, Any] = {"after": "drives", "before": "drives", when: state}
        found = {when: mechanism(11, REFUSAL)}
        assert words in verdict_of(verdict=Verdict(kind="not clear", **states), mechanisms=found, stars=found)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_what_the_verdict_rests_on_stands_in_its_columns() -> None:
    section = compared(pair_of("runs/old/model")).page().sections[0]
    assert (section.title, section.brief) == ("From old to MODEL", True)
    rests, behaviour = (block for block in section.blocks if isinstance(block, Table))
    assert rests.rows == (
        ("claim 0", "above 0", "0.50 [0.45–0.55]", "yes"),
        ("claim 1", "above 1", "1.50 [1.45–1.55]", "no"),
        ("claim 2", "above 2", "2.50 [2.45–2.55]", "not clear"),
    )
    assert behaviour.rows == (
        ("harmful", "40", "30% [25–35]", "70% [65–75]", "+40 [35 to 45]", "0.010"),
        ("harmless", "20", "20% [15–25]", "10% [5–15]", "−10 [−15 to −5]", "0.40"),
    )


def test_drives_of_the_refusal_features_and_of_the_whole_set_stand_in_their_columns() -> None:
    assert cells(compared(), DRIVES) == [
        ("refusal features", "after", "2", "1.10 [1.05–1.15]", "1.20 [1.15–1.25]", "1.30 [1.25–1.35]",
         "1.40 [1.35–1.45]"),
        ("refusal features", "before", "1", "2.10 [2.05–2.15]", "2.20 [2.15–2.25]", "2.30 [2.25–2.35]",
         "2.40 [2.35–2.45]"),
        # The earlier F* is its refusal features: one row.
        ("F*", "after", "3", "3.10 [3.05–3.15]", "3.20 [3.15–3.25]", "3.30 [3.25–3.35]", "3.40 [3.35–3.45]"),
    ]  # fmt: skip
    alike = pair_of().mechanisms
    assert len(cells(compared(stars=alike), DRIVES)) == 2
    assert [row[:3] for row in cells(compared(stars=dict.fromkeys(alike, mechanism(31, HARM))), DRIVES)[2:]] == [
        ("F*", "after", "1"), ("F*", "before", "1"),
    ]  # fmt: skip


def test_answers_and_fit_stand_in_their_columns() -> None:
    drives, answers, fit = blocks(compared(), Table, DRIVES)
    assert answers.rows == (
        ("suppress", "after", "before", "90% [85–95]", "20% [15–25]", "80% [75–85]", "−60 [−65 to −55]", "0.030"),
        ("induce", "before", "after", "10% [5–15]", "60% [55–65]", "25% [20–30]", "+35 [30 to 40]", "0.50"),
    )
    assert fit.rows == (("0", "0.50", "0.25"), ("2", "0.75", "0.12"))
    assert [table.folded for table in (drives, answers, fit)] == [False, False, True]
    assert "c = −1.5 " in drives.caption
    assert "c = −1.5." in answers.caption


def test_features_stand_in_their_columns_and_are_counted_by_what_became_of_them() -> None:
    (table,) = blocks(compared(), Table, FEATURES)
    assert table.folded
    assert table.rows == (
        ("2:5", "kept", "refusal", "–", "1.25", "1.50", "1.60 [1.55–1.65]", "1.70 [1.65–1.75]"),
        ("0:3", "moved", "–", "2:4 (0.90)", "2.25", "2.50", "2.60 [2.55–2.65]", "2.70 [2.65–2.75]"),
        ("2:4", "moved", "–", "0:3 (0.90)", "3.25", "3.50", "3.60 [3.55–3.65]", "3.70 [3.65–3.75]"),
        ("3:1", "lost", "–", "–", "4.25", "4.50", "4.60 [4.55–4.65]", "4.70 [4.65–4.75]"),
    )
    (text,) = blocks(compared(), Text, FEATURES)
    assert text.text.endswith(": 1 kept, 2 moved, 1 lost.")


def test_what_is_recognised_and_what_is_refused_stand_in_their_columns() -> None:
    (table,) = blocks(compared(), Table, KNOWING)
    assert not table.folded
    assert table.rows == (
        ("harmful", "0.20 [0.19–0.21]", "0.21 [0.20–0.22]", "0.22 [0.21–0.23]", "0.23 [0.22–0.24]", "0.24 [0.23–0.25]",
         "0.25 [0.24–0.26]", "26% [25–27]", "27% [26–28]"),
        ("harmless", "0.40 [0.39–0.41]", "0.41 [0.40–0.42]", "0.42 [0.41–0.43]", "0.43 [0.42–0.44]",
         "0.44 [0.43–0.45]", "0.45 [0.44–0.46]", "46% [45–47]", "47% [46–48]"),
    )  # fmt: skip


# -- charts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(name="undrawn")
def charts_told_what_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("line_chart", "scatter"):
        monkeypatch.setattr(charts, name, lambda lines, name=name, **options: (name, lines, options))


@pytest.mark.usefixtures("undrawn")
def test_each_prompt_is_a_point_in_the_chart_of_its_checkpoint() -> None:
    before, after = blocks(compared(), Chart, KNOWING)
    found: list[Any] = []
    # Both are drawn only after both were made: neither may draw what the other does.
    for chart in (before, after):
        kind, lines, options = chart.draw()
        assert (kind, options) == ("scatter", {"x_title": "P(harmful)", "y_title": "P(refuse)"})
        assert {each.join for each in lines} == {"none"}
        assert not any(point.chosen for each in lines for point in each.points)
        found.append({each.name: [(point.x, point.y) for point in each.points] for each in lines})
    assert found == [
        {"harmful": [(0.5, 0.25)], "harmless": [(0.3, 0.15)]},
        {"harmful": [(0.9, 0.8), (0.7, 0.6)], "harmless": [(0.1, 0.05)]},
    ]
    assert (before.title.endswith("before"), after.title.endswith("after")) == (True, True)


@pytest.mark.usefixtures("undrawn")
def test_directions_are_drawn_with_their_yardstick_and_stand_in_their_columns() -> None:
    (chart,) = blocks(compared(), Chart, DIRECTIONS)
    kind, (own, halves), options = chart.draw()
    assert (kind, options["share"], bool(options["x_title"]), bool(options["y_title"])) == (
        "line_chart", False, True, True,
    )  # fmt: skip
    told = {"after": own.name.startswith("after"), "halves": "halves" in halves.name}
    assert told == {"after": True, "halves": True}
    assert [(p.x, p.y, p.low, p.high, p.chosen) for p in own.points] == [
        (0, 0.5, 0.45, 0.55, False), (1, 0.25, 0.125, 0.375, False),
    ]  # fmt: skip
    assert [(p.x, p.y) for p in halves.points] == [(0, 0.75), (1, 0.875)]
    assert (own.join, halves.join) == ("line", "line")
    (table,) = blocks(compared(), Table, DIRECTIONS)
    assert table.rows == (("0", "0.50 [0.45–0.55]", "0.75"), ("1", "0.25 [0.12–0.38]", "0.88"))
    assert table.folded


def test_every_chart_can_be_drawn() -> None:
    assert all(chart.draw() is not None for chart in blocks(compared(), Chart))


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_each_earlier_checkpoint_has_its_own_sections() -> None:
    page = compared(
        pair_of("old"), pair_of("older", cosines=(CosineRow(layer=3, cosine=about(0.1), halves=0.2),))
    ).page()
    own: list[Section] = list(page.sections)
    titles = [DRIVES, DIRECTIONS, FEATURES, KNOWING]
    assert [section.title for section in own] == ["From old to MODEL", *titles, "From older to MODEL", *titles]
    assert [section.brief for section in own] == [True, *[False] * 4] * 2
    assert ["intro" if section.intro else "" for section in own] == ["", "intro", "intro", "", "intro"] * 2
    assert [said.partition(":")[0] for said in page.verdicts] == ["From old to MODEL", "From older to MODEL"]
    tables = blocks(compared(*(pair_of(), pair_of(cosines=()))), Table, DIRECTIONS)
    assert [len(table.rows) for table in tables] == [2, 0]
    assert compared().page().title == "demur checkpoints: new"
