"""What the pages of attacks, of one prompt and of features say of results made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from page_parts import about, blocks, cells, points

from demur.report.blocks import Chart, Table, Text, Tokens, Transcripts
from demur.stats import Estimate
from demur.studies.explain import LOCAL as LOCAL_PATCHES
from demur.studies.explain import Explanation, LevelRow, PatchRow, Reading, RestoredRow, TokenRow, WordRow
from demur.studies.features import Card, Example, Spread
from demur.studies.features import Result as FeaturesResult
from demur.studies.jailbreaks.results import (
    F_STAR,
    GROUPS,
    LOCAL,
    RANDOM,
    AgreementRow,
    AttackRow,
    Drop,
    GroupRow,
    JailbreaksResult,
    LocalRow,
    PairRow,
    Sample,
    WalkRow,
)
from demur.studies.jailbreaks.results import (
    TestRow as Compared,
)
from demur.studies.jailbreaks.sections import larger, median_patches
from demur.studies.roles import FeatureRole
from demur.types import FeatureId, Outcome

HARM, REFUSAL, LATER = FeatureId(0, 3), FeatureId(2, 5), FeatureId(3, 7)


# -- jailbreaks --------------------------------------------------------------------------------------------------------


def a_test(attack: str, against: str, measure: str = "refusal", difference: float = 0.3, p: float = 0.01) -> Compared:
    return Compared(
        attack=attack, against=against, measure=measure, paired=against != GROUPS[1],  # pyright: ignore[reportArgumentType]
        difference=about(difference, n=9), p=p / 2, p_holm=p,
    )  # fmt: skip


def walk(refusal: tuple[float, ...], ends: tuple[float, float], alone: float, words: tuple[str, ...]) -> WalkRow:
    n = len(words)
    return WalkRow(
        id="w", attack="A", words=words, refusal=refusal, without_harm=tuple(v + 0.5 for v in refusal),
        by_feature=tuple((0.0,) * n + (end,) for end in ends), top=1, alone=alone,
        left_out=(0.1, 0.4)[:n], gradient=(0.3, 0.2)[:n], ig=(-0.1, 0.2)[:n],
    )  # fmt: skip


def local(restored: bool | None, size: int, *, random: bool | None = False, f_star: bool | None = None) -> LocalRow:
    return LocalRow(
        id="a", attack="A", features=(REFUSAL, HARM, REFUSAL)[:size], tokens=("x", "\n", "y")[:size],
        regions=("post_instruction", "instruction", "post_instruction")[:size], raised=(True, False, True)[:size],
        kl=(2.0, 0.7, 0.5), p_refuse=(0.1, 0.35, 0.75), restored=restored, random=random, f_star=f_star,
    )  # fmt: skip


def pair(outcome: Any, refusal: float, **shams: float) -> PairRow:
    found: dict[str, Any] = {name: Drop(harm=value + 1, refusal=value) for name, value in shams.items()}
    return PairRow(
        id="a", attack="A", request="r", outcome=outcome, drop=Drop(harm=refusal + 1, refusal=refusal), **found
    )


def jailbreaks(*tests: Compared, attacks: int = 1, **changes: Any) -> JailbreaksResult:
    scope = "all" if attacks > 1 else "A"
    names = ("A", "B")[:attacks]
    groups = [
        GroupRow(attack=attack, group=group, requests=8 - n, harm=about(0.1 * n + m), refusal=about(0.5 - 0.1 * n + m))
        for m, attack in enumerate(dict.fromkeys((scope, *names)))
        for n, group in enumerate(GROUPS)
    ]
    given: dict[str, Any] = {
        "harm": (HARM,),
        "refusal": (REFUSAL, LATER),
        "f_star": (REFUSAL, FeatureId(1, 1)),
        "attacks": tuple(
            AttackRow(attack=name, n=9, too_long=1, chosen_from=2, plain_answered=3, neither=4, success=about(0.5))
            for name in names
        ),
        "groups": tuple(groups),
        "tests": tests,
        "pairs": (
            pair("succeeded", 0.5, wrapped=0.11, padded=0.12),
            pair("failed", 0.2, wrapped=0.13),
            pair("neither", 0.9, padded=0.99),
        ),
        "padded_refusal": about(0.97, 0.02),
        "f_star_share": 0.25,
        "f_star_chance": 0.125,
    }
    return JailbreaksResult(study="jailbreaks", **(given | changes))


def test_the_finding_is_about_all_attacks_or_the_only_one() -> None:
    mine = [a_test("A", group) for group in GROUPS[1:]]
    assert "not significantly" not in jailbreaks(*mine).page().verdicts[0]
    # The same tests of one of two attacks say nothing of all of them.
    both = jailbreaks(*mine, attacks=2).page().verdicts[0]
    assert "significantly more" in both
    assert "It is not significantly more" in both
    assert "That is" not in both
    everything = [a_test("all", group) for group in GROUPS[1:]]
    assert "not significantly" not in jailbreaks(*everything, attacks=2).page().verdicts[0]
    assert jailbreaks(groups=()).page().verdicts[0].startswith("No attack succeeded")


@pytest.mark.parametrize(
    ("difference", "p", "yes"), [(0.3, 0.049, True), (0.3, 0.05, False), (-0.3, 0.01, False), (0.0, 0.01, False)]
)
def test_more_than_a_control_is_larger_with_an_adjusted_p_below_5_percent(
    difference: float, p: float, yes: bool
) -> None:
    test = a_test("A", "failed", difference=difference, p=p)
    assert larger(test) == yes
    assert not larger(None)
    assert ("That is significantly" in jailbreaks(test).page().verdicts[0]) == yes
    # A test of the harm signal, or against another control, is another test.
    other = test.model_copy(update={"measure": "harm"})
    assert "That is significantly" not in jailbreaks(other).page().verdicts[0]


def test_each_control_is_named_with_its_own_test() -> None:
    """One control is beaten; the sentence of the other two names them."""
    for won in GROUPS[1:]:
        said = jailbreaks(*(a_test("A", g, p=0.01 if g == won else 0.5) for g in GROUPS[1:])).page().verdicts[0]
        more = said[said.index("That is") : said.index("It is not")]
        rest = said[said.index("It is not") :]
        key = {GROUPS[1]: "failed attacks", GROUPS[2]: "harmless requests", GROUPS[3]: "length"}
        assert [name for name, words in key.items() if words in more] == [won]
        assert [name for name, words in key.items() if words in rest] == [g for g in GROUPS[1:] if g != won]
        assert more.count("by 0.30 [0.25–0.35]") == 1
        assert rest.count("by 0.30 [0.25–0.35]") == 2


def test_drops_and_their_tests_stand_in_their_columns() -> None:
    tests = (*(a_test(a, g, m) for a in ("all", "A", "B") for g in GROUPS[1:2] for m in ("harm", "refusal")),)
    result = jailbreaks(*tests, a_test("all", GROUPS[2], p=0.6), attacks=2)
    title = "What attacks take away"
    assert cells(result, title)[:2] == [
        (GROUPS[0], "20", "8", "0.00 [−0.05 to 0.05]", "0.50 [0.45–0.55]"),
        (GROUPS[1], "20", "7", "0.10 [0.05–0.15]", "0.40 [0.35–0.45]"),
    ]
    assert len(cells(result, title)) == 4
    number = ("9", "0.30 [0.25–0.35]", "0.005", "0.010")
    assert [(row[:2], row[3:]) for row in cells(result, title, 1)] == [
        (("failed", "harm"), number),
        (("failed", "refusal"), number),
        ((GROUPS[2], "refusal"), ("9", "0.30 [0.25–0.35]", "0.30", "0.60")),
    ]
    first, _, last = (row[2] for row in cells(result, title, 1))
    assert (first, last) == ("two groups", "same requests")
    # Attack by attack, without those of all.
    assert [row[:3] for row in cells(result, title, 2)][::4] == [("A", GROUPS[0], "20"), ("B", GROUPS[0], "20")]
    assert [row[0] for row in cells(result, title, 3)] == ["A", "A", "B", "B"]
    assert [table.folded for table in blocks(result, Table, title)] == [False, False, True, True]
    assert len(blocks(jailbreaks(*tests), Table, title)) == 2
    for chart, add in zip(blocks(result, Chart, title), (1.0, 0.0), strict=True):
        # The succeeded and the failed, and every sham of those that are counted.
        dots = points(chart, "name", "x", "jitter")
        assert {(name, x) for name, x, _ in dots} == {
            (GROUPS[0], 0.5 + add), (GROUPS[1], 0.2 + add), (GROUPS[2], 0.11 + add), (GROUPS[2], 0.13 + add),
            (GROUPS[3], 0.12 + add),
        }  # fmt: skip
        means = points(chart, "name", "x", "low")
        n = 1 if add else -1
        assert (GROUPS[1], 0.1 if n > 0 else 0.4, 0.05 if n > 0 else 0.35) in means


def test_attacks_are_counted_in_their_columns() -> None:
    assert cells(jailbreaks(attacks=2), "Attacks") == [(name, "9", "50% [45–55]", "4", "1", "2", "3") for name in "AB"]


def test_local_explanations_stand_in_their_columns() -> None:
    rows = (local(True, 1, random=None), local(True, 3, f_star=True), local(False, 2))
    restored = {LOCAL: about(0.67, n=3), RANDOM: about(0.1, n=3), F_STAR: about(0.9, n=3)}
    result = jailbreaks(local=rows, restored=restored)
    assert median_patches(result) == 2.0
    title = "Explained one by one"
    assert cells(result, title) == [
        (LOCAL, "67% [62–72]"), (RANDOM, "10% [5–15]"), (F_STAR, "90% [85–95]"),
    ]  # fmt: skip
    caption = blocks(result, Table, title)[0].caption
    assert "3 succeeded" in caption
    assert caption.index("25%") < caption.index("12%")
    # Attacks with it, and patches by region; two patches of one attack are one attack.
    assert cells(result, title, 1) == [("2:5", "3", "0", "4", "4", "refusal"), ("0:3", "2", "2", "0", "0", "harm")]
    roles = jailbreaks(local=rows, restored=restored, refusal=(LATER,), harm=())
    assert [row[-1] for row in cells(roles, title, 1)] == ["F*", "none of these"]
    numbers = ("2.00", "0.50", "0.10", "0.75")
    assert cells(result, title, 2) == [
        ("A", "2:5 at 'x'", *numbers, "yes", "–", "–"),
        ("A", "2:5 at 'x', 0:3 at '\\n', 2:5 at 'y'", *numbers, "yes", "yes", "no"),
        ("A", "2:5 at 'x', 0:3 at '\\n'", *numbers, "no", "–", "no"),
    ]
    said = result.page().verdicts[0]
    assert "Of 3 succeeded attacks" in said
    assert said.index("67%") < said.index("median 2") < said.index("10%") < said.index("90%")
    assert "67%" not in said[said.index("median 2") :]


def test_words_stand_in_their_columns() -> None:
    # In the second walk the whole text suppresses nothing, so nothing is a share of it.
    walks = (
        walk((0.0, 0.2, 0.8), (0.6, 0.9), 0.4, ("Play:", "now")),
        walk((0.0, 0.1, 0.0), (float("nan"), 0.5), 0.3, ("play", "Then")),
    )
    agree = (AgreementRow(first="ig", second="left_out", spearman=about(0.7)),)
    result = jailbreaks(walks=walks, agreement=agree)
    (strongest, measures) = blocks(result, Table, "Word by word")
    # Word, walks in which it adds most, walks with it, and means of added, left out and integrated gradients.
    assert [tuple(cell.split(" ")[0] for cell in row) for row in strongest.rows] == [
        ("now", "1", "1", "0.60", "0.40", "0.20"),
        ("then", "1", "1", "−0.10", "0.40", "0.20"),
    ]
    # 0.6 of 0.8 in its place, and 0.4 of 0.8 alone.
    assert strongest.caption.index("0.75") < strongest.caption.index("0.50")
    assert "over 1 attacks" in strongest.caption
    assert measures.rows == (("integrated gradients", "left out", "0.70 [0.65–0.75]"),)
    (tokens,) = blocks(result, Tokens, "Word by word")
    assert [(t.text.strip(), t.upper, t.lower) for t in tokens.lines[0][1]] == [
        ("Play:", pytest.approx(0.25), 0.0),
        ("now", 1.0, pytest.approx(0.5)),
    ]
    (chart,) = blocks(result, Chart, "Word by word")
    assert {(0, 0.0), (0, 0.5), (100, 0.4), (100, 0.9)} <= points(chart, "x", "y")
    # What the whole text takes from each refusal feature; unknown where it does not fire.
    assert [row[0::2] for row in cells(result, "Features")] == [("2:5", "1"), ("3:7", "2")]
    assert [row[1].split(" ")[0] for row in cells(result, "Features")] == ["0.60", "0.70"]


@pytest.mark.parametrize(("value", "requests", "doubts"), [(0.8, 10, 0), (0.79, 10, 1), (0.8, 9, 1), (0.79, 9, 2)])
def test_few_requests_and_refusals_lost_by_length_alone_are_doubts(value: float, requests: int, doubts: int) -> None:
    groups = tuple(row.model_copy(update={"requests": requests}) for row in jailbreaks().groups)
    assert len(jailbreaks(groups=groups, padded_refusal=about(value)).page().warnings) == doubts
    # Nothing was padded, and no attack failed.
    unknown = jailbreaks(groups=groups[:1], padded_refusal=Estimate.unknown())
    assert len(unknown.page().warnings) == 1 + (requests < 10)


def test_answers_are_shown_with_their_prompts() -> None:
    sample = Sample(prompt="p", answers=(("under attack", "a"), ("patched", "b")))
    (section,) = [s for s in jailbreaks(samples=(sample,)).page().sections if s.title == "Answers"]
    (block,) = section.blocks
    assert [(t.prompt, t.answers) for t in block.transcripts] == [("p", sample.answers)]  # pyright: ignore[reportAttributeAccessIssue]
    assert block.harmful  # pyright: ignore[reportAttributeAccessIssue]


# -- one prompt --------------------------------------------------------------------------------------------------------


def reading(name: Any, harm: float, refusal: float, p_refuse: float, outcome: Outcome | None) -> Reading:
    tokens = (
        TokenRow(text="Steal", region="instruction", harm=0.25 * harm, refusal=0.0),
        TokenRow(text="<end>", region="post_instruction", harm=0.0, refusal=0.25 * refusal),
    )
    return Reading(
        name=name, text=f"{name}!", tokens=tokens, p_refuse=p_refuse, harm=harm, refusal=refusal, outcome=outcome,
        answer=f"answer to {name}",
    )  # fmt: skip


def explained(harm: float = 0.8, refusal: float = 0.4, *, plain: bool = True, **changes: Any) -> Explanation:
    given: dict[str, Any] = {
        "prompt": reading("prompt", harm, refusal, 0.25, Outcome.COMPLIANCE),
        "plain": reading("plain", 2.0, 1.2, 0.95, Outcome.REFUSAL) if plain else None,
        "harmless": (0.05, 0.15),
        "levels": (
            LevelRow(feature=REFUSAL, kind="refusal", prompt=0.1, plain=0.2, harmful=0.3, harmless=0.4),
            LevelRow(feature=HARM, kind="harm", prompt=0.5, plain=None, harmful=0.7, harmless=0.8),
        ),
        "words": (
            WordRow(words="Play", harm=0.2, refusal=0.3, p_refuse=-0.4, gradient=0.9, ig=0.1),
            WordRow(words="now", harm=0.001, refusal=0.1, p_refuse=-0.001, gradient=0.8, ig=-0.2),
            WordRow(words="then", harm=0.0, refusal=0.0, p_refuse=0.0, gradient=0.7, ig=0.0),
        ),
        "changes": (
            RestoredRow(what="all of F*", features=9, p_refuse=0.75, outcome=Outcome.PARTIAL_REFUSAL, answer="one"),
            RestoredRow(what=LOCAL_PATCHES, features=1, p_refuse=0.5, outcome=None, answer="two"),
        ),
        "patches": (PatchRow(feature=REFUSAL, kind="refusal", token="\n", before=0.1, value=1.5),),
    }
    return Explanation(study="explain", **(given | changes))


@pytest.mark.parametrize(
    ("harm", "refusal", "said"),
    [
        (0.99, 0.59, ("less than half", "less than half")),
        (1.0, 0.6, ("much the same", "much the same")),
        (4.0, 2.4, ("much the same", "much the same")),
        (4.01, 2.41, ("more than twice", "more than twice")),
        (0.5, 1.2, ("less than half", "much the same")),
    ],
)
def test_signals_are_held_against_the_plain_version(harm: float, refusal: float, said: tuple[str, str]) -> None:
    (verdict,) = explained(harm, refusal).page().verdicts
    one, other = verdict.index("harm signal"), verdict.index("refusal signal")
    assert verdict[:one].rstrip().endswith(f"{said[0]} the" if said[0] != "much the same" else said[0])
    assert verdict[one:other].rstrip().endswith(f"{said[1]} the" if said[1] != "much the same" else said[1])
    assert f"({harm:.2f}, 2.00)" in verdict
    assert f"({refusal:.2f}, 1.20)" in verdict
    # Without a plain version 1 is a refused request.
    alone = explained(harm, refusal, plain=False).page().verdicts[0]
    assert f"({harm:.2f}, 1.00)" in alone
    assert f"({refusal:.2f}, 1.00)" in alone


def test_outcomes_and_what_changes_them_are_said_in_order() -> None:
    (verdict,) = explained().page().verdicts
    order = (
        *("Answered (P(refuse) 0.25)", "refused (P(refuse) 0.95)"),
        *("With all of F*: partly refused (P(refuse) 0.75)", f"With {LOCAL_PATCHES}: not judged (P(refuse) 0.50)"),
    )
    places = [verdict.index(each) for each in order]
    assert places == sorted(places)
    assert explained(warnings=("a doubt",)).page().warnings == ("a doubt",)
    assert [section.brief for section in explained(warnings=()).page().sections] == [True] * 4 + [False] * 3
    broken = explained(prompt=reading("prompt", 0.1, 0.1, 0.2, Outcome.INCOHERENT), plain=False)
    assert broken.page().verdicts[0].startswith("Answered without sense")


def test_the_explanation_s_tables_hold_each_number_in_its_column() -> None:
    result = explained()
    first, second, refused, answered = cells(result, "Prompt and plain version")
    assert first == ("prompt", "0.25", "0.80", "0.40", "compliance")
    assert second[1:] == ("0.95", "2.00", "1.20", "refusal")
    assert refused[1:] == ("–", "1.00", "1.00", "–")
    assert answered[1:] == ("–", "0.05", "0.15", "–")
    assert len(cells(explained(plain=False), "Prompt")) == 3
    assert cells(result, "What changes the answer") == [
        ("all of F*", "9", "0.75", "partial_refusal"), (LOCAL_PATCHES, "1", "0.50", "–"),
    ]  # fmt: skip
    assert cells(result, "What changes the answer", 1) == [("2:5", "refusal", "'\\n'", "0.10", "1.50")]
    assert cells(result, "Words") == [
        ("Play", "+0.30", "+0.10", "+0.20", "−0.40"),
        ("now", "+0.10", "−0.20", "0.00", "0.00"),
        ("then", "0.00", "0.00", "0.00", "0.00"),
    ]
    # Ranks of (.1, −.2, 0) and (.3, .1, 0): 3, 1, 2 and 3, 2, 1.
    assert "correlation over the 3 words 0.50" in blocks(result, Table, "Words")[0].caption
    assert cells(result, "Features") == [
        ("2:5", "refusal", "0.10", "0.20", "0.30", "0.40"), ("0:3", "harm", "0.50", "–", "0.70", "0.80"),
    ]  # fmt: skip
    (answers,) = blocks(result, Transcripts)
    assert [(t.prompt, [answer for _, answer in t.answers]) for t in answers.transcripts] == [
        ("prompt!", ["answer to prompt", "one", "two"]), ("plain!", ["answer to plain"]),
    ]  # fmt: skip
    assert answers.harmful


def test_patches_that_do_not_bring_refusal_back_are_said_not_to() -> None:
    def titles(p_refuse: float, what: str = LOCAL_PATCHES) -> str:
        row = RestoredRow(what=what, features=1, p_refuse=p_refuse, outcome=None, answer="")
        return blocks(explained(changes=(row,)), Table, "What changes the answer")[1].title

    assert titles(0.5) == titles(0.9) != titles(0.49) == titles(0.9, "all of F*")


def test_tokens_are_coloured_by_the_strongest_of_both_prompts() -> None:
    (tokens,) = blocks(explained(), Tokens)
    assert [name for name, _ in tokens.lines] == ["prompt", "plain version"]
    # Harm .2 and .5 at most, refusal .1 and .3.
    assert [[(t.upper, pytest.approx(t.lower)) for t in line] for _, line in tokens.lines] == [
        [(pytest.approx(0.4), 0.0), (0.0, 1 / 3)],
        [(1.0, 0.0), (0.0, 1.0)],
    ]
    assert tokens.caption.index("0.50") < tokens.caption.index("0.30")


def test_longest_lists_are_cut_and_folded() -> None:
    words, levels = explained().words, explained().levels
    assert len(cells(explained(words=words[:1] * 13), "Words")) == 12
    folds = [blocks(explained(levels=levels[:1] * n), Table, "Features")[0].folded for n in (24, 25)]
    assert folds == [False, True]


# -- cards of features -------------------------------------------------------------------------------------------------


def card(feature: FeatureId, role: Any, score: float | None, **changes: Any) -> Card:
    classes: Any = (("harmful", "instruction", 0.1), ("harmless", "instruction", 0.2))
    spreads = tuple(
        Spread(label=label, region=region, fires=about(share), counts=(1, 3)) for label, region, share in classes
    )
    given: dict[str, Any] = {
        "role": FeatureRole(feature=feature, role=role, instruction=0.1, post_instruction=0.2, share=about(0.3)),
        "score": score,
        "tokens": ((" a", 1.0, 2), ("\n", 0.5, 3)),
        "examples": (Example(prompt="p", label="harmful", token="\n", activation=1.25),),
        "promotes": (" up", " on"),
        "demotes": (" down",),
        "edges": (0.0, 0.5, 1.0),
        "spreads": spreads,
    }
    return Card(**(given | changes))


def test_cards_are_counted_by_role_and_stand_in_their_columns() -> None:
    cards = (
        *(card(FeatureId(2, n), "refusal", 0.5 + n) for n in range(3)),
        card(LATER, "mixed", 0.25),
        card(HARM, "harm", None),
        card(FeatureId(0, 4), "harm", 0.125),
    )
    result = FeaturesResult(study="features", cards=cards)
    (verdict,) = result.page().verdicts
    assert result.model_copy(update={"warnings": ("a doubt",)}).page().warnings == ("a doubt",)
    # The harm feature that is not in F* is not counted.
    order = ("Of the 5 features", "3 fire", "(refusal)", "1 on", "(harm)", "1 on both")
    places = [verdict.index(each) for each in order]
    assert places == sorted(places)
    table = blocks(result, Table, "Feature cards")[0]
    assert table.rows[0] == ("2:0", "refusal", "0.500", "30% [25–35]", " a \\n", " up  on")
    assert table.rows[4][2] == "–"
    assert table.strong == {0, 1, 2, 3, 5}
    assert cells(result, "Where they fire")[0] == ("2:0", "refusal", "10% [5–15]", "20% [15–25]")
    # A share of the prompts over the middle of each bin.
    chart = blocks(result, Chart, "Where they fire")[0]
    assert points(chart, "x", "y") == {(0.25, 0.25), (0.75, 0.75)}
    examples = blocks(result, Table, "Prompts that activate them most")
    assert len(examples) == len(cards)
    assert examples[0].rows == (("1.25", "\\n", "harmful", "p"),)


def test_descriptions_and_pages_are_shown_where_there_are_any() -> None:
    known = card(REFUSAL, "refusal", 0.5, url="https://x/1", description="says no")
    result = FeaturesResult(study="features", cards=(known,), list_url="https://x/list")
    assert cells(result, "Feature cards")[0][-1] == "says no"
    assert cells(result, "Feature cards", 1) == [("2:5", "https://x/1")]
    assert any("https://x/list" in text.text for text in blocks(result, Text, "Feature cards"))
    bare = FeaturesResult(study="features", cards=(card(REFUSAL, "refusal", 0.5),))
    assert len(blocks(bare, Table, "Feature cards")) == 1
