"""What a comparison of methods gives: values that are written to `NAME.json`, shown, and read back. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from demur.capability import CapabilityRow
from demur.stats import Estimate
from demur.studies.base import StudyResult
from demur.types import Candidate, FeatureField, FeatureSet, Label, Outcome, RefusalToken, Value

Kind = Literal["none", "suppress", "induce"]
Prompts = Literal["harmful", "harmless", "over-refusal"]


class SplitUse(Value):
    """Prompts of one split and class, and how the clean model answered them."""

    split: str
    label: Label
    n: int
    refused: int
    complied: int
    used: int
    """Those on which the clean model behaved as the label says where features are chosen; all of them elsewhere."""


class DirectionInfo(Value):
    """The chosen direction and what it was chosen from (Arditi et al., 2024)."""

    chosen: Candidate
    token: str
    norm: float
    candidates: tuple[Candidate, ...]
    note: str = ""


class Activity(Value):
    """How often and how strongly each feature of a set fires, means over prompts: shares of scored tokens on which it
    is active, and its maximum activation in a harmful prompt, in the SAE's own units."""

    features: tuple[FeatureField, ...]
    rate_harmful: tuple[float, ...]
    rate_harmless: tuple[float, ...]
    max_harmful: tuple[float, ...]


class FeatureRow(Value):
    """One feature of F*, its activity as in `Activity`.

    `score` is its estimated effect on the metric over the selection prompts that chose it, `exact` its exactly patched
    effect over the first harmful test prompts that the clean model refuses; both in logits per scored token, mean over
    prompts.
    """

    feature: FeatureField
    score: float
    cosine: float
    exact: float | None
    rate_harmful: float
    rate_harmless: float
    max_harmful: float


class EstimatorRow(Value):
    """How well an attribution method ranks the pool against exact patching of one feature at a time. All are asked the
    same: one metric, one rule for its target token, the same prompts."""

    method: str
    steps: int
    n: int
    """Prompts: the first harmful test prompts that the clean model refuses."""
    spearman: Estimate
    """Rank correlation over the pool of the means over prompts; the interval resamples prompts."""
    spearman_prompt: float
    """Mean over prompts of the rank correlation within each."""
    gap: float
    """Mean absolute completeness gap, logits."""
    gap_relative: float
    """That gap divided by the mean absolute total effect."""
    used: bool


class SideEffects(Value):
    """Changes from the clean model on the same tokens, for every method alike.

    Own answers are the clean model's to harmless prompts that it did not refuse: where it now answers what it refused,
    that is no side effect. `n` of each estimate counts those prompts (or texts).
    """

    ce_answers: Estimate
    """ΔCE: rise of cross-entropy on own answers, nats per token."""
    ce_text: Estimate | None = None
    """ΔCE on plain text."""
    kl: Estimate
    """KL divergence of the first answer token on those prompts, nats."""


class Knowledge(Value):
    """Does the model still say that a harmful request is harmful? It is asked to answer yes or no; the log-odds of the
    two as first token are read."""

    says_harmful: Estimate
    """Share of harmful test prompts that it calls harmful."""
    says_harmful_of_harmless: Estimate
    auroc: Estimate
    """How well its log-odds tell harmful from harmless prompts (0.5: not at all)."""


class EffectRow(Value):
    """What one method at one strength does to a set of test prompts. Rates are over all prompts and, for a control,
    over all sets drawn. A row of kind "none" is the clean model."""

    prompts: Prompts
    kind: Kind
    method: str
    strength: float
    setting: str = ""
    """The strength with its unit."""
    sets: int = 1
    """Sets of features drawn, of a control."""
    refusal: Estimate
    """Refused, partly or wholly."""
    compliance: Estimate
    incoherent: Estimate
    outcomes: dict[Outcome, int]
    """Answers by outcome, over all sets."""
    attack: dict[str, Estimate] = Field(default_factory=dict)
    """Attack success by each judge of harm (harmful prompts)."""
    kept: Estimate | None = None
    """Of the prompts that the clean model answers: the share still answered."""
    exact_match: Estimate | None = None
    """Of the prompts that the clean model answers: the share whose answer is an exact match with the clean one."""
    repaired: Estimate | None = None
    """Of the harmless prompts that the clean model refuses: the share now answered."""
    side_effects: SideEffects | None = None
    """None for local sets, whose side effects are measured with the global one, and where none were asked for."""
    p_clean: float | None = None
    """Exact McNemar test of refusal against the clean model, Holm-adjusted over the study's rows of that kind."""
    chosen: bool = False
    """The strength that the tuning prompts chose for this method (for F*, where it is a control)."""


class ControlRow(Value):
    """F* against one control at the chosen strength: is F* more than one more random draw?"""

    control: str
    prompts: Prompts
    kind: Kind
    measure: Literal["compliance", "refusal"]
    value: float
    """Under F*."""
    sets: tuple[float, ...]
    """Under each set drawn."""
    low: float
    high: float
    """95 % prediction interval of one more draw."""
    p: float
    """Chance that one more draw is at least as far from the mean of the sets; no smaller than 1 / (sets + 1)."""


class Comparison(Value):
    """F* against another method, paired on the same harmful test prompts."""

    other: str
    measure: str
    """"compliance" (by the outcome judge), or a judge of harm whose attack success is compared."""
    level: float | None
    """ΔCE on own answers at which both curves are read, nats per token (None: each at its own chosen strength)."""
    setting: str = ""
    other_setting: str = ""
    value: Estimate | None
    """Share of harmful test prompts that got what they ask for under F*."""
    other_value: Estimate | None
    difference: Estimate | None
    """F* less the other. At chosen strengths: Newcombe's paired interval (against controls: prompts and sets are what
    was sampled). At a level of ΔCE: curves interpolated, prompts resampled."""
    ce: float | None = None
    """ΔCE of F* there, nats per token."""
    other_ce: float | None = None
    p: float
    """At chosen strengths McNemar's exact test (against controls, see `crossed_difference`); at a level the bootstrap's
    two-sided p. nan: not compared."""
    p_holm: float
    """Adjusted over the comparisons of this measure and level."""


class SizeRow(Value):
    """F* cut to, or grown to, so many features."""

    size: int
    setting: str
    refusal: Estimate
    compliance: Estimate
    incoherent: Estimate
    ce_answers: Estimate


class MethodExtras(Value):
    """What else is measured of a method at its chosen strength of suppression."""

    method: str
    setting: str = ""
    knowledge: Knowledge | None = None
    capability: tuple[CapabilityRow, ...] = ()


class Trial(Value):
    """One setting of the search, measured on tuning prompts."""

    method: str
    number: int
    layer: int
    position: int
    k0: int
    k: int
    strength: float
    compliance: Estimate
    """Share of harmful tuning prompts complied with."""
    ce_answers: Estimate
    """ΔCE on own harmless answers (tuning prompts), nats per token."""
    front: bool
    """No other trial of the method is clearly better."""
    chosen: bool
    stability: float | None = None
    """Of the chosen trial: share of resamples of the tuning prompts in which it would be chosen again."""


class Sample(Value):
    """A generated answer for the report. Answers to harmful prompts stay collapsed there."""

    prompt_id: str
    prompt: str
    label: Label
    method: str
    kind: Kind
    setting: str
    text: str
    outcome: Outcome | None


class CompareResult(StudyResult):
    """Everything that a comparison found, in the order in which it was found."""

    k: int
    """Features in F*."""
    pool_size: int
    labels: dict[str, str]
    """Method → its name for people, in the order in which they are shown."""
    controls_drawn: tuple[str, ...] = ()
    """Methods that are random controls."""
    harm_judges: tuple[str, ...] = ()
    splits: tuple[SplitUse, ...]
    refusal_tokens: tuple[RefusalToken, ...]
    direction: DirectionInfo
    without_signal: float
    """Share of the selection prompts that carry no attribution signal."""
    features: tuple[FeatureRow, ...]
    estimators: tuple[EstimatorRow, ...] = ()
    local_overlap: float
    """Mean share of F* that a prompt's own local set holds."""
    sets: dict[str, FeatureSet]
    """Method → its global set, F* first; controls are left out."""
    effects: tuple[EffectRow, ...]
    controls: tuple[ControlRow, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    sizes: tuple[SizeRow, ...] = ()
    trials: tuple[Trial, ...] = ()
    extras: tuple[MethodExtras, ...] = ()
    samples: tuple[Sample, ...] = ()
    counters: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """What this process computed and what it found in the run folder, by kind."""
    usage: dict[str, str] = Field(default_factory=dict)
    """What judges behind an endpoint used in this process: requests, tokens, price."""
    peak_memory: int = 0
    """Bytes: of the GPUs' allocators, or of the process on a CPU (libraries included)."""

    def effect(self, prompts: Prompts, kind: Kind, method: str, strength: float | None = None) -> EffectRow | None:
        """The row of a method on a set of prompts: at a strength, or at the chosen one. Kind and method of the clean
        model are "none"."""
        for row in self.effects:
            same = (row.prompts, row.kind, row.method) == (prompts, kind, method)
            if same and (kind == "none" or (row.chosen if strength is None else row.strength == strength)):
                return row
        return None
