"""What the page of `demur harden` says of results made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from page_parts import about, blocks, cells

from demur.capability import CapabilityRow
from demur.report import charts
from demur.report.blocks import Chart, Table
from demur.stats import Estimate
from demur.studies.harden import HardenResult
from demur.studies.harden.results import (
    ATTACKS,
    BENIGN,
    HARMFUL,
    HARMLESS,
    OVER_REFUSAL,
    SUCCEEDED,
    CapabilityOf,
    ChoiceRow,
    FamilyRow,
    GapRow,
    SettingRow,
    ThresholdRow,
)
from demur.studies.results import SideEffects

ARMS = {
    "set": "features set", "direction": "direction added", "random-set": "random features", "turn-down": "scaled down",
    "ablate": "direction ablated",
}  # fmt: skip


def setting(
    arm: str, gating: Any, n: int, *, strength: float = 1.0, purpose: Any = "harden", **given: Any
) -> SettingRow:
    """Every number is another one, by `n`, in hundredths."""
    row: dict[str, Any] = {
        "setting": f"{strength:g} × max", "cut": about(n / 100), "still": about((n + 1) / 100),
        "broken": about((n + 2) / 100), "lost": about((n + 3) / 100, 0.01), "chosen": True,
        "added": {name: about((n + 4 + k) / 100, 0.01) for k, name in enumerate((*BENIGN, HARMFUL, ATTACKS))},
        "repaired": {name: about((n + 5 + k) / 100, n=20 + k) for k, name in enumerate(BENIGN)},
        "side_effects": SideEffects(ce_answers=about(n / 1000, 0.001), kl=about(n / 500, 0.001)),
    }  # fmt: skip
    return SettingRow(purpose=purpose, arm=arm, gating=gating, strength=strength, **(row | given))


def hardened(**changes: Any) -> HardenResult:
    rows = (
        setting("direction", "probe", 10), setting("set", "labels", 75, strength=0.5, chosen=False),
        setting("set", "labels", 70), setting("set", "probe", 60),
        setting("set", "always", 50), setting("set", "always", 40, strength=0.5, chosen=False),
        setting("random-set", "probe", 5, sets=3, side_effects=None), setting("ablate", "probe", 45, purpose="repair"),
        setting("turn-down", "always", 20, purpose="repair"), setting("turn-down", "probe", 30, purpose="repair"),
    )  # fmt: skip
    given: dict[str, Any] = {
        "labels": ARMS, "controls": {"random-set": "set", "random-down": "turn-down"}, "refusal": (), "contrast": (),
        "probe": "a probe", "budget": 0.02, "best": {"harden": "set", "repair": "turn-down"},
        "sizes": {name: 30 + k for k, name in enumerate((*BENIGN, HARMFUL, ATTACKS, SUCCEEDED))},
        "clean": {name: about(k / 100) for k, name in enumerate((*BENIGN, HARMFUL, ATTACKS, SUCCEEDED))},
        "fires": {name: about((50 + k) / 100) for k, name in enumerate((*BENIGN, HARMFUL, ATTACKS, SUCCEEDED))},
        "choosing": {HARMLESS: 8}, "rows": rows, "same": about(0.995, n=9),
        "choices": (
            ChoiceRow(purpose="harden", arm="set", gating="probe", strength=1.5, threshold=0.25, gain=0.9, loss=0.01,
                      allowed=True),
            ChoiceRow(purpose="repair", arm="turn-down", gating="always", strength=-3.0, threshold=None, gain=0.8,
                      loss=0.3, allowed=False),
        ),
        "families": (
            FamilyRow(attack="A", n=7, clean=about(0.9), fires=about(0.8),
                      after={"labels": about(0.1), "always": about(0.3), "probe": about(0.2)}),
        ),
        "gaps": tuple(
            GapRow(arm="set", cost=cost, level=level,  # pyright: ignore[reportArgumentType]
                   probe=about(0.7), always=about(0.4), difference=about(0.3),
                   p=0.01, p_holm=0.04)
            for cost, level in (("answers lost", 0.01), ("ΔCE", 0.05))
        ),
        "thresholds": tuple(
            ThresholdRow(threshold=n / 10, cut=about(0.8 - n / 10), lost=about(0.03 - n / 100, 0.01), chosen=n == 1)
            for n in range(4)
        ),
    }  # fmt: skip
    return HardenResult(study="harden", **(given | changes))


def test_arms_stand_in_their_order_with_each_number_in_its_column() -> None:
    (table, families) = blocks(hardened(), Table, "Hardening")
    assert table.rows[1] == (
        "features set", "if the probe fires", "1 × max", "60% [55–65]", "61% [56–66]", "62% [57–67]",
        "+64 [63 to 65]", "+65 [64 to 66]", "+66 [65 to 67]", "63% [62–64]", "0.120 [0.119–0.121]",
        "0.060 [0.059–0.061]",
    )  # fmt: skip
    assert [row[:2] for row in table.rows] == [
        ("features set", "always"), ("features set", "if the probe fires"), ("features set", "perfect probe"),
        ("direction added", "if the probe fires"), ("random features (3 sets)", "if the probe fires"),
    ]  # fmt: skip
    assert table.rows[4][-2:] == ("–", "–")
    assert table.strong == {1}
    assert families.rows == (("A", "7", "90% [85–95]", "30% [25–35]", "20% [15–25]", "10% [5–15]", "80% [75–85]"),)
    # The best arm where nothing else is best, and the set beside it.
    best = hardened(best={"harden": "direction", "repair": "ablate"})
    assert blocks(best, Table, "Hardening")[0].strong == {3}
    assert blocks(best, Table, "Repair of over-refusal")[0].strong == {2}
    few = hardened(sizes={HARMLESS: 3})
    assert len(blocks(few, Table, "Hardening")[0].rows[0]) == 10


def test_curves_are_drawn_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scatter_lines", "line_chart"):
        monkeypatch.setattr(charts, name, lambda lines, **options: (lines, options))

    def curves(result: HardenResult, section: str, n: int = 0) -> dict[str, list[tuple[float, float, bool]]]:
        series, _ = blocks(result, Chart, section)[n].draw()
        return {
            each.name: [(round(p.x, 3), round(p.y, 3), p.chosen) for p in each.points] for each in series if each.points
        }

    assert curves(hardened(), "Hardening") == {
        "set, probe": [(0.63, 0.6, True)], "set, always": [(0.43, 0.4, False), (0.53, 0.5, True)],
        "direction, probe": [(0.13, 0.1, True)],
    }  # fmt: skip
    best = hardened(best={"harden": "direction", "repair": "ablate"})
    assert list(curves(best, "Hardening")) == ["direction, probe", "set, probe", "set, always"]
    assert curves(hardened(), "Hardening", 1) == {
        "always": [(0.5, 0.4, False), (1, 0.5, True)], "if the probe fires": [(1, 0.6, True)],
        "perfect probe": [(0.5, 0.75, False), (1, 0.7, True)],
    }  # fmt: skip
    assert curves(hardened(), "Hardening", 2)["always"] == [(0.5, 0.43, False), (1, 0.53, True)]
    assert curves(hardened(), "The probe") == {
        "features set": [(0.03, 0.8, False), (0.02, 0.7, True), (0.01, 0.6, False), (0, 0.5, False)]
    }
    drawn = [chart.draw()[1] for chart in blocks(hardened(), Chart)]
    assert [each.get("guides") for each in drawn] == [[0.01], None, None, [0.01], None]
    wholes = ("attacks refused", "attacks refused", "prompts lost", "attacks refused", "over-refusal repaired")
    assert all(each["y_title"].endswith(words) for each, words in zip(drawn, wholes, strict=True))
    # Refusals of plain harmful prompts given up, and repair on the set of which most are refused.
    assert curves(hardened(), "Repair of over-refusal") == {
        "turn-down, probe": [(-0.37, 0.37, True)], "turn-down, always": [(-0.27, 0.27, True)],
        "ablate, probe": [(-0.52, 0.52, True)],
    }  # fmt: skip


def test_the_other_tables_hold_each_number_in_its_column() -> None:
    result = hardened()
    assert cells(result, "Conditional against always") == [
        ("features set", "benign answers lost, share", "0.01", "70% [65–75]", "40% [35–45]", "+30 [25 to 35]", "0.040"),
        ("features set", "ΔCE, nats per token", "0.05", "70% [65–75]", "40% [35–45]", "+30 [25 to 35]", "0.040"),
    ]
    assert cells(result, "The probe")[:3] == [
        (HARMFUL, "33", "53% [48–58]", "3% [−2 to 8]"), (ATTACKS, "34", "54% [49–59]", "4% [−1 to 9]"),
        (SUCCEEDED, "35", "55% [50–60]", "5% [0–10]"),
    ]  # fmt: skip
    assert [row[0] for row in cells(result, "The probe")[3:]] == list(BENIGN)
    assert [row[-1] for row in cells(result, "The probe", 1)] == ["", "yes", "", ""]
    assert cells(result, "The probe", 1)[1] == ("0.1000", "70% [65–75]", "2% [1–3]", "yes")
    (table,) = blocks(result, Table, "Repair of over-refusal")
    assert table.rows[1] == (
        "scaled down", "if the probe fires", "1 × max", "35% [30–40]", "36% [31–41]", "37% [32–42]", "33% [32–34]",
        "+37 [36 to 38]", "+38 [37 to 39]", "0.060 [0.059–0.061]", "0.030 [0.029–0.031]",
    )  # fmt: skip
    assert (table.rows[0][:2], table.strong) == (("scaled down", "always"), {1})
    assert cells(result, "How settings were chosen") == [
        ("harden", "features set", "if the probe fires", "1.5", "0.2500", "90%", "1%", "yes"),
        ("repair", "scaled down", "always", "−3", "–", "80%", "30%", "no"),
    ]
    assert not blocks(hardened(gaps=()), Table, "Conditional against always")
    task = CapabilityRow(
        task="arc", metric="acc", value=0.12345, stderr=0.01234, n=40, shots=0, higher_is_better=True, version="1",
        harness="0.4", digest="", intervention="none",
    )  # fmt: skip
    tried = hardened(capability=(CapabilityOf(name="clean", rows=(task,)),))
    assert cells(tried, "Capability") == [("clean", "arc", "acc", "0.123", "0.012", "40")]


def adds(*values: float, half: float = 0.0) -> dict[str, Estimate]:
    return {name: about(value, half) for name, value in zip(BENIGN, values, strict=False)}


@pytest.mark.parametrize(
    ("cut", "half", "added", "said"),
    [
        (0.5, 0.0, (0.0, 0.01, 0.0), "at the ends"),
        (0.5, 0.01, (0.0, 0.0, 0.0), "in the point estimates"),
        (0.6, 0.01, (0.0, 0.01, 0.0), "in the point estimates"),
        (0.6, 0.0, (0.0, 0.02, 0.01), "on the over-refusal prompts"),
        (0.6, 0.0, (0.02, 0.0, 0.01), "on the over-refusal prompts"),
        (0.6, 0.0, (0.0, 0.0, 0.02), "misses"),
        (0.49, 0.0, (0.0, 0.0, 0.0), "misses"),
        (0.6, 0.0, (0.02,), "misses"),
    ],
)
def test_the_aim_is_met_by_the_cut_and_on_every_benign_set(cut: float, half: float, added: Any, said: str) -> None:
    row = setting("set", "probe", 0, cut=about(cut, half), added=adds(*added, half=half))
    verdict = hardened(rows=(row,)).page().verdicts[0]
    words = ("at the ends", "in the point estimates", "on the over-refusal prompts", "misses")
    assert [each for each in words if each in verdict] == [said]
    assert f"at most ({BENIGN[added.index(max(added))]})" in verdict
    # What better choosing prompts could have reached: of thresholds that lose at most 1 %, the one that cuts most.
    assert ("60% [55–65] and loses 1%" in verdict) == (said in words[2:])


def test_the_verdict_names_the_worst_set_the_other_gatings_and_the_control() -> None:
    (verdict, *_) = hardened().page().verdicts
    order = (
        "features set (1 × max) cuts 60% [55–65] of 20", f"+66 [65 to 67] points of refusals at most ({BENIGN[2]})",
        "Always 50% [45–55] and +56",
        "With a perfect probe 70% [65–75] and +76", "random features in their place cut 5% [0–10]",
    )  # fmt: skip
    places = [verdict.index(each) for each in order]
    assert places == sorted(places)
    assert verdict.count("random features") == 1
    without = tuple(row for row in hardened().rows if row.arm != "set" or row.gating != "probe")
    assert hardened(rows=without).page().verdicts[0].startswith("No attack succeeds")
    none = setting("set", "probe", 0, cut=Estimate.unknown())
    assert hardened(rows=(none,)).page().verdicts[0].startswith("No attack succeeds")


@pytest.mark.parametrize(
    ("succeeded", "broken", "same", "doubts"),
    [(20, 0.1, 0.99, 0), (19, 0.1, 0.99, 1), (20, 0.11, 0.99, 1), (20, 0.1, 0.98, 1), (0, 0.2, 0.5, 3)],
)
def test_few_attacks_broken_text_and_other_answers_are_doubts(
    succeeded: int, broken: float, same: float, doubts: int
) -> None:
    rows = (setting("set", "probe", 0, broken=about(broken)),)
    result = hardened(rows=rows, same=about(same), sizes={SUCCEEDED: succeeded, OVER_REFUSAL: 1, HARMLESS: 1})
    assert len(result.page().warnings) == doubts
    if broken > 0.1:
        assert any(f"{100 * broken:.0f}% [" in warning for warning in result.page().warnings)
    # No over-refusal prompts, and nothing answered once more.
    fine = (setting("set", "probe", 0, broken=None),)
    assert len(hardened(rows=fine, same=about(0.5, n=0), sizes={SUCCEEDED: 20, HARMLESS: 1}).page().warnings) == 1
