"""What the page of `demur features` says of cards made by hand: each number in its place, and how far labels go."""

from __future__ import annotations

from typing import Any

import pytest
from page_parts import about, blocks, cells, points

from demur.report import format as fmt
from demur.report.blocks import Chart, Table, Text
from demur.stats import Estimate
from demur.studies.descriptions import Described, Description
from demur.studies.features import Card, Example, Result, Spread
from demur.studies.roles import FeatureRole
from demur.types import FeatureId

A, B, C = (FeatureId(n, n + 3) for n in range(3))


def card(feature: FeatureId, role: Any, score: float | None, **given: Any) -> Card:
    n = feature.layer + 1
    return Card(
        role=FeatureRole(feature=feature, role=role, instruction=0.5, post_instruction=0.25, share=about(n / 10)),
        score=score,
        tokens=((f"tok{n}", 3.0, 2), (f"other{n}", 1.0, 4)),
        examples=(
            Example(prompt=f"prompt {n}", label="harmful", token=f"at{n}", activation=7.5),
            Example(prompt="second", label="harmless", token="x", activation=2.0),
        ),
        promotes=(f"up{n}", "high"),
        demotes=("down",),
        edges=(0.0, 1.0, 2.0),
        spreads=(
            Spread(label="harmful", region="instruction", fires=about(0.75), counts=(1, 3)),
            Spread(label="harmless", region="post-instruction", fires=about(0.0), counts=(0, 0)),
        ),
        **given,
    )


def result(**given: Any) -> Result:
    cards = (card(A, "refusal", 1.25), card(B, "mixed", 0.5), card(C, "harm", None))
    return Result.model_validate({"study": "features", "model": "m", "cards": cards, **given})


def described(gain: Estimate, *rows: Description) -> Described:
    return Described(
        source="top-tokens", reader="words", rows=rows, own=about(0.9, n=2), shuffled=about(0.6, n=2), gain=gain
    )


def test_the_table_has_a_row_for_each_card_and_f_star_is_strong() -> None:
    (table, *_) = blocks(result(), Table, "Feature cards")
    rows = cells(result(), "Feature cards")
    assert [row[:3] for row in rows] == [
        (str(A), "refusal", fmt.measure(1.25, 3)), (str(B), "mixed", fmt.measure(0.5, 3)), (str(C), "harm", "–"),
    ]  # fmt: skip
    assert [row[3] for row in rows] == [fmt.rate_text(about(n / 10)) for n in (1, 2, 3)]
    assert [row[4:] for row in rows] == [
        tuple(" ".join(map(fmt.token_text, each)) for each in ((f"tok{n}", f"other{n}"), (f"up{n}", "high")))
        for n in (1, 2, 3)
    ]
    assert list(table.strong) == [0, 1]
    assert len(table.columns) == 6
    assert result().page().verdicts == (
        "Of the 2 features of F*, 1 fire where the answer begins (refusal), 0 on the user's words (harm) and 1 on both "
        "or neither.",
    )
    assert len(blocks(result(), Table, "Feature cards")) == 1
    assert [text.role for text in blocks(result(), Text, "Feature cards")] == ["verdict"]


def test_descriptions_of_neuronpedia_and_links() -> None:
    cards = (card(A, "refusal", 1.25, description="kettles", url="there/a"), card(C, "harm", None, url="there/c"))
    shown = result(cards=cards, list_url="there/list")
    (table, links) = blocks(shown, Table, "Feature cards")
    assert [row[6:] for row in table.rows] == [("kettles",), ("",)]
    assert "Neuronpedia" in str(table.columns[6])
    assert [tuple(row) for row in links.rows] == [(str(A), "there/a"), (str(C), "there/c")]
    assert links.folded
    (_, note) = blocks(shown, Text, "Feature cards")
    assert (note.role, "there/list" in note.text) == ("note", True)


def test_labels_stand_beside_how_they_did() -> None:
    rows = (
        Description(feature=A, text="kettles", own=about(0.9), shuffled=about(0.5)),
        Description(feature=C, text="ovens", own=about(0.8), shuffled=about(0.4)),
    )
    cards = (card(A, "refusal", 1.25, description="kettles"), card(C, "harm", None, description="ovens"))
    shown = result(cards=cards, described=described(about(0.3), *rows))
    (table,) = blocks(shown, Table, "Feature cards")
    assert [row[6:] for row in table.rows] == [
        ("kettles", fmt.estimate_text(about(0.9)), fmt.estimate_text(about(0.5))),
        ("ovens", fmt.estimate_text(about(0.8)), fmt.estimate_text(about(0.4))),
    ]
    assert "top-tokens" in str(table.columns[6])
    assert len(table.columns) == 9


@pytest.mark.parametrize(
    ("gain", "kind", "bad"),
    [(about(0.3), "verdict", False), (about(0.04), "warning", True), (about(0.05), "warning", True)],
)
def test_labels_that_say_no_more_than_others_are_warned_of(gain: Estimate, kind: str, bad: bool) -> None:
    shown = result(described=described(gain))
    (_, text) = blocks(shown, Text, "Feature cards")
    assert (text.role, text.text.endswith("They say no more of their features than other labels do.")) == (kind, bad)
    numbers = (about(0.9), about(0.6), gain)
    assert all(fmt.estimate_text(each) in text.text for each in numbers)
    assert "over 2 features" in text.text
    assert "Labels from top-tokens, read by words, tell" in text.text


def test_where_no_label_could_be_tried_that_is_said() -> None:
    (_, text) = blocks(result(described=described(Estimate.unknown())), Text, "Feature cards")
    assert (text.role, "No label could be tried" in text.text) == ("warning", True)


def test_where_features_fire_and_on_which_prompts() -> None:
    (firing,) = blocks(result(), Table, "Where they fire")
    heads = [str(column) for column in firing.columns]
    assert all(part in " ".join(heads) for part in ("harmful, instruction", "harmless, post-instruction"))
    assert [row[:2] for row in firing.rows] == [(str(A), "refusal"), (str(B), "mixed"), (str(C), "harm")]
    assert [row[2:] for row in firing.rows] == [tuple(map(fmt.rate_text, (about(0.75), about(0.0))))] * 3
    charts = blocks(result(), Chart, "Where they fire")
    assert [chart.title for chart in charts] == [f"{A}, refusal", f"{B}, mixed", f"{C}, harm"]
    # Of four prompts one in the first bin; a class without a prompt has no share.
    drawn = points(charts[0], "x", "y")
    assert {(0.5, 0.25), (1.5, 0.75), (0.5, 0.0), (1.5, 0.0)} <= drawn
    first, *others = blocks(result(), Table, "Prompts that activate them most")
    assert [tuple(row) for row in first.rows] == [
        (fmt.measure(7.5), fmt.token_text("at1"), "harmful", "prompt 1"),
        (fmt.measure(2.0), fmt.token_text("x"), "harmless", "second"),
    ]
    assert (first.title, first.folded, len(others)) == (f"{A}, refusal", True, 2)


def test_the_first_twelve_cards_have_a_histogram() -> None:
    many = tuple(card(FeatureId(n, n), "mixed", 1.0) for n in range(13))
    assert len(blocks(result(cards=many), Chart, "Where they fire")) == 12
    assert len(blocks(result(cards=many), Table, "Prompts that activate them most")) == 13
    assert blocks(result(cards=()), Table, "Where they fire")[0].rows == ()
