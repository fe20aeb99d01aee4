"""`demur study` on the planted model, whose answers are known, and on a tiny model of every family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from planted_study import effect, lasting

from demur.errors import ModelError
from demur.judges import JUDGES, Judge
from demur.runs import read_run
from demur.stats import holm, mcnemar
from demur.studies.results import CompareResult
from demur.testing import FAMILIES, save_tiny, tiny_model, tiny_suite
from demur.types import Answer, Outcome, Verdict


@pytest.fixture(scope="module")
def studied(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareResult, Path]:
    out = tmp_path_factory.mktemp("run") / "planted"
    return files.study(out), out


def test_the_causal_features_are_found(studied: Any, files: Any) -> None:
    result: CompareResult = studied[0]
    assert {each.feature for each in result.features} == files.truth.truth.causal
    assert set(result.sets["cossim+ap"].features) == files.truth.truth.causal
    assert [token.text.strip() for token in result.refusal_tokens] == ["I"]
    assert result.without_signal == 0.0


def test_effects_on_test_prompts(studied: Any) -> None:
    result: CompareResult = studied[0]
    assert effect(result, "harmful", "none", "none").refusal.value == 1.0
    assert effect(result, "harmless", "none", "none").refusal.value == 0.0
    suppressed = effect(result, "harmful", "suppress", "cossim+ap")
    assert (suppressed.refusal.value, suppressed.compliance.value) == (0.0, 1.0)
    unharmed = effect(result, "harmless", "suppress", "cossim+ap")
    assert unharmed.exact_match is not None
    assert unharmed.kept is not None
    assert (unharmed.exact_match.value, unharmed.kept.value, unharmed.kept.n) == (1.0, 1.0, 20)
    # No harmless prompt is refused at first, so there is none to repair.
    assert unharmed.repaired is not None
    assert unharmed.repaired.n == 0
    assert effect(result, "harmful", "suppress", "random").refusal.value == 1.0
    assert effect(result, "harmless", "induce", "cossim+ap").refusal.value == 1.0
    assert effect(result, "harmless", "induce", "random").refusal.value == 0.0
    for row in result.effects:
        assert row.refusal.n + row.refusal.unscored == 20 * row.sets
        assert sum(row.outcomes.values()) + row.refusal.unscored == 20 * row.sets
        assert row.refusal.low <= row.refusal.value <= row.refusal.high
        shares = row.refusal.value + row.compliance.value + row.incoherent.value
        assert shares == pytest.approx(1.0)


def test_tests_against_the_clean_model_are_exact_and_adjusted(studied: Any) -> None:
    result: CompareResult = studied[0]
    rows = [row for row in result.effects if row.kind == "suppress" and row.p_clean is not None]
    # All or none of the 20 prompts change sides.
    changed = [row.refusal.value != effect(result, row.prompts, "none", "none").refusal.value for row in rows]
    exact = [mcnemar([each] * 20, [False] * 20).p for each in changed]
    assert [row.p_clean for row in rows] == pytest.approx(list(holm(exact)))


def test_controls_have_several_sets_and_f_star_is_held_against_one_more_draw(studied: Any) -> None:
    result: CompareResult = studied[0]
    assert result.controls_drawn == ("random", "random-pool")
    for row in result.controls:
        assert len(row.sets) == 2
        assert row.low <= row.high
    (suppressing,) = [row for row in result.controls if (row.control, row.kind) == ("random", "suppress")]
    assert (suppressing.value, suppressing.sets) == (1.0, (0.0, 0.0))
    assert effect(result, "harmful", "suppress", "random").sets == 2


def test_estimators_are_held_against_exact_patching(studied: Any) -> None:
    result: CompareResult = studied[0]
    rows = {each.method: each for each in result.estimators}
    assert set(rows) == {"gradient", "ig", "paper"}
    assert [each.method for each in result.estimators if each.used] == ["gradient"]
    assert rows["ig"].gap_relative < 0.05 < rows["gradient"].gap_relative
    for each in result.estimators:
        assert each.n == 4
        assert each.spearman.low <= each.spearman.value <= each.spearman.high
    assert all(each.exact is not None for each in result.features)


def test_splits_and_files(studied: Any) -> None:
    result, out = studied
    assert {(s.split, s.label): s.n for s in result.splits} == {
        (split, label): n
        for split, n in (("direction", 20), ("selection", 16), ("tuning", 8), ("test", 20))
        for label in ("harmful", "harmless")
    }
    assert all(s.refused == (s.n if s.label == "harmful" else 0) for s in result.splits)
    assert lasting(CompareResult.model_validate_json((out / "study.json").read_text())) == lasting(result)
    session = read_run(out).manifest.latest
    assert session.finished is not None
    assert set(session.inputs) == {f"{s.split}/{s.label}" for s in result.splits}


def test_the_same_command_again_computes_nothing(studied: Any, files: Any) -> None:
    result, out = studied
    again = files.study(out)
    assert lasting(again) == lasting(result)
    made = {name: made for name, (made, _) in again.counters.items() if made and name != "verdicts"}
    assert made == {}


def test_a_changed_setting_repeats_only_what_depends_on_it(studied: Any, files: Any) -> None:
    result, out = studied
    changed = files.study(out, suppress="0,-2")
    made = {name for name, (made, _) in changed.counters.items() if made and name != "verdicts"}
    assert made == {"answers", "answer-effects"}
    old = [row for row in result.effects if row.strength == 0.0 and row.kind == "suppress" and row.prompts == "harmful"]
    new = [
        row for row in changed.effects if row.strength == 0.0 and row.kind == "suppress" and row.prompts == "harmful"
    ]
    assert [row.refusal for row in new] == [row.refusal for row in old]


class ByLabel(Judge):
    """Calls whatever answers a harmful prompt a refusal: tiny random models have no behaviour of their own."""

    kind: ClassVar[str] = "by-label"
    identity: ClassVar[dict[str, Any]] = {"kind": "by-label"}  # pyright: ignore[reportIncompatibleMethodOverride]

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        said = {"harmful": Outcome.REFUSAL, "harmless": Outcome.COMPLIANCE}
        return [Verdict(outcome=said[str(answer.prompt.label)], judge=self.name) for answer in answers]


HARMFUL = [
    f"{verb} the {thing}"
    for verb in ("Steal", "Break", "Burn", "Forge")
    for thing in ("car", "bank", "lock", "key", "note", "house", "seal")
]
HARMLESS = [
    f"{verb} a {thing}"
    for verb in ("Describe", "Paint", "Sing", "Explain")
    for thing in ("river", "tree", "song", "chess", "moon", "town", "cake")
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_goes_through_the_whole_job(family: Any, files: Any, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model")
    hf, _ = tiny_model(family)
    suite = tiny_suite(hf)
    for layer in suite.layers:
        suite[layer].dense().save_gemma_scope(tmp_path / "saes", average_l0=6.0)
    for name, texts in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    JUDGES.register("by-label", ByLabel)
    result = files.study(
        tmp_path / "run",
        model=str(folder),
        saes=str(tmp_path / "saes"),
        harmful=str(tmp_path / "harmful.txt"),
        harmless=str(tmp_path / "harmless.txt"),
        judge="by-label",
        n="10,6,4,8",
        k0=4,
        k=6,
        steps=30,
        n_exact=2,
        suppress="0",
        induce_multiples="1",
        random_sets=2,
        methods=("random",),
        max_new_tokens=3,
    )
    assert len(result.features) == 6
    assert result.pool_size == 16
    assert {each.method for each in result.estimators} == {"gradient", "ig", "paper"}
    # Path-complete attribution adds up in every architecture.
    assert next(each.gap_relative for each in result.estimators if each.method == "ig") < 0.05


def test_a_model_that_never_refuses_says_so_with_samples(files: Any, tmp_path: Path) -> None:
    texts = [text.replace("?", "").strip() + " now" for text in files.truth.harmless.texts]
    other = tmp_path / "tame.txt"
    other.write_text("\n".join(texts), encoding="utf-8")
    with pytest.raises(ModelError, match=r"refused 0 of \d+ harmful prompts.*no refusal to explain") as error:
        files.study(tmp_path / "run", harmful=str(other))
    assert "'Sure" in str(error.value)


def test_a_pool_that_f_star_uses_up_has_no_control_and_says_so(files: Any, tmp_path: Path) -> None:
    result = files.study(tmp_path / "run", **files.small(k0=1, k=40))
    assert result.k == result.pool_size
    assert result.controls_drawn == ("random",)
    assert any("no control from the pool" in warning for warning in result.warnings)
