"""What pages say of results made by hand: each number stands in its place, and verdicts turn at their thresholds.

Titles, captions and prose are not looked at, only cells, values that charts draw, and the words that depend on numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
from page_parts import about, blocks, cells, drawn, points

from demur.report.blocks import Chart, Table, Text
from demur.stats import OneMoreDraw
from demur.studies.categories import CategoriesResult, CategorySet, FeatureUse, PartRow, Transfer, TransferTest
from demur.studies.categories.causes import Cause, Causes
from demur.studies.circuit.sections import DrawRow, DropRow, EdgeCheck, EdgeRow, GraphLink, GraphPoint
from demur.studies.circuit.sections import Result as CircuitResult
from demur.studies.minimal.sections import Certificate, DormantRow, FeatureOfSet, Screening, SizeRow
from demur.studies.minimal.sections import PairRow as Interaction
from demur.studies.minimal.sections import Result as MinimalResult
from demur.studies.roles import FeatureRole
from demur.types import FeatureId, FeatureSet

HARM, REFUSAL, LATER = FeatureId(0, 3), FeatureId(2, 5), FeatureId(3, 7)


# -- circuit -----------------------------------------------------------------------------------------------------------


def circuit(difference: float = 0.3, drop: float = 0.6) -> CircuitResult:
    def fall(factor: float, feature: FeatureId | None) -> DropRow:
        return DropRow(
            factor=factor, feature=feature, before=2.0, harmless=0.25, drop=about(drop), of_excess=about(0.7),
            random=about(0.1), difference=about(difference),
        )  # fmt: skip

    draws = (0.1, 0.2, 0.3)
    one = OneMoreDraw(p=0.25, low=-0.2, high=0.5)
    kinds: Any = (("kept", 1), ("stopped", -1))
    edges = [
        EdgeRow(paths=paths, source=source, target=target, from_harm=source == HARM, estimated=size + 0.5,
                measured=about(size))
        for paths, sign in kinds
        for source, target, size in ((HARM, REFUSAL, 3.0 * sign), (REFUSAL, LATER, 1.0 * sign), (HARM, LATER, 0.0))
    ]  # fmt: skip

    def at(layer: int) -> dict[str, Any]:
        return {"layer": layer, "position": 4, "token": " vault\n", "value": 1.0, "influence": 0.5}

    return CircuitResult(
        study="circuit",
        harm=(HARM,),
        refusal=(REFUSAL, LATER),
        drops=tuple(fall(factor, feature) for factor in (0.0, -3.0) for feature in (None, REFUSAL)),
        draws=tuple(DrawRow(factor=factor, draws=draws, one_more=one) for factor in (0.0, -3.0)),
        checks=(
            EdgeCheck(paths="kept", edges=3, nonzero=2, spearman=about(0.9), same_sign=about(0.8)),
            EdgeCheck(paths="stopped", edges=3, nonzero=1, spearman=about(0.4), same_sign=about(0.5)),
        ),
        edges=tuple(edges),
        prompt="Steal the vault",
        points=(
            GraphPoint(node="t", kind="token", label=" vault\n", **at(-1)),
            GraphPoint(node="h", kind="harm", label="0:3", **at(0)),
            GraphPoint(node="r", kind="refusal", label="2:5", **at(2)),
            GraphPoint(node="l", kind="logit", label="I", **at(4)),
        ),
        links=(
            GraphLink(source="t", target="h", weight=0.5),
            GraphLink(source="r", target="l", weight=-2.0),
            GraphLink(source="h", target="r", weight=1.0),
        ),
    )


def test_falls_upstream_stand_in_their_columns() -> None:
    row = ("2.00", "0.25", "0.70 [0.65–0.75]", "0.60 [0.55–0.65]", "0.10 [0.05–0.15]", "0.30 [0.25–0.35]")
    for n in range(2):
        table = blocks(circuit(), Table, "From harm to refusal")[n]
        assert table.rows == (("all", *row), ("2:5", *row))
        assert table.strong == {0}
        assert "−0.20 to 0.50 (p = 0.25; at least 0.25 with 3 sets)" in table.caption


@pytest.mark.parametrize(
    ("difference", "drop", "beyond"),
    [(0.3, 0.6, 2), (0.06, 0.6, 2), (0.04, 0.6, 0), (0.3, 0.5, 0), (0.3, 0.51, 2), (0.3, -0.21, 2), (0.3, -0.2, 0)],
)
def test_a_fall_is_beyond_chance_outside_one_more_draw_and_above_random_sets(
    difference: float, drop: float, beyond: int
) -> None:
    said = circuit(difference, drop).page().verdicts[0]
    assert (said.count("beyond the range"), said.count("within the range")) == (beyond, 2 - beyond)
    assert said.startswith("1 harm features lower 2 refusal features")
    assert said.index("scaled by 0, by") < said.index("scaled by −3, by")


def test_edges_stand_in_their_columns_and_those_of_nothing_are_left_out() -> None:
    assert [row[1:] for row in cells(circuit(), "Edges")] == [
        ("3", "2", "0.90 [0.85–0.95]", "80% [75–85]"),
        ("3", "1", "0.40 [0.35–0.45]", "50% [45–55]"),
    ]
    assert cells(circuit(), "Edges", 1) == [
        ("kept", "0:3 (harm)", "2:5", "3.50", "3.00 [2.95–3.05]"),
        ("kept", "2:5", "3:7", "1.50", "1.00 [0.95–1.05]"),
        ("stopped", "0:3 (harm)", "2:5", "−2.50", "−3.00 [−3.05 to −2.95]"),
        ("stopped", "2:5", "3:7", "−0.50", "−1.00 [−1.05 to −0.95]"),
    ]
    (chart,) = blocks(circuit(), Chart, "Edges")
    assert {(3.5, 3.0), (1.5, 1.0), (-2.5, -3.0), (-0.5, -1.0), (0.5, 0.0)} <= points(chart, "x", "y")


def test_the_graph_s_edges_are_listed_by_weight_and_named() -> None:
    assert cells(circuit(), "Graph") == [
        ("refusal 2:5 at  vault\\n (4)", "logit I", "−2.00"),
        ("harm 0:3 at  vault\\n (4)", "refusal 2:5 at  vault\\n (4)", "1.00"),
        ("token  vault\\n (4)", "harm 0:3 at  vault\\n (4)", "0.50"),
    ]
    (chart,) = blocks(circuit(), Chart, "Graph")
    assert sorted(row["sign"] for row in drawn(chart) if "sign" in row) == ["lowers", "raises", "raises"]


# -- categories --------------------------------------------------------------------------------------------------------


PARTS: Any = (
    ("whole", "free"),
    *((part, other) for part in ("common", "specific") for other in ("free", "held", "held on")),
)


def part_rows(measures: tuple[str, ...], controls: bool = True) -> tuple[PartRow, ...]:
    """Every rate is another one: the row's number in percent."""
    kinds: list[Any] = [(measure, part, other, control, kind)
             for measure in measures
             for part, other, control in (*((*each, False) for each in PARTS), ("common", "held", True),
                                          ("specific", "held", True))
             if controls or not control
             for kind in ("", "arson", "theft")]  # fmt: skip
    return tuple(
        PartRow(
            split="all" if part == "whole" else "intersection", part=part, other=other, control=control,
            sets=3 if control else 1, category=kind, measure=measure, size=2.25, success=about((n + 1) / 100, 0.01),
            normalised=about(n / 10),
        )
        for n, (measure, part, other, control, kind) in enumerate(kinds)
    )  # fmt: skip


def categories(measures: tuple[str, ...] = ("not refused", "compliance"), **changes: Any) -> CategoriesResult:
    def chosen(kind: str, own: FeatureId, n: int) -> CategorySet:
        scores = (4.0, 2.0)
        features = FeatureSet(features=(REFUSAL, own), scores=scores, scope="global", method="m")
        return CategorySet(category=kind, n_choosing=n, n_test=n + 1, features=features, specific=(own,))

    def cause(feature: FeatureId, role: Any, n: float, **given: Any) -> Cause:
        fires = FeatureRole(feature=feature, role="harm", instruction=n, post_instruction=n + 0.5, share=about(0.9))
        return Cause(feature=feature, role=role, fires=fires, alone=about(n + 1), **given)

    causes = (
        cause(HARM, "harm", 1.0, after=None, wakes=None, upstream=True, harmfulness=about(0.5)),
        cause(REFUSAL, "refusal", 2.0, after=None, wakes=None, upstream=False),
        cause(LATER, "redundant", 3.0, after=about(0.25), wakes=about(0.75), upstream=False),
        cause(FeatureId(3, 8), "redundant", 4.0, after=about(0.35), wakes=about(0.85), upstream=False),
    )
    tried: Any = (("free", 0.9, 0.012), ("held", 0.3, 0.34))
    given: dict[str, Any] = {
        "k": 2,
        "factor": -3.0,
        "candidates": 9,
        "measures": measures,
        "categories": (chosen("arson", HARM, 5), chosen("theft", LATER, 7)),
        "common": (REFUSAL,),
        "uses": (
            FeatureUse(feature=REFUSAL, role="refusal", scores={"arson": 4.0, "theft": 3.0}, share=1.0),
            FeatureUse(feature=HARM, role="harm", scores={"arson": 2.0}, share=0.4),
            FeatureUse(feature=LATER, role="redundant", scores={"theft": 2.0}, share=0.4),
        ),
        "parts": part_rows(measures),
        "transfers": tuple(
            Transfer(source=source, target=target, other=other, measure=measure, shared=n, success=about((n + 1) / 10),
                     normalised=about(n + 0.5))
            for measure in measures
            for other in ("free", "held")
            for n, (source, target) in enumerate([(a, b) for a in ("arson", "theft") for b in ("arson", "theft")])
        ),
        "tests": tuple(
            TransferTest(other=other, measure=measure, own=about(own), others=about(0.2), difference=about(own - 0.2),
                         p=p)
            for measure in measures
            for other, own, p in tried
        ),
        "causes": Causes(features=causes, refusal=(REFUSAL,), whole=-9.0, n=12),
    }  # fmt: skip
    return CategoriesResult(study="categories", **(given | changes))


def test_the_verdict_names_every_part_s_rate_with_its_control() -> None:
    """Rates are the row + 1 in percent: of the first measure three for each part, 1 to 27; the second's follow."""
    _, acting, _ = categories().page().verdicts
    order = (
        "1% [0–2] (complied: 28%)",  # The whole sets.
        "7% [6–8] (complied: 34%)",  # Common features with the others held.
        "16% [15–17] (complied: 43%)",  # As many specific ones.
        "22% and 25%",  # Random features.
        "4% and 13%",  # The other part free.
    )
    places = [acting.index(each) for each in order]
    assert places == sorted(places)
    (_, alone, _) = categories(("not refused",)).page().verdicts
    assert alone.count("(") == 1
    assert "7% [6–8], " in alone


def test_without_a_part_or_its_control_nothing_is_said_of_parts() -> None:
    assert len(categories(parts=part_rows(("not refused",), controls=False)).page().verdicts) == 2
    rows = part_rows(("not refused",))
    for left_out in (("whole", "free"), ("common", "held"), ("specific", "free")):
        some = tuple(row for row in rows if (row.part, row.other) != left_out or row.control)
        assert len(categories(parts=some).page().verdicts) == 2


def test_what_categories_share_is_counted() -> None:
    """Refusal features among harm and refusal features; one that serves half of the categories is common."""
    sharing = categories().page().verdicts[0]
    assert "Of 2 features for each of 2 categories" in sharing
    assert "1 are common to all; 3 different" in sharing
    assert sharing.index("100%") < sharing.index("0%", sharing.index("100%") + 4)
    uses = tuple(use.model_copy(update={"share": 0.5}) for use in categories().uses)
    assert "Refusal features" not in categories(uses=uses).page().verdicts[0]
    kinds = categories().categories
    less = kinds[1].features.head(1)
    assert "Of 1 to 2 features" in categories(
        categories=(kinds[0], kinds[1].model_copy(update={"features": less}))
    ).page().verdicts[0]  # fmt: skip


def test_only_the_free_transfer_of_the_first_measure_is_the_verdict() -> None:
    *_, moving = categories().page().verdicts
    order = ("90% [85–95]", "20% [15–25]", "+70 [65 to 75]", "0.012")
    places = [moving.index(each) for each in order]
    assert places == sorted(places)
    assert moving.count("difference") == 1


def test_features_by_category_stand_in_their_columns() -> None:
    assert cells(categories(), "Features by category") == [
        ("2:5", "refusal", "100%", "4.00", "3.00"),
        ("0:3", "harm", "40%", "2.00", "–"),
        ("3:7", "redundant", "40%", "–", "2.00"),
    ]
    assert cells(categories(), "Features by category", 1) == [
        ("arson", "5", "6", "2", "1"), ("theft", "7", "8", "2", "1"),
    ]  # fmt: skip
    (chart,) = blocks(categories(), Chart, "Features by category")
    assert points(chart, "row", "column", "text") == {(0, 0, "1.0"), (0, 1, "0.8"), (1, 0, "0.5"), (2, 1, "0.5")}


def test_parts_stand_in_their_columns() -> None:
    table, each, *_ = blocks(categories(), Table, "Parts")
    assert [(row[0], row[3], row[4], row[5], row[6]) for row in table.rows] == [
        ("all" if n == 0 else "intersection", "2.2", "20", f"{3 * n + 1}% [{3 * n}–{3 * n + 2}]", f"{0.3 * n:.2f} ["
         f"{f'{0.3 * n - 0.05:.2f}'.replace('-', '−')}{' to ' if n == 0 else '–'}{0.3 * n + 0.05:.2f}]")
        for n in range(9)
    ]  # fmt: skip
    assert [row[1].split(" ")[0] for row in table.rows] == ["all", *["common"] * 3, *["specific"] * 3, *["random"] * 2]
    assert ["3 sets" in row[1] for row in table.rows] == [False] * 7 + [True] * 2
    assert table.rows[0][2] == "–"
    held = {n for n, row in enumerate(table.rows) if row[2] == table.rows[2][2]}
    assert held == {2, 5, 7, 8}
    # Strong: what decides, a part by itself while the other is held; no control is.
    assert table.strong == {2, 5}
    # Each category apart, without controls.
    assert [row[0] for row in each.rows] == ["arson", "theft"] * 7
    assert [row[6] for row in each.rows][:3] == ["2% [1–3]", "3% [2–4]", "5% [4–6]"]
    assert len(blocks(categories(), Table, "Parts")) == 4
    other = blocks(categories(), Table, "Parts")[2]
    assert other.rows[0][5] == "28% [27–29]"


def test_transfers_stand_in_their_columns() -> None:
    tests, each = blocks(categories(), Table, "Transfer")
    assert [(row[0], *row[2:]) for row in tests.rows[:2]] == [
        ("not refused", "90% [85–95]", "20% [15–25]", "+70 [65 to 75]", "0.012"),
        ("not refused", "30% [25–35]", "20% [15–25]", "+10 [5 to 15]", "0.34"),
    ]
    assert tests.rows[0][1] != tests.rows[1][1]
    assert each.rows[1] == ("arson", "theft", tests.rows[0][1], "not refused", "1", "20% [15–25]", "1.50 [1.45–1.55]")
    charts = blocks(categories(), Chart, "Transfer")
    assert len(charts) == 4
    for chart in charts:
        assert points(chart, "row", "column", "text", "chosen") == {
            (0, 0, "10", True), (0, 1, "20", False), (1, 0, "30", False), (1, 1, "40", True),
        }  # fmt: skip
    assert not blocks(categories(transfers=(), tests=()), Table, "Transfer")


def test_roles_are_counted_and_their_evidence_stands_in_its_columns() -> None:
    assert cells(categories(), "Roles") == [("harm", "1", "0"), ("redundant", "1", "1"), ("refusal", "1", "0")]
    table = blocks(categories(), Table, "Roles")[1]
    assert table.rows[:3] == (
        ("0:3", "harm", "up", "1.00", "1.50", "2.00 [1.95–2.05]", "–", "–", "0.50 [0.45–0.55]"),
        ("2:5", "refusal", "down", "2.00", "2.50", "3.00 [2.95–3.05]", "–", "–", "–"),
        ("3:7", "redundant", "down", "3.00", "3.50", "4.00 [3.95–4.05]", "0.25 [0.20–0.30]", "75% [70–80]", "–"),
    )
    assert "12 test prompts" in table.caption
    assert "0.090 nats" in table.caption


# -- minimal -----------------------------------------------------------------------------------------------------------


def minimal(**changes: Any) -> MinimalResult:
    def tested(test: Any, name: str, n: int, **given: Any) -> Certificate:
        base: dict[str, Any] = {"difference": None, "p": None, "size": n, "sets": 1}
        return Certificate(test=test, name=name, share=about(n / 10), rate=about(n / 20, n=n), **(base | given))

    several = {"sets": 2, "draws": (0.3, 0.1), "difference": about(0.4), "p": 0.03}
    fit = Screening(
        features=12, draws=40, rank=4, r2=about(0.91), additive=about(0.82), gain=about(0.09, 0.01), pairs=3,
        spearman=about(0.61), same_sign=about(0.71, n=7),
    )  # fmt: skip
    given: dict[str, Any] = {
        "factor": -1.0,
        "target": 0.9,
        "chosen": (REFUSAL, HARM, LATER),
        "effect": about(8.0),
        "of_direction": about(0.88),
        "features": (feature_of_set(0.5, 0.5),),
        "sizes": tuple(
            SizeRow(size=n, removed=None if n == 3 else HARM, chosen=n == 2, selection=n / 3, tuning=about(n / 4),
                    test=about(n / 5))
            for n in (3, 2, 1)
        ),
        "certificate": (
            tested("necessity", "minimal set", 9),
            tested("necessity", "F*", 8),
            tested("necessity", "random features", 1, **several),
            tested("sufficiency", "minimal set", 7),
            tested("sufficiency", "F*", 6),
            tested("sufficiency", "nothing", 2),
        ),
        "dormant": (
            DormantRow(feature=LATER, layer=2, wakers=(REFUSAL, HARM), clean=about(0.01, 0.01), awake=about(0.6),
                       effect=about(2.0), alone=about(0.0)),
            DormantRow(feature=FeatureId(3, 9), layer=2, wakers=(REFUSAL,), clean=about(0.02, 0.01), awake=about(0.7),
                       effect=about(0.04), alone=about(0.1)),
        ),
        "pairs": (Interaction(first=REFUSAL, second=HARM, interaction=about(-1.5), p_holm=0.02, estimate=-1.2),),
        "pairs_tested": 55,
        "screening": fit,
    }  # fmt: skip
    return MinimalResult(study="minimal", **(given | changes))


def feature_of_set(without: float, complied: float, half: float = 0.05) -> FeatureOfSet:
    return FeatureOfSet(
        feature=REFUSAL, role="refusal", cosine=0.3, without=about(without, half), complied=about(complied, half)
    )


@pytest.mark.parametrize(
    ("without", "complied", "said"),
    [
        (0.84, 0.6, "lost"),  # .89 at most, of .9; F* complies with .4, of which .36 is to be kept.
        (0.86, 0.6, "not clear"),  # .91 at most, .81 at least.
        (0.96, 0.6, "reached"),
        (0.96, 0.3, "lost"),  # .35 at most.
        (0.96, 0.32, "not clear"),  # .37 at most, .27 at least.
        (0.96, 0.42, "reached"),  # .37 at least.
        (0.86, 0.42, "not clear"),
        (0.84, 0.3, "lost"),
    ],
)
def test_a_feature_can_go_when_both_targets_are_reached_without_it(without: float, complied: float, said: str) -> None:
    ((*numbers, words),) = cells(minimal(features=(feature_of_set(without, complied),)), "Minimal set")
    assert words.startswith(said)
    assert numbers[:3] == ["2:5", "refusal", "0.30"]
    assert numbers[3].startswith(f"{without:.2f} [")
    assert numbers[4].startswith(f"{100 * complied:.0f}% [")


def test_the_limits_themselves_count_as_reached() -> None:
    exact = minimal(features=(feature_of_set(0.5, 0.2, 0.0),), target=0.5)
    assert cells(exact, "Minimal set")[0][-1].startswith("reached")


def test_the_minimal_set_s_verdict_names_its_numbers() -> None:
    result = minimal()
    (said,) = result.page().verdicts
    order = ("holds 1 of the 3", "0.90 [", "c = −1", "45% [", "(1 random feature: 5% [", "0.70 [", "35% [", "10% [")
    places = [said.index(each) for each in order]
    assert places == sorted(places)
    assert "2 random features" in minimal(features=(feature_of_set(0.5, 0.5),) * 2).page().verdicts[0]


@pytest.mark.parametrize(("share", "warned"), [(0.84, 1), (0.85, 0)])
def test_a_set_that_does_not_carry_over_is_a_warning(share: float, warned: int) -> None:
    first, *rest = minimal().certificate
    rows = (first.model_copy(update={"share": about(share)}), *rest)
    assert len(minimal(certificate=rows).page().warnings) == warned


def test_certificates_stand_in_their_columns() -> None:
    assert cells(minimal(), "Certificate") == [
        ("minimal set", "9", "0.90 [0.85–0.95]", "45% [40–50]", "9", "–", "–"),
        ("F*", "8", "0.80 [0.75–0.85]", "40% [35–45]", "8", "–", "–"),
        ("random features", "1, 2 sets", "0.10 [0.05–0.15] (0.10–0.30)", "5% [0–10]", "1", "+40 [35 to 45]", "0.030"),
    ]
    assert [row[0] for row in cells(minimal(), "Certificate", 1)] == ["minimal set", "F*", "nothing"]
    assert [table.strong for table in blocks(minimal(), Table, "Certificate")] == [{0}, {0}]
    (note,) = [text for text in blocks(minimal(), Text, "Certificate") if "8.00" in text.text]
    # F* alone restores .6 of the way back.
    assert note.text.index("8.00") < note.text.index("0.88") < note.text.index("40%")


def test_the_way_down_stands_in_its_columns() -> None:
    table = blocks(minimal(), Table, "How the set was found")[0]
    assert table.rows[:2] == (
        ("3", "–", "1.00", "75% [70–80]", "0.60 [0.55–0.65]"),
        ("2", "0:3", "0.67", "50% [45–55]", "0.40 [0.35–0.45]"),
    )
    assert table.strong == {1}
    (chart,) = blocks(minimal(), Chart, "How the set was found")
    assert {(3, 0.6), (2, 0.4), (1, 0.2), (3, 0.75), (2, 0.5), (1, 0.25)} <= points(chart, "x", "y")
    # From many features to few.
    assert '"reverse": true' in chart.draw().to_json()
    assert 0.9 in {row["y"] for row in drawn(chart) if "x" not in row and "y" in row}


def test_dormant_features_are_counted_when_they_carry_refusal() -> None:
    assert cells(minimal(), "Redundancy") == [
        ("3:7", "2 of layer 2", "1% [0–2]", "60% [55–65]", "2.00 [1.95–2.05]", "0.00 [−0.05 to 0.05]"),
        ("3:9", "1 of layer 2", "2% [1–3]", "70% [65–75]", "0.04 [−0.01 to 0.09]", "0.10 [0.05–0.15]"),
    ]
    assert "Of 2 features that wake when others are suppressed, 1 carry refusal then: 3:7." in {
        text.text for text in blocks(minimal(), Text, "Redundancy")
    }
    weak = minimal().dormant[1].model_copy(update={"effect": about(0.06)})
    assert "1 carry refusal then: 3:9." in blocks(minimal(dormant=(weak,)), Text, "Redundancy")[0].text
    none = minimal(dormant=())
    assert not blocks(none, Table, "Redundancy")
    assert blocks(none, Text, "Redundancy")[0].text.endswith("0 carry refusal then.")


def test_interactions_stand_in_their_columns_with_what_the_machine_says() -> None:
    assert cells(minimal(), "Interactions") == [("2:5", "0:3", "−1.50 [−1.55 to −1.45]", "0.020", "−1.20")]
    note = blocks(minimal(), Text, "Interactions")[0].text
    order = ("12 features", "4 factors", "40 parts", "91%", "82%", "+9 [", "3 pairs", "0.61", "7 other", "71%")
    places = [note.index(each) for each in order]
    assert places == sorted(places)
    exact = minimal(screening=None)
    assert cells(exact, "Interactions") == [("2:5", "0:3", "−1.50 [−1.55 to −1.45]", "0.020")]
    assert not blocks(exact, Text, "Interactions")
    assert "1 strongest of 55" in blocks(exact, Table, "Interactions")[0].caption
    assert not blocks(minimal(screening=None, pairs=()), Table, "Interactions")
