"""`demur benchmark` on the planted model: methods, side effects and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_parts import blocks, unshown
from planted_study import effect, lasting

from demur.capability import CapabilityRow
from demur.report.blocks import Table
from demur.stats import holm, mcnemar
from demur.studies.benchmark import STUDY
from demur.studies.config import CompareConfig
from demur.studies.methods import get_method
from demur.studies.results import CompareResult, Comparison, MethodExtras

SMALL: dict[str, Any] = {
    "suppress": "0.9,0",
    "induce_multiples": "0.5,1",
    "random_sets": 3,
    "sizes": "1,2,500",
    "resamples": 200,
}
METHODS: tuple[str, ...] = STUDY.config.model_fields["methods"].default


@pytest.fixture(scope="module")
def benched(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareResult, Path]:
    out = tmp_path_factory.mktemp("run") / "planted"
    text = out.parent / "text.txt"
    text.write_text("\n".join(files.truth.harmless.texts[:6]), encoding="utf-8")
    looks = out.parent / "looks.jsonl"
    # Half of them are among the prompts that choose something, and must not be measured.
    looks.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in files.truth.harmless.texts), encoding="utf-8")
    return files.study(out, "benchmark", **SMALL, text=str(text), over_refusal=str(looks)), out


def compared(result: CompareResult, other: str, level: float | None = None) -> Comparison:
    return next(row for row in result.comparisons if (row.other, row.level) == (other, level))


def test_f_star_and_attribution_suppress_and_the_baselines_do_not(benched: Any) -> None:
    result: CompareResult = benched[0]
    for method in ("cossim+ap", "cossim+ap-local", "ap-falling", "direction"):
        row = effect(result, "harmful", "suppress", method)
        assert (row.refusal.value, row.compliance.value) == (0.0, 1.0), method
    for method in ("cossim", "actdiff", "random"):
        assert effect(result, "harmful", "suppress", method).refusal.value > 0.5, method
    random = effect(result, "harmful", "suppress", "random")
    assert (random.sets, random.refusal.n) == (3, 3 * 20)


def test_sets_are_what_selection_gives(benched: Any, files: Any) -> None:
    sets = benched[0].sets
    assert list(sets) == ["cossim+ap", "ap", "ap-falling", "actdiff", "cossim"]
    causal = files.truth.truth.causal
    assert set(sets["cossim+ap"].features) == causal
    assert set(sets["ap-falling"].features) == causal
    assert set(sets["cossim"].features) != causal
    assert all(len(each) == len(causal) for each in sets.values())


def test_every_method_has_its_rows(benched: Any) -> None:
    result: CompareResult = benched[0]
    harmful = [row for row in result.effects if (row.prompts, row.kind) == ("harmful", "suppress")]
    assert [row.method for row in harmful if row.chosen] == list(METHODS)
    for method in METHODS:
        strengths = [row.strength for row in harmful if row.method == method]
        one = method.endswith("-local") or method.startswith("direction")
        assert len(strengths) == (1 if one else 5 if method.startswith("subspace") else 2), method
    induced = {row.method for row in result.effects if row.kind == "induce"}
    assert induced == set(METHODS) - {
        "cossim+ap-local", "ap-local", "direction-affine", "subspace", "subspace-clusters",
    }  # fmt: skip
    assert result.extras[0].method == "none"


def test_side_effects_are_of_the_same_tokens_for_every_method(benched: Any) -> None:
    result: CompareResult = benched[0]
    measured = [(row, row.side_effects) for row in result.effects if row.side_effects is not None]
    assert {effects.ce_answers.n for _, effects in measured} == {20}
    assert {effects.ce_text.n for _, effects in measured if effects.ce_text is not None} == {6}
    main = effect(result, "harmful", "suppress", "cossim+ap").side_effects
    assert main is not None
    # The causal features are silent on harmless prompts.
    assert main.ce_answers.value == pytest.approx(0.0, abs=1e-4)
    assert main.kl.value == pytest.approx(0.0, abs=1e-4)
    assert not [row for row, _ in measured if row.method.endswith("-local")]


def test_prompts_that_chose_something_are_not_asked_for_over_refusal(benched: Any, files: Any) -> None:
    over = effect(benched[0], "over-refusal", "none", "none")
    used = 20 + 16 + 8  # direction, selection, tuning
    assert over.refusal.n == min(100, len(files.truth.harmless) - used)


def test_comparisons_are_paired_and_adjusted(benched: Any) -> None:
    result: CompareResult = benched[0]
    best = [row for row in result.comparisons if row.level is None]
    assert [row.other for row in best] == [method for method in METHODS if method != "cossim+ap"]
    assert [row.p_holm for row in best] == pytest.approx(list(holm([row.p for row in best])))
    row = compared(result, "cossim")
    assert row.difference is not None
    assert row.value is not None
    assert row.other_value is not None
    assert row.difference.value == pytest.approx(row.value.value - row.other_value.value)
    # F* alone succeeds on `only` prompts, CosSim alone on none.
    only = round(row.difference.value * 20)
    assert row.p == pytest.approx(mcnemar([True] * only, [False] * only).p)
    assert row.p_holm < 0.05
    assert compared(result, "ap-falling").p == 1.0


def test_curves_are_read_at_levels_of_side_effects(benched: Any) -> None:
    result: CompareResult = benched[0]
    assert {row.level for row in result.comparisons} == {None, 0.01, 0.05, 0.2}
    assert not [row for row in result.comparisons if row.level is not None and row.other.endswith("-local")]
    row = compared(result, "cossim", 0.01)
    assert row.value is not None
    assert row.ce == row.other_ce == 0.01
    # F* has no side effect here, so at any level it gets everything complied with.
    assert row.value.value == 1.0
    assert row.difference is not None
    assert row.difference.low <= row.difference.value <= row.difference.high


def test_the_curve_over_sizes_stops_where_the_pool_does_and_says_so(benched: Any) -> None:
    result: CompareResult = benched[0]
    assert [row.size for row in result.sizes] == [1, 2]
    assert any("the pool holds" in warning for warning in result.warnings)
    # This model cannot say what is harmful, though it was asked.
    assert (
        [w for w in result.warnings if "AUROC" in w or "yes and no" in w]
        == [w for w in result.warnings if "no better than chance (AUROC 0.50)" in w]
        != []
    )


def test_what_was_done_is_not_done_again(benched: Any, files: Any) -> None:
    result, out = benched
    again = files.study(
        out, "benchmark", **SMALL, text=str(out.parent / "text.txt"), over_refusal=str(out.parent / "looks.jsonl")
    )
    assert lasting(again) == lasting(result)
    assert {name for name, (made, _) in again.counters.items() if made} <= {"verdicts"}
    assert lasting(CompareResult.model_validate_json((out / "benchmark.json").read_bytes())) == lasting(again)


def test_what_the_result_holds_is_on_its_page(benched: Any) -> None:
    # Left out of the page: details for code that reads results, and what is in a cell with its neighbour.
    assert unshown(benched[0]) == {
        "CompareResult.peak_memory",
        "Comparison.ce",
        "Comparison.other_ce",
        "Comparison.p",
        "Comparison.setting",
        "DirectionInfo.norm",
        "EffectRow.outcomes",
        "EffectRow.repaired",
        "FeatureSet.method",
        "FeatureSet.scope",
        "FeatureSet.scores",
        "RefusalToken.token_id",
        "Sample.kind",
        "Sample.prompt",
        "SizeRow.setting",
    }


@pytest.mark.parametrize(
    ("kind", "strength", "held", "said"),
    [
        ("suppress", -3.0, None, "c = \N{MINUS SIGN}3"),
        ("suppress", 0.5, None, "c = 0.5"),
        ("induce", 0.5, None, "0.5 × max"),
        ("induce", 12.0, (12.0,), "v = 12"),
    ],
)
def test_a_strength_has_its_unit(kind: Any, strength: float, held: Any, said: str) -> None:
    config = CompareConfig.model_construct(induce=held)
    assert get_method("cossim+ap").strength_text(config, kind, strength) == said


def test_tasks_are_held_against_the_clean_model_s(benched: Any) -> None:
    def scored(method: str, value: float) -> MethodExtras:
        row = CapabilityRow(
            task="arc", metric="acc", value=value, stderr=None, n=4, shots=0, higher_is_better=True, version="1",
            harness="0.4", digest="same", intervention=method, scores=(1.0, 1.0, 1.0, 4 * value - 3),
        )  # fmt: skip
        return MethodExtras(method=method, setting="", capability=(row,))

    result = benched[0].model_copy(update={"extras": (scored("none", 1.0), scored("cossim+ap", 0.75))})
    tables = [table for table in blocks(result, Table, "Side effects") if table.title == "Capability"]
    clean, changed = tables[0].rows
    assert clean[3:5] == ("1.000", "–")
    assert changed[3] == "0.750"
    assert changed[4].startswith("−0.250")
