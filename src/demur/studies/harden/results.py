"""What the study `harden` gives: values that are written to `harden.json`, shown, and read back."""

from __future__ import annotations

from typing import Final, Literal

from demur.capability import CapabilityRow
from demur.stats import Estimate
from demur.studies.base import StudyResult
from demur.studies.results import SideEffects
from demur.types import FeatureField, Value

Purpose = Literal["harden", "repair"]
Gating = Literal["always", "probe", "labels"]
"""On which prompts a change acts: on all, where the probe says so, or where the labels say so (a perfect probe)."""
GATINGS: Final[dict[Gating, str]] = {"always": "always", "probe": "if the probe fires", "labels": "perfect probe"}
SUCCEEDED, ATTACKS, HARMFUL = "succeeded attacks", "all attacks", "harmful, put plainly"
BENIGN: Final = ("harmless", "harmless in the attacks' words", "over-refusal")
HARMLESS, WRAPPED, OVER_REFUSAL = BENIGN


class SettingRow(Value):
    """One arm at one strength, under one gating, on test prompts.

    Hardening is measured on the attacks that succeed on the clean model: `cut` of them are now refused, `still`
    succeed, and `broken` do neither (incoherent answers are not refusals). `added` is, for each set of prompts, the
    share of refusals above that of the clean model, `lost` the share of the benign prompts answered by the clean model
    that are no longer answered, over all their sets. `repaired` is, for each benign set, the share of the prompts
    refused by the clean model that are now answered. What was not measured at a setting is missing.
    """

    purpose: Purpose
    arm: str
    gating: Gating
    strength: float
    setting: str
    """The strength with its unit."""
    threshold: float | None = None
    """P(harmful) from which on (hardening), or below which (repair), the change acts."""
    sets: int = 1
    """Random sets behind the rates, of a control."""
    cut: Estimate | None = None
    still: Estimate | None = None
    broken: Estimate | None = None
    added: dict[str, Estimate]
    lost: Estimate
    repaired: dict[str, Estimate]
    side_effects: SideEffects | None = None
    chosen: bool = False
    """The strength (and the threshold) that the choosing prompts chose."""


class FamilyRow(Value):
    """One attack on the clean model, and under the chosen setting of the best arm by gating."""

    attack: str
    n: int
    clean: Estimate
    after: dict[Gating, Estimate]
    fires: Estimate
    """Share of its prompts on which the probe fires."""


class GapRow(Value):
    """An arm where the probe fires against the same arm always, both curves read at one cost: share of succeeded
    attacks cut, mean over requests."""

    arm: str
    cost: Literal["answers lost", "ΔCE"]
    """Share of answered benign prompts that are no longer answered, or ΔCE on own answers, nats per token."""
    level: float
    probe: Estimate
    always: Estimate
    difference: Estimate
    p: float
    p_holm: float = float("nan")


class ThresholdRow(Value):
    """The best arm at its chosen strength as its threshold moves."""

    threshold: float
    cut: Estimate
    lost: Estimate
    chosen: bool


class ChoiceRow(Value):
    """What the choosing prompts said of the setting that they chose: `gain` is the share of succeeded attacks cut
    (hardening) or of refused benign prompts answered (repair), `loss` that of benign prompts no longer answered, or of
    refused harmful ones no longer refused, each on the worst of its sets. `allowed`: the loss is within the budget."""

    purpose: Purpose
    arm: str
    gating: Gating
    strength: float
    threshold: float | None
    gain: float
    loss: float
    allowed: bool


class CapabilityOf(Value):
    """Tasks under one change; "clean" is the model itself."""

    name: str
    rows: tuple[CapabilityRow, ...]


class HardenResult(StudyResult):
    """What holding the model to refusal cuts and costs, always and where a probe fires; and what repairs
    over-refusal."""

    labels: dict[str, str]
    """Arm → its name for people, in the order in which they are shown."""
    controls: dict[str, str]
    """Random control → the arm whose strength it takes."""
    refusal: tuple[FeatureField, ...]
    contrast: tuple[FeatureField, ...]
    """Features by contrast: those that choosing attacks suppress most."""
    probe: str
    """What reads harm, for people."""
    budget: float
    best: dict[Purpose, str]
    """The arm that did best where the probe fires, on the choosing prompts."""
    sizes: dict[str, int]
    """Prompts of each test set."""
    clean: dict[str, Estimate]
    """Refusals of the clean model on each test set."""
    fires: dict[str, Estimate]
    """Share of each test set on which the probe fires, at the threshold of the best arm that hardens."""
    choosing: dict[str, int]
    """Prompts of each choosing set."""
    choices: tuple[ChoiceRow, ...]
    rows: tuple[SettingRow, ...]
    families: tuple[FamilyRow, ...] = ()
    gaps: tuple[GapRow, ...] = ()
    thresholds: tuple[ThresholdRow, ...] = ()
    same: Estimate = Estimate.unknown()
    """Of the test prompts answered once more under the conditional change itself: the share whose answer is that of the
    arms it is made of, which the rates are taken from."""
    capability: tuple[CapabilityOf, ...] = ()

    def row(self, arm: str, gating: Gating) -> SettingRow | None:
        """An arm at its chosen setting."""
        return next((r for r in self.rows if r.arm == arm and r.gating == gating and r.chosen), None)

    def curve(self, arm: str, gating: Gating) -> tuple[SettingRow, ...]:
        """An arm over its strengths."""
        return tuple(r for r in self.rows if r.arm == arm and r.gating == gating)
