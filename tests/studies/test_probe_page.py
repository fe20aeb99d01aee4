"""What the page of `demur probes` says of results made by hand."""

from __future__ import annotations

import pytest
from page_parts import about, blocks, cells
from probe_results import flags, matched, probed

from demur.report import charts
from demur.report.blocks import Chart, Table, Text
from demur.stats import Estimate
from demur.studies.probes.results import ALL, DENSE, HARM, KEYWORDS, ProbesResult

BENIGN = ("plain benign", "benign in A", "over", "polite", "text")


def names(table: Table) -> list[str]:
    return [column.name for column in table.columns]


def said(result: ProbesResult, section: str) -> list[str]:
    return [text.text for text in blocks(result, Text, section)]


def test_the_verdict_is_at_equal_false_alarms_and_at_the_threshold_that_was_set() -> None:
    (verdict,) = probed().page().verdicts
    order = (
        f"{DENSE} flags 80% [75–85]", "significantly more than keywords.", f"not significantly more than {HARM}.",
        f"chose {HARM} for the guard", "flags 54% [", "1% [1–1] of plain benign", "71% [66–76] of benign",
    )  # fmt: skip
    flagged = flags(all_attacks=about(0.54), plain_benign=about(0.01, 0.0))
    (verdict,) = probed(flags=flagged).page().verdicts
    places = [verdict.index(each) for each in order]
    assert places == sorted(places)
    # None is worse, or none is not.
    row = {"difference": about(-0.1), "p": 0.01}
    worse = probed(matched=(matched(DENSE, 80), matched(HARM, 70, **row, p_holm=0.049))).page().verdicts[0]
    assert f"That is significantly more than {HARM}." in worse
    assert "not significantly" not in worse
    alike = probed(matched=(matched(DENSE, 80), matched(HARM, 70, **row, p_holm=0.05))).page().verdicts[0]
    assert "That is significantly" not in alike
    alone = probed(winner=DENSE, matched=(matched(DENSE, 80),)).page().verdicts[0]
    assert "significantly" not in alone


def test_a_set_of_benign_prompts_that_raises_alarms_is_a_doubt() -> None:
    """Above three times what was promised, at the lower end; harmful sets before them and between change nothing."""
    assert probed().page().warnings == ()
    for name in BENIGN:
        high = probed(flags=flags(**{name.replace(" ", "_"): about(0.081, 0.05)}))
        (warning,) = high.page().warnings
        assert f"“{name}”" in warning
        assert "8% [3–13]" in warning
        for share in (Estimate(value=0.5, low=0.03, high=0.9, n=20), Estimate.unknown()):
            assert probed(flags=flags(**{name.replace(" ", "_"): share})).page().warnings == ()
    loud = {name.replace(" ", "_"): about(0.9) for name in BENIGN}
    assert [w.split("“")[1].split("”")[0] for w in probed(flags=flags(**loud)).page().warnings] == list(BENIGN)
    # What was not scored is passed over, and what follows it is not.
    unknown = flags(plain_benign=Estimate.unknown(), text=about(0.9))
    assert len(probed(flags=unknown).page().warnings) == 1
    missing = tuple(row for row in flags(text=about(0.9)) if row.prompts != "plain benign")
    assert len(probed(flags=missing).page().warnings) == 1


def test_shares_stand_in_the_column_of_their_set() -> None:
    result = probed()
    (low,) = blocks(result, Table, "Is the request harmful?")
    assert names(low) == ["representation", "plain harmful", "A", "B", ALL]
    # The shares of the dense residual begin at 50.0 %, at 1 % and then at 5 %: of ten sets the first, two attacks, all.
    assert low.rows[0] == (DENSE, "50% [50–50]", "50% [50–50]", "50% [50–50]", "51% [51–51]")
    assert [row[0] for row in low.rows] == [DENSE, HARM, KEYWORDS]
    assert (low.strong, low.folded) == ({1}, False)
    _, high, *_ = blocks(result, Table, "Which representation wins?")
    assert high.rows[0] == (DENSE, "51% [51–51]", "51% [51–51]", "51% [51–51]", "52% [52–52]")
    assert (high.strong, high.folded) == ({1}, True)
    assert "1%" in low.title
    assert "5%" in high.title
    (alarms,) = blocks(result, Table, "False alarms")
    assert names(alarms) == ["representation", "plain benign", "benign in A", "over", "polite"]
    assert alarms.rows[1] == (HARM, *["1% [1–1]"] * 4)
    (long,) = blocks(result, Table, "Long inputs")
    assert names(long) == ["representation", "plain harmful", "request in text", "text"]
    assert long.rows[1] == (HARM, "52% [52–52]", "53% [53–53]", "1% [1–1]")
    # Numbers stand right, and the name of what they are of does not.
    for table in (low, alarms, *blocks(result, Table, "Will the model refuse?")[:1]):
        assert [column.numeric for column in table.columns] == [False, *[True] * (len(table.columns) - 1)]
    # One attack is all attacks.
    few = probed(sets=tuple(row for row in result.sets if row.name != "B" and row.kind != "long"))
    assert names(blocks(few, Table, "Is the request harmful?")[0]) == ["representation", "plain harmful", "A"]
    assert not blocks(few, Table, "Long inputs")


def test_representations_are_compared_and_ranked_each_in_its_row() -> None:
    result = probed()
    (equal, _, areas, tests) = blocks(result, Table, "Which representation wins?")
    assert equal.rows == (
        (DENSE, "80% [75–85]", "–", "–", "81% [76–86]"),
        (HARM, "70% [65–75]", "−10 [−15 to −5]", "0.050", "71% [66–76]"),
        (KEYWORDS, "20% [15–25]", "−60 [−65 to −55]", "0.040", "21% [16–26]"),
    )  # fmt: skip
    assert equal.strong == {1}
    assert (names(areas), areas.strong, areas.folded) == (["representation", "A", ALL], {1}, True)
    assert areas.rows == (
        (DENSE, "0.75 [0.70–0.80]", "–"), (HARM, "0.80 [0.75–0.85]", "0.70 [0.65–0.75]"), (KEYWORDS, "–", "–"),
    )  # fmt: skip
    assert tests.rows == (
        (HARM, "A", "0.71", "0.12", "0.05 [0.04–0.06]", "0.011", "0.022"), (DENSE, "A", "0.61", "0.13", "–", "–", "–"),
        (HARM, ALL, "0.51", "0.14", "–", "–", "–"),
    )  # fmt: skip
    areas, tests = blocks(result, Table, "Will the model refuse?")
    assert (areas.rows, areas.strong, areas.folded) == (((HARM, "0.60 [0.55–0.65]"),), frozenset(), False)
    assert names(areas) == ["representation", "plain"]
    assert tests.rows == ((HARM, "plain", "0.41", "0.15", "–", "–", "–"),)
    assert tests.folded


def test_the_other_tables_hold_each_number_in_its_column() -> None:
    result = probed()
    assert cells(result, "A family held out") == [
        ("A", HARM, "41% [36–46]", "52% [47–57]", "+11 [6 to 16]", "23% [18–28]", "34% [29–39]")
    ]
    assert cells(result, "Two axes: succeeded jailbreaks") == [
        ("attacks that succeeded", "11% [6–16]", "22% [17–27]", "63% [58–68]", "4% [−1 to 9]"),
        ("plain benign", "90% [85–95]", "5% [0–10]", "3% [−2 to 8]", "2% [−3 to 7]"),
    ]
    assert cells(result, "Streaming") == [
        ("1", "8", "33", "81% [76–86]", "3.5", "12", "6% [1–11]", "17% [12–22]", "28% [23–33]")
    ]
    assert cells(result, "Cascade") == [("5%", "6% [1–11]", "77% [72–82]", "40%", "66% [61–71]", "2% [−3 to 7]")]
    assert cells(result, "The paper's labels") == [(HARM, "91% [86–96]", "12% [7–17]", "88% [83–93]")]
    chosen, prompts = blocks(result, Table, "Probes and prompts")
    assert chosen.rows == (
        ("harmful", DENSE, "mean", "1", "8", "7", "0.123", "0.900", "6"),
        ("harmful", HARM, "max", "–", "3", "2", "0.200", "1.000", "4"),
        ("harmful", KEYWORDS, "–", "–", "1", "1", "0.500", "0.800", "5"),
        ("refuse", HARM, "last", "0", "3", "1", "0.300", "0.700", "1"),
    )
    assert (chosen.folded, prompts.folded) == (True, False)
    assert prompts.rows[:3] == (
        ("plain harmful", "plain", "harmful", "30", "30% [25–35]", "–"),
        ("plain benign", "plain", "benign", "31", "31% [26–36]", "–"),
        ("A", "attack", "harmful", "32", "32% [27–37]", "62% [57–67]"),
    )
    assert len(prompts.rows) == 9


def test_sentences_say_what_their_rows_hold() -> None:
    result = probed()
    (two,) = said(result, "Two axes: succeeded jailbreaks")
    assert two.index("63% [58–68]") < two.index("0.87 [0.82–0.92]")
    (none,) = blocks(probed(verdicts=result.verdicts[1:]), Text, "Two axes: succeeded jailbreaks")
    assert none.role == "note"
    assert len(cells(probed(verdicts=result.verdicts[1:]), "Two axes: succeeded jailbreaks")) == 1
    (stream,) = said(result, "Streaming")
    places = [stream.index(each) for each in ("5% [0–10]", "72% [67–77]", "after 4.5 tokens")]
    assert places == sorted(places)
    assert result.stream is not None
    still = probed(stream=result.stream.model_copy(update={"equal": None}))
    assert (len(cells(still, "Streaming")), said(still, "Streaming")) == (1, [])


@pytest.mark.parametrize(
    ("field", "title"),
    [
        ("held_out", "A family held out"),
        ("cascade", "Cascade"),
        ("paper", "The paper's labels"),
        ("stream", "Streaming"),
    ],
)
def test_what_was_not_measured_has_no_section(field: str, title: str) -> None:
    titles = [section.title for section in probed().page().sections]
    without = probed(**{field: None if field == "stream" else ()})
    assert [section.title for section in without.page().sections] == [each for each in titles if each != title]
    assert title in titles


def test_reliability_is_drawn_beside_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "line_chart", lambda lines, **_: lines)
    (chart,) = blocks(probed(), Chart, "Calibration")
    drawn = [[(p.x, p.y) for p in each.points] for each in chart.draw()]
    assert drawn == [[(0.1, 0.2), (0.8, 0.7)], [(0.5, 0.6)], [(0.0, 0.0), (1.0, 1.0)]]
    labels = [each.name for each in chart.draw()]
    assert HARM in labels[0]
    assert "plain" in labels[0]
    assert DENSE in labels[1]
    assert ALL in labels[1]


def test_the_terminal_shows_the_verdict_and_what_is_caught() -> None:
    assert [section.title for section in probed().page().sections if section.brief] == [
        "Verdict", "Is the request harmful?",
    ]  # fmt: skip
