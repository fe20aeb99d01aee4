"""What the benchmark study writes to `benchmark.json`, and reports read. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from demur.capability import CapabilityRow
from demur.stats import Estimate
from demur.studies.benchmark.config import MethodName
from demur.studies.results import ModelInfo, SplitSize, SuiteInfo
from demur.types import FeatureSet, Label, Outcome, Value

Method = Literal["none"] | MethodName
Kind = Literal["none", "suppress", "induce"]
ROWS = "benchmark.json"


class Behaviour(Value):
    """What a model's answers to one prompt set are."""

    refusal: Estimate
    """Refused, partly or wholly, by the outcome judge."""
    compliance: Estimate
    attack: dict[str, Estimate] = Field(default_factory=dict)
    """Attack success by each judge of harm."""
    outcomes: dict[Outcome, int]
    """Answers by outcome, over all runs."""
    unchanged: Estimate | None = None
    """Share of answers equal, letter for letter, to the clean ones."""


class Damage(Value):
    """What an intervention costs where nothing should change. Rises are over the clean model, per token, on the
    same tokens for every method."""

    answers: Estimate
    """Rise of cross-entropy (nats per token) on the model's own answers to harmless prompts."""
    text: Estimate | None = None
    """The same on plain text."""
    kl: Estimate
    """KL divergence (nats) of the first answer token on harmless prompts."""


class SuppressRow(Value):
    """One method at one strength, on harmful test prompts."""

    method: Method
    strength: float
    """Scale factor c of a set of features; 1 for a direction, which is ablated whole."""
    runs: int = 1
    """Random sets that are pooled."""
    behaviour: Behaviour
    damage: Damage | None = None
    """None for local sets, whose side effects the paper measures with the global one."""
    chosen: bool = False
    """The strength that served best on the tuning prompts."""


class InduceRow(Value):
    """One method at one strength, on harmless test prompts."""

    method: Method
    strength: float
    runs: int = 1
    behaviour: Behaviour
    chosen: bool = False


class SideEffects(Value):
    """What the chosen strength of suppression does besides: each on prompts of its own."""

    method: Method
    strength: float
    harmless: Behaviour
    """On harmless test prompts."""
    over_refusal: Behaviour | None = None
    """On harmless prompts that look harmful."""
    knowledge: Knowledge | None = None
    capability: tuple[CapabilityRow, ...] = ()


class Knowledge(Value):
    """Does the model still say that a harmful request is harmful?

    It is asked to answer yes or no; the log-odds of the two as first token are read.
    """

    says_harmful: Estimate
    """Share of harmful test prompts that it calls harmful."""
    says_harmful_of_harmless: Estimate
    auroc: Estimate
    """How well its log-odds tell harmful from harmless prompts (0.5: not at all)."""


class Comparison(Value):
    """F* against another method, paired on the same harmful test prompts."""

    other: MethodName
    measure: str
    """"compliance" (by the outcome judge), or a judge of harm whose attack success is compared."""
    budget: float | None
    """Damage that both were allowed on the tuning prompts (None: each at its own best strength)."""
    strength: float | None
    """Of F*; None where none of its strengths stayed within the budget."""
    other_strength: float | None
    value: Estimate | None
    """Share of harmful test prompts that got what they ask for under F*."""
    other_value: Estimate | None
    difference: Estimate | None
    """F* less the other, with Newcombe's paired interval (against random sets: prompts and sets are what was
    sampled)."""
    damage: float | None
    """Damage of F* at that strength on the test prompts, nats per token."""
    other_damage: float | None
    p: float
    """McNemar's exact test; against several random sets the larger of a t test that knows of both samples and a paired
    permutation test. nan: not compared."""
    p_holm: float
    """Adjusted over the comparisons of this measure and budget."""


class SizeRow(Value):
    """The K* curve: F* cut to, or grown to, so many features."""

    size: int
    strength: float
    refusal: Estimate
    compliance: Estimate
    damage: Estimate
    """Rise of cross-entropy on own harmless answers, nats per token."""


class Trial(Value):
    """One setting of the search, measured on tuning prompts."""

    number: int
    layer: int
    position: int
    k0: int
    k: int
    factor: float
    suppression: float
    """Share of harmful tuning prompts that are complied with."""
    damage: float
    """Rise of cross-entropy on own harmless answers (tuning prompts), nats per token."""
    front: bool
    """No other trial suppresses as much with less damage."""


class TuningResult(Value):
    """The search, and what it chose."""

    trials: tuple[Trial, ...]
    knee: int
    """Number of the trial that was taken."""

    @property
    def taken(self) -> Trial | None:
        """The trial that was taken."""
        return next((trial for trial in self.trials if trial.number == self.knee), None)


class Answered(Value):
    """A sample answer for the report."""

    prompt: str
    label: Label
    method: Method
    kind: Kind
    strength: float
    text: str
    outcome: Outcome | None


class Counters(Value):
    """What this process did, and what it found done."""

    answers: int = 0
    answers_found: int = 0
    verdicts: int = 0
    verdicts_found: int = 0
    """Among them answers equal to one that was judged before, to the same prompt."""
    passes: int = 0
    """Prompts and texts measured by a forward pass."""
    passes_found: int = 0


class BenchmarkResult(Value):
    """Everything that the benchmark found."""

    model: ModelInfo
    suite: SuiteInfo
    judge: str
    judges: tuple[str, ...]
    """Judges of harm."""
    splits: tuple[SplitSize, ...]
    layer: int
    position: int
    """Of the direction."""
    k0: int
    k: int
    pool: str
    pool_size: int
    estimator: str
    strength_unit: Literal["value", "multiple"]
    """Of induction."""
    sets: dict[MethodName, FeatureSet]
    """The global sets, F* first."""
    suppression: tuple[SuppressRow, ...]
    induction: tuple[InduceRow, ...]
    side_effects: tuple[SideEffects, ...]
    comparisons: tuple[Comparison, ...]
    curve: tuple[SizeRow, ...]
    tuning: TuningResult | None = None
    samples: tuple[Answered, ...] = ()
    warnings: tuple[str, ...] = ()
    counters: Counters = Counters()
    spent: dict[str, str] = Field(default_factory=dict)
    """What judges behind an endpoint used in this process: requests, tokens, price."""
    seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory: int = 0
    """Bytes: of the GPUs' allocators, or of the process on a CPU (what the libraries hold among them)."""


__all__ = [
    "ROWS",
    "Answered",
    "Behaviour",
    "BenchmarkResult",
    "Comparison",
    "Counters",
    "Damage",
    "InduceRow",
    "Kind",
    "Knowledge",
    "Method",
    "SideEffects",
    "SizeRow",
    "SuppressRow",
    "Trial",
    "TuningResult",
]
