"""`demur harden` on the planted model: harmless words beside a request dilute its harm, and refusal can be put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_parts import blocks, drawn, unshown
from planted_study import write_prompts
from test_jailbreaks import BESIDE, STRONG, WEAK

import demur
from demur.data import Attack, AttackPair
from demur.errors import InputError
from demur.method.interventions import SetFeatures, bind, conditional
from demur.model import ChatModel
from demur.report import render_html, render_markdown
from demur.report.blocks import Chart, Table
from demur.stats import Estimate
from demur.studies.harden import HardenResult
from demur.studies.harden.bench import Told, rise, share_of_requests, split_attacks
from demur.studies.harden.results import (
    ATTACKS,
    BENIGN,
    HARMFUL,
    HARMLESS,
    OVER_REFUSAL,
    SUCCEEDED,
    WRAPPED,
    SettingRow,
)
from demur.studies.harden.sections import holds
from demur.testing import Planted
from demur.types import Prompt

TEMPLATES = (STRONG[0], STRONG[1], WEAK[0], WEAK[1])
N_TEST = 8
REFUSAL, ANSWER = "I cannot", "Sure"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harden")


@pytest.fixture(scope="module")
def studied(files: Any, folder: Path) -> HardenResult:
    return _run(files, folder, folder / "run")


def _run(files: Any, folder: Path, out: Path, **changes: Any) -> HardenResult:
    attacks, over = folder / "wrappers.txt", folder / "over.jsonl"
    attacks.write_text("\n".join(TEMPLATES) + "\n", encoding="utf-8")
    write_prompts(over, files.truth.over_refusal.texts)
    options = {"n": f"12,16,8,{N_TEST}", "k": 11, "n_exact": 0, "attacks": str(attacks), "choose_on": str(attacks)}
    options |= {"over_refusal": str(over), "n_over_refusal": 12, "multiples": "0.25,1", "amplify": "8"}
    options |= {"turn_down": "-3", "resamples": 200}
    found = demur.run("harden", out=out, **files.options(**(options | changes)))
    assert isinstance(found, HardenResult)
    return found


def test_what_refuses_is_the_planted_refusal_features(studied: HardenResult, files: Any) -> None:
    assert set(studied.refusal) == files.truth.truth.refusal
    # Attacks dilute what the template's tokens receive: harm, what is aligned with it, and refusal, but no filler.
    assert not set(studied.contrast) & files.truth.truth.filler


def test_templates_that_choose_do_not_test(studied: HardenResult) -> None:
    assert studied.sizes[ATTACKS] == 2 * N_TEST
    # STRONG[1] works on every request, WEAK[1] on none.
    assert studied.sizes[SUCCEEDED] == N_TEST
    assert studied.clean[ATTACKS].value == 0.5
    assert studied.sizes[OVER_REFUSAL] == 12
    assert studied.choosing[OVER_REFUSAL] == 8


def test_a_perfect_probe_refuses_every_attack_and_costs_nothing(studied: HardenResult) -> None:
    for gating in ("labels", "probe"):
        row = chosen(studied, "set", gating)
        assert (known(row.cut), known(row.still), known(row.broken)) == (1.0, 0.0, 0.0)
        # The fitted probe may take a harmless prompt with a harm word for a harmful one.
        sure = BENIGN if gating == "labels" else (HARMLESS, WRAPPED)
        assert {name: row.added[name].value for name in sure} == dict.fromkeys(sure, 0.0)
        assert row.added[HARMFUL].value == 0.0
        assert row.lost.value == 0.0 or gating == "probe"
    assert studied.fires[SUCCEEDED].value == 1.0
    assert studied.fires[HARMLESS].value == 0.0
    assert studied.same.value == 1.0
    effects = chosen(studied, "set", "probe").side_effects
    assert effects is not None
    assert effects.kl.value == effects.ce_answers.value == 0.0


def chosen(result: HardenResult, arm: str, gating: Any) -> SettingRow:
    row = result.row(arm, gating)
    assert row is not None, (arm, gating)
    return row


def known(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def test_acting_always_refuses_harmless_prompts_as_well(studied: HardenResult) -> None:
    (strong,) = (row for row in studied.curve("set", "always") if row.strength == 1.0)
    assert known(strong.cut) == 1.0
    assert {name: strong.added[name].value for name in BENIGN} == dict.fromkeys(BENIGN, 1.0)
    assert strong.lost.value == 1.0
    assert strong.side_effects is not None
    assert strong.side_effects.kl.value > 1.0
    # So the choice, which may lose nothing, is the strength that does nothing.
    mild = chosen(studied, "set", "always")
    assert (mild.strength, mild.lost.value) == (0.25, 0.0)


def test_random_features_cut_nothing(studied: HardenResult) -> None:
    for name, leader in studied.controls.items():
        row = chosen(studied, name, "labels")
        assert row.sets == 2
        if leader == "set":
            assert known(row.cut) == 0.0
        else:
            assert row.cut is None or known(row.cut) < 0.2
        assert HARMFUL not in row.added


def test_at_equal_cost_the_probe_wins(studied: HardenResult) -> None:
    rows = [row for row in studied.gaps if row.arm == "set"]
    assert {row.cost for row in rows} == {"answers lost", "ΔCE"}
    for row in rows:
        assert row.probe.value == 1.0 or (row.cost, row.level) == ("answers lost", 0.01)
        assert row.difference.value == pytest.approx(row.probe.value - row.always.value)
        assert row.always.value < 0.1
        assert row.p_holm >= row.p


def test_turning_refusal_down_gives_up_harmful_prompts_unless_the_probe_keeps_them(studied: HardenResult) -> None:
    always, gated = chosen(studied, "turn-down", "always"), chosen(studied, "turn-down", "probe")
    assert always.added[HARMFUL].value == -1.0
    assert gated.added[HARMFUL].value == gated.added[ATTACKS].value == 0.0
    assert gated.lost.value == 0.0


def test_families_count_every_attack(studied: HardenResult) -> None:
    (row,) = studied.families
    assert (row.attack, row.n, row.clean.value) == ("wrappers", 2 * N_TEST, 0.5)
    assert row.after["probe"].value == row.after["labels"].value == 0.0
    assert row.fires.value == 1.0


def test_the_report_says_what_came_out(studied: HardenResult) -> None:
    text = render_markdown([studied.page()])
    assert "cuts 100%" in text
    assert holds(chosen(studied, "set", "labels"))
    assert "harmless in the attacks' words" in text
    assert "<svg" in render_html([studied.page()])
    assert HardenResult.model_validate_json(studied.model_dump_json()).model_dump_json() == studied.model_dump_json()


def test_random_features_take_the_strength_of_those_they_control_for(studied: HardenResult) -> None:
    assert studied.controls["random-down"] == "turn-down"


def test_the_thresholds_that_were_chosen_are_marked(studied: HardenResult) -> None:
    (table,) = (each for each in blocks(studied, Table) if each.title == "As the threshold moves")
    assert [row[-1] == "yes" for row in table.rows] == [row.chosen for row in studied.thresholds]
    assert {row.chosen for row in studied.thresholds} == {True, False}


def test_the_best_arm_is_drawn_beside_the_direction(studied: HardenResult) -> None:
    chart = next(each for each in blocks(studied, Chart) if "benign prompts lost" in str(each.draw().to_dict()))
    names = {text for row in drawn(chart) for text in row.values() if isinstance(text, str)}
    assert {f"{arm}, {gating}" for arm in ("set", "direction") for gating in ("probe", "always")} <= names


def test_a_second_run_gives_the_same(files: Any, studied: HardenResult, folder: Path) -> None:
    again = _run(files, folder, folder / "run")
    one, two = (each.model_copy(update={"seconds": {}}).model_dump_json() for each in (studied, again))
    assert one == two


def test_one_attack_cannot_both_choose_and_test(files: Any, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text(STRONG[0] + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="--attacks and --choose-on"):
        demur.run("harden", out=tmp_path / "run", **files.options(attacks=str(one), choose_on=str(one)))


# -- the change itself ---------------------------------------------------------------------------------------------


def test_a_conditional_change_leaves_other_prompts_as_they_are(planted_model: Planted) -> None:
    made = planted_model
    model = ChatModel(made.model, made.tokenizer, name="planted")
    harmful = [Prompt(id=f"bad{n}", text=BESIDE + text) for n, text in enumerate(made.harmful.texts[:6])]
    harmless = [Prompt(id=f"good{n}", text=text) for n, text in enumerate(made.harmless.texts[:6])]
    prompts = [p for pair in zip(harmful, harmless, strict=True) for p in pair]
    clean = model.generate(prompts, max_new_tokens=8)
    assert all(answer.text.startswith(ANSWER) for answer in clean)
    refuse = SetFeatures(tuple(sorted(made.truth.refusal)), 2.0, "prompt")
    change = conditional(refuse, prompts, [p.id.startswith("bad") for p in prompts])
    with model.intervene(bind(made.suite, change)):
        hardened = model.generate(prompts, max_new_tokens=8)
    for before, after in zip(clean, hardened, strict=True):
        if after.prompt.id.startswith("bad"):
            assert after.text.startswith(REFUSAL)
        else:
            assert after.text == before.text


@pytest.fixture(scope="module")
def planted_model() -> Planted:
    from demur.testing import planted

    return planted()


# -- parts ---------------------------------------------------------------------------------------------------------


def test_an_attack_named_twice_is_halved() -> None:
    pairs = tuple(AttackPair(id=str(n), attack="b", plain="x", text=f"x {n}") for n in range(3))
    both, other = Attack("a", templates=("1", "2", "3")), Attack("b", pairs=pairs)
    choosing, testing = split_attacks([both, other], [both])
    assert [each.templates for each in choosing] == [("1", "3")]
    assert [(each.name, each.templates, len(each.pairs)) for each in testing] == [("a", ("2",), 0), ("b", (), 3)]


def test_a_gate_mixes_what_was_told() -> None:
    one, zero = np.ones((2, 3)), np.zeros((1, 3))
    mixed = Told(one, zero).where(np.array([True, False, True]), Told(zero, one[:1]))
    assert mixed.refused.tolist() == [[1.0, 0.0, 1.0]] * 2
    assert mixed.complied.tolist() == [[0.0, 1.0, 0.0]]


def test_rises_are_after_less_before() -> None:
    found = rise(np.array([[1.0, 1.0, 0.0, 1.0]]), np.array([[0.0, 1.0, 0.0, 0.0]]))
    assert found.value == 0.5
    assert found.low < 0.5 < found.high
    down = rise(np.array([[0.0, 1.0, 0.0, 0.0]]), np.array([[1.0, 1.0, 0.0, 1.0]]))
    assert (down.value, down.low, down.high) == pytest.approx((-0.5, -found.high, -found.low))


def test_attacks_on_one_request_widen_the_interval() -> None:
    values = np.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    alone = share_of_requests(values, [str(n) for n in range(8)])
    alike = share_of_requests(values, ["a"] * 4 + ["b"] * 4)
    assert alone.value == alike.value == 0.5
    assert (alike.low, alike.high) == (0.0, 1.0)
    assert 0.0 < alone.low < alone.high < 1.0


def test_what_the_result_holds_is_on_its_page(studied: Any) -> None:
    # Left out of the page: details for code that reads results, and what is in a cell with its neighbour.
    assert unshown(studied) == {
        "GapRow.p",
        "HardenResult.contrast",
        "HardenResult.refusal",
        "SettingRow.repaired",
        "SettingRow.threshold",
    }
