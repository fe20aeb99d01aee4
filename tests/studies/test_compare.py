"""The experiment on answers that are written by hand: strengths, rows, controls and comparisons are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scripted import OWN, POOL, TEXT, Scripted, about, judged, one_set, outcomes, prompt_set, refused, scripted

from demur.errors import InputError
from demur.judges import JUDGES, Judge
from demur.stats import clustered_rate, holm, mcnemar, mean_of_runs, one_more_draw
from demur.studies.benchmark import Config as BenchmarkConfig
from demur.studies.compare import share_of
from demur.studies.comparisons import Curve, Point, compare_at_level, compare_chosen
from demur.studies.config import COMPLIANCE, MAIN, CompareConfig
from demur.studies.methods import Selection, Sets
from demur.studies.results import CompareResult, Comparison, EffectRow, EstimatorRow, SideEffects, SplitUse, Trial
from demur.studies.side_effects import mean_side_effects
from demur.studies.tuning import Chosen
from demur.types import Outcome, Verdict

ASKED: dict[str, Any] = {"suppress": "0,-1", "induce": "2,5", "random_sets": 3, "n_exact": 0}
SCRIPT: dict[tuple[str, str, str, float], str] = {
    # .25 + 3/3, .75 + 2/3: the second is best.
    ("tuning-harmful", MAIN, "suppress", 0): "YNNN", ("tuning-harmless", MAIN, "suppress", 0): "YYYN",
    ("tuning-harmful", MAIN, "suppress", -1): "YYYN", ("tuning-harmless", MAIN, "suppress", -1): "YYyY",
    # .5 + 3/3, 1 + 0/3: the first is best.
    ("tuning-harmful", "other", "suppress", 0): "YYNN", ("tuning-harmless", "other", "suppress", 0): "YYYP",
    ("tuning-harmful", "other", "suppress", -1): "YYYY", ("tuning-harmless", "other", "suppress", -1): "yyyY",
    # Nothing can be scored.
    ("tuning-harmful", "alone", "suppress", 0): "????", ("tuning-harmful", "alone", "suppress", -1): "????",
    ("tuning-harmless", MAIN, "induce", 2): "NYYY", ("tuning-harmless", MAIN, "induce", 5): "NPYY",
    ("tuning-harmless", "other", "induce", 2): "NNNY", ("tuning-harmless", "other", "induce", 5): "NNNY",
    ("test-harmful", MAIN, "suppress", 0): "YNNNNN", ("test-harmful", MAIN, "suppress", -1): "YYYYNX",
    ("test-harmless", MAIN, "suppress", -1): "YYyNYNX", ("over-refusal", MAIN, "suppress", -1): "YYN",
    ("test-harmful", "other", "suppress", 0): "YYNNNy", ("test-harmful", "other", "suppress", -1): "YYYYY?",
    ("test-harmless", "other", "suppress", 0): "YYYYNPX",
    ("test-harmful", "alone", "suppress", 0): "NNNNPY", ("test-harmful", "alone", "suppress", -1): "YNNNPY",
    ("test-harmful", "of-each", "suppress", -1): "YYYYYY",
    ("test-harmful", "drawn-0", "suppress", -1): "NNNNNY", ("test-harmful", "drawn-1", "suppress", -1): "YNNNPY",
    ("test-harmful", "drawn-2", "suppress", -1): "NNNNNN", ("test-harmless", "drawn-1", "suppress", -1): "NYYYYYX",
    ("test-harmless", MAIN, "induce", 2): "NYYYNPX", ("test-harmless", MAIN, "induce", 5): "NNNYNPX",
    ("test-harmless", "other", "induce", 2): "NNYYNPX", ("test-harmless", "other", "induce", 5): "YYYYNPX",
    ("test-harmless", "drawn-0", "induce", 5): "NYYYNPX", ("test-harmless", "drawn-1", "induce", 5): "NNYYNPX",
    ("test-harmful", "size-1", "suppress", -1): "YYYNN?", ("test-harmful", "size-3", "suppress", -1): "YYYYYY",
}  # fmt: skip
COSTS = {
    (MAIN, 0.0): 0.01, (MAIN, -1.0): 0.04, ("other", 0.0): 0.02, ("other", -1.0): 0.2, ("alone", 0.0): 0.03,
    ("drawn-0", -1.0): 0.1, ("drawn-1", -1.0): 0.3, ("drawn-2", -1.0): 0.2, ("size-1", -1.0): 0.006,
    ("size-3", -1.0): 0.05,
}  # fmt: skip
METHODS = ("other", "alone", "of-each", "drawn")


class Harsh(Judge):
    """A judge of harm: only the plain yes is harmful, and of what makes no sense it says nothing."""

    kind: ClassVar[str] = "harsh"
    gives: ClassVar[tuple[str, ...]] = ("harmful",)
    closed: ClassVar[list[str]] = []

    @property
    def usage(self) -> Any:
        return "7 requests"

    def judge(self, answers: Any) -> list[Verdict]:
        harm = {"X": None, "?": None}
        return [Verdict(outcome=None, judge="harsh", harmful=harm.get(a.text, a.text == "Y")) for a in answers]

    def close(self) -> None:
        self.closed.append("harsh")


def benchmark(**changes: Any) -> BenchmarkConfig:
    asked = {"methods": METHODS, "controls": "chosen", "sizes": "1,3,9", "ce_levels": "0.02,0.1", "resamples": 200}
    return BenchmarkConfig.model_validate({**ASKED, **asked, "harm_judges": ("harsh",), "tasks": ("quiz",), **changes})


def study(**changes: Any) -> CompareConfig:
    return CompareConfig.model_validate({**ASKED, "methods": ("other",), **changes})


@pytest.fixture(scope="module", name="whole")
def whole_benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareResult, Scripted]:
    JUDGES.register("harsh", Harsh)
    out = tmp_path_factory.mktemp("run") / "whole"
    knows = {"none": 0.9, MAIN: 0.8, "drawn-0": 0.7, "other": 0.6}
    made = scripted(out, benchmark(), SCRIPT, COSTS, knows=knows, texts=(TEXT,))
    JUDGES.unregister("harsh")
    return made


def doubts(context: Scripted) -> list[str]:
    """What was warned of, but for the two of seven harmless prompts that the clean model refuses."""
    return [each for each in context.warnings if "of 7 harmless prompts" not in each]


def rows(result: CompareResult, prompts: str, kind: str, method: str) -> list[EffectRow]:
    return [each for each in result.effects if (each.prompts, each.kind, each.method) == (prompts, kind, method)]


def test_what_is_answered_and_in_which_order(whole: Any) -> None:
    """Every method at every strength, controls at the chosen one of F*, local sets on harmful prompts alone."""
    effects = whole[0].effects
    assert [(e.prompts, e.kind, e.method, e.strength, e.setting, e.chosen, e.sets) for e in effects] == [
        ("harmful", "none", "none", 1.0, "", False, 1),
        ("harmless", "none", "none", 1.0, "", False, 1),
        ("over-refusal", "none", "none", 1.0, "", False, 1),
        *((prompts, "suppress", MAIN, c, f"c = {text}", chosen, 1) for prompts, c, text, chosen in (
            ("harmful", 0.0, "0", False), ("harmful", -1.0, "−1", True), ("harmless", -1.0, "−1", True),
            ("over-refusal", -1.0, "−1", True))),
        *((prompts, "suppress", "other", c, f"c = {text}", chosen, 1) for prompts, c, text, chosen in (
            ("harmful", 0.0, "0", True), ("harmful", -1.0, "−1", False), ("harmless", 0.0, "0", True),
            ("over-refusal", 0.0, "0", True))),
        *((prompts, "suppress", "alone", c, f"c = {text}", chosen, 1) for prompts, c, text, chosen in (
            ("harmful", 0.0, "0", True), ("harmful", -1.0, "−1", False), ("harmless", 0.0, "0", True),
            ("over-refusal", 0.0, "0", True))),
        ("harmful", "suppress", "of-each", -1.0, "c = −1", True, 1),
        *((prompts, "suppress", "drawn", -1.0, "c = −1", True, 3) for prompts in
          ("harmful", "harmless", "over-refusal")),
        ("harmless", "induce", MAIN, 2.0, "v = 2", False, 1),
        ("harmless", "induce", MAIN, 5.0, "v = 5", True, 1),
        ("harmless", "induce", "other", 2.0, "v = 2", True, 1),
        ("harmless", "induce", "other", 5.0, "v = 5", False, 1),
        ("harmless", "induce", "drawn", 5.0, "v = 5", True, 3),
    ]  # fmt: skip


def test_a_row_counts_what_its_answers_are(whole: Any) -> None:
    (clean,) = rows(whole[0], "harmful", "none", "none")
    assert (clean.refusal.value, clean.compliance.value, clean.incoherent.value) == pytest.approx((5 / 6, 1 / 6, 0))
    assert (clean.kept, clean.exact_match, clean.repaired, clean.side_effects, clean.p_clean) == (None,) * 5
    assert clean.attack["harsh"].value == pytest.approx(1 / 6)
    (first, best) = rows(whole[0], "harmful", "suppress", MAIN)
    assert first.compliance.value == pytest.approx(1 / 6)
    assert best.refusal == clustered_rate([refused("YYYYNX")])
    assert best.compliance == clustered_rate([outcomes("YYYYNX")])
    assert best.incoherent.value == pytest.approx(1 / 6)
    assert best.outcomes == {
        Outcome.REFUSAL: 1, Outcome.PARTIAL_REFUSAL: 0, Outcome.COMPLIANCE: 4, Outcome.INCOHERENT: 1,
    }  # fmt: skip
    # The judge of harm says nothing of what makes no sense.
    assert (best.attack["harsh"].value, best.attack["harsh"].n, best.attack["harsh"].unscored) == (0.8, 5, 1)
    # One harmful prompt is complied with by the clean model; harmful prompts are never repaired.
    assert best.kept is not None
    assert (best.kept.value, best.kept.n, best.repaired) == (0.0, 1, None)
    (unscored,) = [row for row in rows(whole[0], "harmful", "suppress", "other") if not row.chosen]
    assert (unscored.compliance.value, unscored.compliance.n, unscored.compliance.unscored) == (1.0, 5, 1)


def test_kept_and_repaired_divide_the_prompts_by_the_clean_answer(whole: Any) -> None:
    (row,) = rows(whole[0], "harmless", "suppress", MAIN)
    assert row.kept is not None
    assert row.exact_match is not None
    assert row.repaired is not None
    # Clean YYYYNPX: four are answered, of which three still are, two in the same words; one of two is repaired.
    assert (row.kept.value, row.kept.n) == (0.75, 4)
    assert (row.exact_match.value, row.exact_match.n) == (0.5, 4)
    assert (row.repaired.value, row.repaired.n) == (0.5, 2)
    assert row.attack == {}
    assert row.side_effects is None
    (drawn,) = rows(whole[0], "harmless", "suppress", "drawn")
    assert drawn.kept is not None
    assert drawn.repaired is not None
    assert (drawn.kept.value, drawn.kept.n) == (pytest.approx(11 / 12), 12)
    assert (drawn.repaired.value, drawn.repaired.n) == (pytest.approx(2 / 6), 6)
    (clean,) = rows(whole[0], "harmless", "none", "none")
    assert (clean.kept, clean.exact_match, clean.repaired, clean.p_clean) == (None,) * 4


def test_a_control_adds_its_sets(whole: Any) -> None:
    (drawn,) = rows(whole[0], "harmful", "suppress", "drawn")
    words = ("NNNNNY", "YNNNPY", "NNNNNN")
    assert drawn.compliance == clustered_rate([outcomes(word) for word in words])
    assert drawn.attack["harsh"] == clustered_rate([outcomes(word) for word in words])
    assert drawn.outcomes[Outcome.REFUSAL] == 5 + 3 + 6
    assert drawn.outcomes[Outcome.PARTIAL_REFUSAL] == 1
    assert drawn.p_clean is None
    effects = drawn.side_effects
    assert effects is not None
    assert effects.ce_answers.value == pytest.approx(0.2)
    assert effects.kl.value == pytest.approx(0.6)
    assert effects.ce_text is not None
    assert effects.ce_text.value == pytest.approx(0.4)


def test_side_effects_stand_beside_each_strength_on_harmful_prompts(whole: Any) -> None:
    measured = {
        (row.method, row.strength): row.side_effects.ce_answers.value
        for row in whole[0].effects
        if row.side_effects is not None
    }
    assert measured == pytest.approx({
        (MAIN, 0.0): 0.01, (MAIN, -1.0): 0.04, ("other", 0.0): 0.02, ("other", -1.0): 0.2, ("alone", 0.0): 0.03,
        ("alone", -1.0): 0.0, ("drawn", -1.0): 0.2,
    })  # fmt: skip
    assert all(row.prompts == "harmful" for row in whole[0].effects if row.side_effects is not None)


def test_tests_against_the_clean_model_are_adjusted_for_suppression_and_induction_apart(whole: Any) -> None:
    words = {"test-harmful": "NNNNPY", "test-harmless": "YYYYNPX", "over-refusal": "YNN"}
    for kind in ("suppress", "induce"):
        tested = [row for row in whole[0].effects if row.kind == kind and row.method != "drawn"]
        exact: list[float] = []
        for row in tested:
            name = row.prompts if row.prompts == "over-refusal" else f"test-{row.prompts}"
            word = SCRIPT.get((name, row.method, kind, row.strength), words[name])
            exact.append(mcnemar(refused(word), refused(words[name])).p)
        assert [row.p_clean for row in tested] == pytest.approx(list(holm(exact)))
        assert all(row.p_clean is None for row in whole[0].effects if row.kind == kind and row.method == "drawn")


def test_f_star_is_held_against_controls_where_it_is_to_do_something(whole: Any) -> None:
    suppressed = one_more_draw(4 / 6, (1 / 6, 2 / 6, 0.0), n=6)
    induced = one_more_draw(5 / 7, (3 / 7, 4 / 7, 2 / 7), n=7)
    got = [(row.control, row.prompts, row.kind, row.measure, row.value, row.sets) for row in whole[0].controls]
    assert got == [
        ("drawn", "harmful", "suppress", "compliance", pytest.approx(4 / 6), pytest.approx((1 / 6, 2 / 6, 0.0))),
        ("drawn", "harmless", "induce", "refusal", pytest.approx(5 / 7), pytest.approx((3 / 7, 4 / 7, 2 / 7))),
    ]
    for row, test in zip(whole[0].controls, (suppressed, induced), strict=True):
        assert (row.low, row.high, row.p) == pytest.approx((test.low, test.high, test.p))


def expected(harsh: bool) -> list[Comparison]:
    """Every comparison of the benchmark by one measure, from the words alone."""

    def read(word: str) -> list[bool | None]:
        return [None if letter in "?X" else letter == "Y" for letter in word] if harsh else outcomes(word)

    mean = mean_of_runs([0.1, 0.3, 0.2], n=10).value

    def curve(name: str, strengths: tuple[float, ...], chosen: int | None, sets: tuple[str, ...] = ()) -> Curve:
        points = tuple(
            Point(
                f"c = {c:g}".replace("-", "−"),
                [read(SCRIPT["test-harmful", each, "suppress", c]) for each in sets or (name,)],
                mean if sets else None if name == "of-each" else COSTS.get((name, c), 0.0),
            )
            for c in strengths
        )
        clean = [read("NNNNPY")]
        return Curve(name, points, None if chosen is None else points[chosen], clean, name == "of-each")

    measure = "harsh" if harsh else COMPLIANCE
    main = curve(MAIN, (0.0, -1.0), 1)
    others = [
        curve("other", (0.0, -1.0), 0),
        curve("alone", (0.0, -1.0), None),
        curve("of-each", (-1.0,), 0),
        curve("drawn", (-1.0,), 0, ("drawn-0", "drawn-1", "drawn-2")),
    ]
    groups = [[compare_chosen(main, each, measure) for each in others]]
    curved = [each for each in others if each.name != "of-each"]
    groups += [[compare_at_level(main, each, measure, level, 200) for each in curved] for level in (0.02, 0.1)]
    return [
        each if math.isnan(each.p) else each.model_copy(update={"p_holm": p})
        for group in groups
        for each, p in zip(group, holm([each.p for each in group]), strict=True)
    ]


def test_comparisons_are_of_chosen_strengths_and_of_curves_by_every_measure(whole: Any) -> None:
    wanted = [*expected(harsh=False), *expected(harsh=True)]
    got = whole[0].comparisons
    named = [(each.other, each.measure, each.level, each.setting, each.other_setting) for each in got]
    assert named == [(each.other, each.measure, each.level, each.setting, each.other_setting) for each in wanted]
    for each, other in zip(got, wanted, strict=True):
        for name in ("value", "other_value", "difference"):
            mine, its = getattr(each, name), getattr(other, name)
            assert (mine is None) == (its is None), (name, other)
            if its is not None:
                numbers = [(e.value, e.low, e.high, e.n) for e in (mine, its)]
                assert numbers[0] == pytest.approx(numbers[1], nan_ok=True), (name, other)
        for name in ("p", "p_holm", "ce", "other_ce"):
            assert getattr(each, name) == pytest.approx(getattr(other, name), nan_ok=True), (name, other)


def test_a_method_of_which_nothing_was_scored_is_shown_at_its_first_strength_and_not_compared(whole: Any) -> None:
    (row,) = [each for each in whole[0].comparisons if each.other == "alone" and each.level is None][:1]
    assert row.other_value is None
    assert math.isnan(row.p)
    assert any("none of the tuning answers under Alone could be scored" in each for each in whole[1].warnings)
    assert sum("could be scored" in each for each in whole[1].warnings) == 1


def test_f_star_is_cut_to_sizes_as_far_as_the_pool_goes(whole: Any) -> None:
    sizes = whole[0].sizes
    assert [(row.size, row.setting) for row in sizes] == [(1, "c = −1"), (3, "c = −1")]
    assert sizes[0].compliance == clustered_rate([outcomes("YYYNN?")])
    assert sizes[0].refusal == clustered_rate([refused("YYYNN?")])
    assert (sizes[0].incoherent.value, sizes[0].incoherent.n) == (0.0, 5)
    assert [row.ce_answers.value for row in sizes] == pytest.approx([0.006, 0.05])
    assert any("from 9 on" in each and "holds 5 features" in each for each in whole[1].warnings)


def test_extras_are_of_the_clean_model_and_of_each_method_at_its_chosen_strength(whole: Any) -> None:
    got = [
        (each.method, each.setting, each.knowledge and each.knowledge.auroc.value, len(each.capability))
        for each in whole[0].extras
    ]
    assert got == [
        ("none", "", 0.9, 1), (MAIN, "c = −1", 0.8, 1), ("other", "c = 0", 0.6, 1), ("alone", "c = 0", None, 1),
        ("drawn", "c = −1", 0.7, 0),
    ]  # fmt: skip


def test_the_first_answers_are_shown_of_the_clean_model_and_at_chosen_strengths(whole: Any) -> None:
    samples = whole[0].samples
    shown = {(each.method, each.kind, each.label, each.setting) for each in samples}
    assert shown == {
        ("none", "none", "harmful", ""), ("none", "none", "harmless", ""), (MAIN, "suppress", "harmful", "c = −1"),
        (MAIN, "suppress", "harmless", "c = −1"), ("other", "suppress", "harmful", "c = 0"),
        ("alone", "suppress", "harmful", "c = 0"), ("of-each", "suppress", "harmful", "c = −1"),
        ("drawn", "suppress", "harmful", "c = −1"), (MAIN, "induce", "harmless", "v = 5"),
    }  # fmt: skip
    mine = [each for each in samples if (each.method, each.kind, each.label) == (MAIN, "suppress", "harmful")]
    assert [(each.prompt_id, each.prompt, each.text, each.outcome) for each in mine] == [
        (f"test-harmful-{n}", f"test-harmful {n}", "Y", Outcome.COMPLIANCE) for n in range(4)
    ]
    of_control = [each.text for each in samples if each.method == "drawn"]
    assert of_control == list("NNNN")


def test_what_is_told_beside_the_numbers(whole: Any) -> None:
    result: CompareResult = whole[0]
    assert (result.k, result.pool_size) == (2, 5)
    assert list(result.labels.items()) == [
        (MAIN, "F* (CosSim+AP)"), ("other", "Other"), ("alone", "Alone"), ("of-each", "Of each"), ("drawn", "Drawn"),
    ]  # fmt: skip
    assert (result.controls_drawn, result.harm_judges) == (("drawn",), ("harsh",))
    assert {name: each.features for name, each in result.sets.items()} == {MAIN: POOL[:2], "other": (OWN,)}
    assert [token.text for token in result.refusal_tokens] == ["N"]
    assert result.without_signal == pytest.approx(1 / 3)
    # Own sets of the three prompts: both of F*, one of it, none.
    assert result.local_overlap == pytest.approx(0.5)
    assert (result.usage, Harsh.closed[-1]) == ({"harsh": "7 requests"}, "harsh")
    assert result.peak_memory > 0
    assert result.counters["verdicts"][0] > 0
    assert result.counters["feature_sets"] == (2, 0)
    assert result.splits[-2:] == (
        SplitUse(split="test", label="harmful", n=6, refused=5, complied=1, used=6),
        SplitUse(split="test", label="harmless", n=7, refused=2, complied=4, used=7),
    )
    assert [(each.split, each.label, each.used) for each in result.splits[:4]] == [
        ("direction", "harmful", 2), ("direction", "harmless", 2), ("selection", "harmful", 3),
        ("selection", "harmless", 3),
    ]  # fmt: skip


def test_progress_and_seconds_are_told(whole: Any) -> None:
    context: Scripted = whole[1]
    # Seven sets of harmful prompts at a strength, and three of the control.
    assert [step for step in context.steps if step[0] == "side effects"] == [
        ("side effects", n, 9) for n in range(1, 10)
    ]
    told = [step[0] for step in context.steps]
    assert "test: drawn, c = −1, harmful (3)" in told
    assert "tuning: cossim+ap, v = 2, harmless" in told
    assert "test: F* of 1" in told
    assert told.count("clean: test, harmless") == 1
    assert set(context.seconds) == {
        "clean answers", "features of the methods", "exact patching", "tuning", "suppression and induction",
        "side effects", "comparisons",
    }  # fmt: skip


def test_exact_patching_takes_the_first_refused_test_prompts(tmp_path: Path) -> None:
    row = EstimatorRow(
        method="ig", steps=1, n=2, spearman=about(0.5), spearman_prompt=0.5, gap=0.1, gap_relative=0.1, used=False
    )
    result, context = scripted(tmp_path / "run", study(n_exact=2), SCRIPT, clean={"test-harmful": "YNPNNN"},
                               estimators=(row,))  # fmt: skip
    (prompts,) = context.exact
    assert prompts.ids == ("test-harmful-1", "test-harmful-2")
    assert result.estimators == (row,)


# -- a study without side effects of every kind ------------------------------------------------------------------------


def test_a_study_measures_neither_curves_nor_knowledge(tmp_path: Path) -> None:
    config = study(methods=("other", "drawn"), controls="all", ce_levels="0.02")
    result, context = scripted(tmp_path / "run", config, SCRIPT, COSTS, knows={"none": 0.9}, texts=(TEXT,))
    assert {each.level for each in result.comparisons} == {None}
    assert (result.extras, result.sizes, result.trials, result.harm_judges) == ((), (), (), ())
    assert {row.prompts for row in result.effects} == {"harmful", "harmless"}
    assert all(row.side_effects.ce_text is None for row in result.effects if row.side_effects)
    # All strengths of a control.
    assert [row.strength for row in result.effects if (row.method, row.prompts) == ("drawn", "harmful")] == [0.0, -1.0]
    assert [row.strength for row in result.effects if (row.method, row.kind) == ("drawn", "induce")] == [2.0, 5.0]
    assert doubts(context) == []
    assert not [each for each in context.asked if each[0].startswith("over")]
    assert "test: drawn, v = 2, harmless (1)" in [step[0] for step in context.steps]


def test_a_control_of_which_no_set_can_be_drawn_is_left_out(tmp_path: Path) -> None:
    result, _ = scripted(tmp_path / "run", study(methods=("none-left", "other")), SCRIPT)
    assert list(result.labels) == [MAIN, "other"]
    assert result.controls == ()


def strengths(result: CompareResult, method: str = MAIN) -> tuple[float | None, float | None]:
    """The chosen strengths of suppression and of induction."""
    found = {row.kind: row.strength for row in result.effects if row.method == method and row.chosen}
    return found.get("suppress"), found.get("induce")


Word = str


@pytest.mark.parametrize(
    ("answers", "costs", "clean", "best"),
    [
        # Harmful prompts complied with and exact matches among answered harmless ones add up.
        pytest.param({0: ("YNNN", "YYYN"), -1: ("YYNN", "YYYN")}, {}, "YYYN", -1, id="more compliance"),
        pytest.param({0: ("YYNN", "YYYN"), -1: ("YYNN", "YYyN")}, {}, "YYYN", 0, id="more exact matches"),
        pytest.param({0: ("YYNN", "NYYN"), -1: ("YYYN", "NNYN")}, {}, "YYYN", 0, id="a third outweighs a quarter"),
        pytest.param({0: ("YYNN", "YNNN"), -1: ("YYYN", "YNNN")}, {}, "YNNN", -1, id="one answered prompt"),
        # What the clean model refused or mumbled does not count, whatever becomes of it.
        pytest.param({0: ("YYNN", "YYNX"), -1: ("YYNN", "YyNX"), -3: ("YYNN", "yYYY")}, {}, "YYNX", 0, id="not clean"),
        # Nothing was answered: compliance alone.
        pytest.param({0: ("YNNN", "NNNN"), -1: ("YYNN", "NNNN")}, {}, "NNNN", -1, id="nothing to keep"),
        # Of equals the lower ΔCE, then the milder.
        pytest.param({}, {0: 0.03, -1: 0.02, -3: 0.05}, "YYYN", -1, id="cheaper"),
        pytest.param({}, {0: 0.03, -1: 0.03 - 1e-8, -3: 0.03}, "YYYN", 0, id="as cheap but for the last digits"),
        pytest.param({}, {0: 0.03, -1: 0.03 - 2e-6, -3: 0.03}, "YYYN", -1, id="cheaper by little"),
        pytest.param({}, {}, "YYYN", 0, id="milder"),
        # Unscored answers are no refusals, and an unscored strength is none.
        pytest.param({0: ("Y???", "YYYN"), -1: ("YYYN", "YYYN")}, {}, "YYYN", 0, id="unscored answers"),
        pytest.param({0: ("????", "YYYN"), -1: ("NNNN", "NNNN"), -3: ("????", "YYYN")}, {}, "YYYN", -1, id="unscored"),
    ],
)  # fmt: skip
def test_the_strength_of_suppression(
    tmp_path: Path, answers: dict[float, tuple[Word, Word]], costs: dict[float, float], clean: Word, best: float
) -> None:
    script: dict[Any, str] = {}
    for c in (0.0, -1.0, -3.0):
        harmful, harmless = answers.get(c, ("NNNN", "NNNN" if answers else clean))
        script["tuning-harmful", "other", "suppress", c] = harmful
        script["tuning-harmless", "other", "suppress", c] = harmless
    priced = {("other", c): cost for c, cost in costs.items()}
    config = study(suppress="-3,0,-1")
    result, _ = scripted(tmp_path / "run", config, script, priced, clean={"tuning-harmless": clean})
    assert strengths(result, "other")[0] == best


def test_shares_that_add_up_to_the_same_are_equal(tmp_path: Path) -> None:
    """.7 + .1 is less than .8 + 0 in the last digit; of equals the cheaper one is taken."""
    clean = {"tuning-harmful": "N" * 10, "tuning-harmless": "Y" * 10}
    script: dict[Any, str] = {
        ("tuning-harmful", "other", "suppress", 0): "YYYYYYYNNN",
        ("tuning-harmless", "other", "suppress", 0): "YyyyyyyyyN",
        ("tuning-harmful", "other", "suppress", -1): "YYYYYYYYNN",
        ("tuning-harmless", "other", "suppress", -1): "y" * 10,
    }
    config = study(suppress="-1,0")
    result, _ = scripted(tmp_path / "run", config, script, {("other", -1.0): 0.01}, clean=clean)
    assert strengths(result, "other")[0] == 0


@pytest.mark.parametrize(
    ("words", "best"),
    [
        (("NYYY", "NNYY", "NNNY"), 9.0),
        (("NYYY", "NPYY", "NNYY"), 5.0),
        (("NNYX", "NNXX", "NNNN"), 9.0),
        (("NNYY", "NNYY", "NYYY"), 2.0),
        (("????", "NYYY", "????"), 5.0),
        (("????", "????", "????"), 9.0),
    ],
)  # fmt: skip
def test_the_strength_of_induction(tmp_path: Path, words: tuple[Word, ...], best: float) -> None:
    values = (9.0, 2.0, 5.0)
    by_value = dict(zip(sorted(values), words, strict=True))
    script: dict[Any, str] = {("tuning-harmless", "other", "induce", v): word for v, word in by_value.items()}
    result, _ = scripted(tmp_path / "run", study(induce=values), script)
    assert strengths(result, "other")[1] == best


def test_controls_and_local_sets_take_the_strengths_of_their_leader(whole: Any) -> None:
    context: Scripted = whole[1]
    assert (strengths(whole[0], "drawn"), strengths(whole[0], "of-each")) == ((-1.0, 5.0), (-1.0, None))
    assert not [each for each in context.asked if each[0].startswith("tuning") and each[1] in ("drawn-0", "of-each")]


def test_a_method_may_be_named_before_the_one_whose_strength_it_takes(tmp_path: Path) -> None:
    result, _ = scripted(tmp_path / "run", study(methods=("of-other", "other")), SCRIPT)
    assert (strengths(result, "of-other"), strengths(result, "other")[0]) == ((0.0, None), 0.0)


# -- warnings and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knows", "words"),
    [
        ({}, ["begin with the same token"]),
        # The interval's lower end, .05 below, is what counts.
        ({"none": 0.55}, ["no better than chance (AUROC 0.55)"]),
        ({"none": 0.56}, []),
    ],
)  # fmt: skip
def test_a_model_that_cannot_say_what_is_harmful_is_warned_of(
    tmp_path: Path, knows: dict[str, float], words: list[str]
) -> None:
    config = BenchmarkConfig.model_validate({**ASKED, "methods": ("other",), "sizes": ""})
    result, context = scripted(tmp_path / "run", config, SCRIPT, knows=knows)
    assert [each.capability for each in result.extras] == [(), (), ()]
    assert len(doubts(context)) == len(words)
    for warning, word in zip(doubts(context), words, strict=True):
        assert word in warning


def test_what_is_not_asked_is_not_warned_of(tmp_path: Path) -> None:
    config = BenchmarkConfig.model_validate({**ASKED, "methods": ("other",), "sizes": "5", "knowledge": False})
    result, context = scripted(tmp_path / "run", config, SCRIPT, knows={"none": 0.4})
    assert (doubts(context), result.extras) == ([], ())
    assert [row.size for row in result.sizes] == [5]
    with_tasks = config.model_copy(update={"tasks": ("quiz",)})
    result, context = scripted(tmp_path / "tasks", with_tasks, SCRIPT)
    assert [(each.method, each.knowledge, len(each.capability)) for each in result.extras] == [
        ("none", None, 1), (MAIN, None, 1), ("other", None, 1),
    ]  # fmt: skip
    assert doubts(context) == []


def test_refused_harmless_test_prompts_are_warned_of(tmp_path: Path) -> None:
    _, context = scripted(tmp_path / "run", study(), SCRIPT, clean={"test-harmless": "NNYYYYX"})
    assert [each for each in context.warnings if "refuses 29% of 7 harmless prompts (test prompts)" in each]


class Broken(Harsh):
    kind: ClassVar[str] = "broken"

    def judge(self, answers: Any) -> list[Verdict]:
        del answers
        raise InputError("no harm today")


def test_a_judge_of_harm_that_fails_is_warned_of_and_one_given_twice_refused(tmp_path: Path) -> None:
    JUDGES.register("broken", Broken)
    result, context = scripted(tmp_path / "run", study(harm_judges=("broken",)), SCRIPT)
    assert [each for each in context.warnings if "no harm today" in each]
    assert all(row.attack["broken"].n == 0 for row in result.effects if row.prompts == "harmful")
    with pytest.raises(InputError, match=r"\(broken, broken\)"):
        scripted(tmp_path / "twice", study(harm_judges=("broken", "broken")), SCRIPT)


def test_a_control_that_was_not_scored_is_held_against_nothing(tmp_path: Path) -> None:
    script = {**SCRIPT, ("test-harmful", "drawn-1", "suppress", -1): "??????"}
    result, _ = scripted(tmp_path / "run", study(methods=("drawn",)), script)
    assert [row.kind for row in result.controls] == ["induce"]


# -- a search for settings ---------------------------------------------------------------------------------------------


def test_a_search_chooses_sets_and_strengths_and_what_follows_takes_them(tmp_path: Path) -> None:
    trial = Trial(method="other", number=0, layer=0, position=-1, k0=5, k=1, strength=-1.0, compliance=about(0.5),
                  ce_answers=about(0.1), front=True, chosen=True)  # fmt: skip

    def search(context: Any, config: Any, before: Any) -> Chosen:
        work = context.trying(k=1)
        work.warn("the search says so")
        mine = before.__class__(before.clean, before.direction, before.pool, before.attribution, one_set(POOL[0]))
        main, other = Sets(Selection(work, mine, 1), config), Sets(Selection(work, mine, 1), config)
        return Chosen((trial,), {MAIN: main, "other": other}, {MAIN: 0.5, "other": -1.0})

    script = {("test-harmful", "size-1", "suppress", 0.5): "YYYYYY"}
    config = BenchmarkConfig.model_validate(
        {**ASKED, "methods": ("other", "drawn", "of-each"), "sizes": "", "knowledge": False, "tune": 3}
    )
    result, context = scripted(tmp_path / "run", config, script, search=search)
    assert result.trials == (trial,)
    assert (result.k, result.sets[MAIN].features) == (1, POOL[:1])
    # The strength that the search chose is asked beside the configured ones.
    main = [(row.strength, row.chosen) for row in result.effects if (row.method, row.prompts) == (MAIN, "harmful")]
    assert main == [(0.0, False), (-1.0, False), (0.5, True)]
    assert {strengths(result, name)[0] for name in (MAIN, "drawn", "of-each")} == {0.5}
    assert strengths(result, "other")[0] == -1.0
    assert strengths(result, MAIN)[1] == 2.0
    (row,) = [row for row in result.effects if row.method == MAIN and row.strength == 0.5 and row.prompts == "harmful"]
    assert row.compliance.value == 1.0
    assert "the search says so" in context.warnings
    assert not [each for each in context.asked if each[0] == "tuning-harmful"]


def test_without_a_search_none_is_begun(tmp_path: Path) -> None:
    def search(*_: Any) -> Chosen:
        raise AssertionError("a search was begun")

    config = BenchmarkConfig.model_validate({**ASKED, "methods": (), "sizes": "", "knowledge": False, "tune": 0})
    result, _ = scripted(tmp_path / "run", config, SCRIPT, search=search)
    assert result.trials == ()


# -- shares ------------------------------------------------------------------------------------------------------------


def test_a_share_is_over_the_prompts_whose_clean_answer_counts() -> None:
    prompts = prompt_set("test-harmless", 5)
    clean = judged("YNPX?", prompts)
    runs = [judged("NYYNY", prompts), judged("Y?NYY", prompts)]

    def share(*wanted: Outcome) -> tuple[float, int, int]:
        found = share_of(runs, clean, lambda run: run.complied, *wanted)
        return found.value, found.n, found.unscored

    assert share(Outcome.COMPLIANCE) == (0.5, 2, 0)
    assert share(Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL) == (pytest.approx(2 / 3), 3, 1)
    assert math.isnan(share()[0])


def test_side_effects_of_several_sets_are_their_mean() -> None:
    def effects(ce: float, text: float | None) -> SideEffects:
        return SideEffects(ce_answers=about(ce), ce_text=None if text is None else about(text), kl=about(10 * ce))

    one = effects(0.1, 0.5)
    assert mean_side_effects([one]) is one
    mean = mean_side_effects([one, effects(0.3, None), effects(0.2, 0.7)])
    assert mean.ce_answers == mean_of_runs([0.1, 0.3, 0.2], n=10)
    assert mean.kl == mean_of_runs([1.0, 3.0, 2.0], n=10)
    assert mean.ce_text == mean_of_runs([0.5, 0.7], n=10)
    assert mean_side_effects([effects(0.1, None), effects(0.2, None)]).ce_text is None
