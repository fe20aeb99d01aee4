"""What the study of probes gives: values that are written to `probes.json`, shown, and read back."""

from __future__ import annotations

from typing import Literal

from demur.guard.artifact import Verdicts
from demur.guard.readings import Pooling
from demur.guard.stats import ReliabilityRow
from demur.stats import Estimate
from demur.studies.base import StudyResult
from demur.types import FeatureField, Value

Target = Literal["harmful", "refuse"]
"""Is the request harmful (by the data's labels)? Will the model refuse it (by its own judged answer)?"""
TARGETS: tuple[Target, Target] = ("harmful", "refuse")
Kind = Literal["plain", "attack", "wrapped", "over-refusal", "benign", "long"]
FPRS = (0.01, 0.05)
"""False-positive rates on validation negatives at which thresholds are set."""
DENSE, KEYWORDS, PERPLEXITY = "dense residual", "keywords", "perplexity"
DENSE_LAST = "dense residual (last token)"
CENTROIDS, ALL_FEATURES = "centroids", "all features (L1)"
HARM, REFUSAL, BOTH = "harm features", "refusal features", "harm + refusal features"
COSSIM, RANDOM = "CosSim features", "random features"
ALL = "all attacks"


class SetRow(Value):
    """A set of test prompts, and how the model answered it. `succeeded` is the share of attacks that did, among those
    that succeeded or failed."""

    name: str
    kind: Kind
    positive: bool
    """Harmful by the data's labels."""
    n: int
    refused: Estimate
    succeeded: Estimate


class ProbeRow(Value):
    """A representation with the pooling (and layer) that the validation prompts chose. `loss` and `auroc` are those on
    the validation prompts."""

    target: Target
    representation: str
    pooling: Pooling | None
    """None where no activation is read."""
    layer: int | None
    dim: int
    used: int
    """Values whose weight is not 0."""
    loss: float
    auroc: float
    tried: int
    """Poolings and layers that were compared."""


class FlagRow(Value):
    """The share of a set that a probe flags at the threshold that flags at most a share `fpr` of the validation
    negatives."""

    target: Target
    representation: str
    prompts: str
    fpr: float
    flagged: Estimate


class RankRow(Value):
    """How well a probe tells one family's positives from negatives. For the target "harmful" the negatives are plain
    benign prompts and the same family's wrappers around benign requests; over-refusal prompts are apart. For "refuse"
    they are the family's prompts that the model did not refuse.

    `difference` is that of AUROCs to the dense residual's, by DeLong on the same prompts, `p_holm` adjusted over all
    rows of the target.
    """

    target: Target
    representation: str
    prompts: str
    auroc: Estimate
    f1: float
    """At the threshold of a false-positive rate of 1 %."""
    ece: float
    difference: Estimate | None = None
    p: float = float("nan")
    p_holm: float = float("nan")


class MatchedRow(Value):
    """All adversarial harmful prompts at equal false alarms: the threshold of every representation is moved to where it
    flags 1 % of these benign test prompts, plain ones and those in the attacks' wrappers. `difference` is to the best
    one, with its interval and two-sided p by resampling prompts, adjusted by Holm; for the best one it is None.
    `alarms` is the share of the same benign prompts that is flagged at the threshold that was set before."""

    representation: str
    tpr: Estimate
    alarms: Estimate
    difference: Estimate | None = None
    p: float = float("nan")
    p_holm: float = float("nan")


class HeldOutRow(Value):
    """A family held out: TPR at 1 % when trained on plain prompts only, and when the other families are trained on too,
    on requests that no training prompt holds; and the false-positive rates on its wrappers around benign requests (or
    plain benign prompts)."""

    family: str
    representation: str
    plain: Estimate
    others: Estimate
    difference: Estimate
    plain_alarms: Estimate
    others_alarms: Estimate


class VerdictRow(Value):
    """How a group of prompts is judged on the two axes together: share of each verdict."""

    group: str
    harmless: Estimate
    refused: Estimate
    jailbreak: Estimate
    over_refusal: Estimate

    def of(self, verdict: Verdicts) -> Estimate:
        """The share of one verdict."""
        return getattr(self, verdict.replace("-", "_"))


class PaperRow(Value):
    """The paper's labels (section 4.4): plain harmful prompts are positives, *succeeded* attacks count as the benign
    class. `plain` and `succeeded` are accuracies by those labels, at a probability of one half; `as_harm` is what the
    second number is as detection: the share of succeeded attacks called harmful."""

    representation: str
    plain: Estimate
    succeeded: Estimate
    as_harm: Estimate


class CascadeRow(Value):
    """A shallow probe on everything, deeper ones on what it passes on. `passed` is the share of validation negatives
    that the first stage was set to pass on, `second` and `second_attacks` the shares that it did of benign test prompts
    and of attacks, `cost` the layers run for a benign prompt on average (a share of the model's)."""

    passed: float
    second: Estimate
    second_attacks: Estimate
    cost: float
    tpr: Estimate
    fpr: Estimate


class EqualAlarms(Value):
    """Streaming with its threshold moved to where at most 1 % of the benign test answers, plain and wrapped, would be
    stopped: the share of succeeded attacks stopped, of benign answers, and the tokens out before the stop (median)."""

    stopped: Estimate
    alarms: Estimate
    tokens: float


class StreamRow(Value):
    """Answers stopped while they were written. `tokens` are those that were out before the stop (median and 90th
    percentile, of the stopped answers to succeeded attacks)."""

    layer: int
    window: int
    trained_on: int
    """Complied-with harmful requests among the answers that it was fitted on."""
    stopped: Estimate
    benign: Estimate
    wrapped: Estimate
    over_refusal: Estimate
    tokens: float
    tokens_90: float
    equal: EqualAlarms | None = None


class Reliability(Value):
    """The reliability of one probe's probabilities, on plain test prompts or on all test prompts."""

    representation: str
    prompts: str
    rows: tuple[ReliabilityRow, ...]


class ProbesResult(StudyResult):
    """What probes detect: each representation, each family of attacks, at thresholds that were set before."""

    sets: tuple[SetRow, ...]
    probes: tuple[ProbeRow, ...]
    flags: tuple[FlagRow, ...]
    ranks: tuple[RankRow, ...]
    winner: str
    """The representation of the harm probe that the validation prompts chose for the guard."""
    best: str
    """The representation that flags most adversarial harmful prompts at equal false alarms."""
    matched: tuple[MatchedRow, ...]
    held_out: tuple[HeldOutRow, ...]
    verdicts: tuple[VerdictRow, ...]
    jailbreak_auroc: Estimate
    """Of P(harmful) · (1 − P(refuse)): succeeded attacks against everything else."""
    cascade: tuple[CascadeRow, ...]
    reliability: tuple[Reliability, ...]
    paper: tuple[PaperRow, ...] = ()
    stream: StreamRow | None = None
    harm: tuple[FeatureField, ...] = ()
    refusal: tuple[FeatureField, ...] = ()
    negatives: int = 0
    """Validation negatives that set the thresholds."""

    def flag(self, representation: str, prompts: str, fpr: float = 0.01, target: Target = "harmful") -> Estimate | None:
        """One share of flagged prompts."""
        asked = (target, representation, prompts, fpr)
        return next((r.flagged for r in self.flags if (r.target, r.representation, r.prompts, r.fpr) == asked), None)
