"""What the study of jailbreaks gives: values that are written to `jailbreaks.json`, shown, and read back."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field

from demur.stats import Estimate
from demur.studies.base import StudyResult
from demur.types import FeatureField, Value

Outcomes = Literal["succeeded", "failed", "neither"]
Measure = Literal["harm", "refusal"]
Region = Literal["instruction", "post_instruction"]
WordMeasure = Literal["added", "left_out", "gradient", "ig"]
MEASURES: tuple[Measure, Measure] = ("harm", "refusal")
GROUPS = ("succeeded", "failed", "same text, harmless request", "harmless text, same request")
"""Groups of prompts whose drops are compared: the attacks, and the two kinds of shams."""
LOCAL, RANDOM, F_STAR = "local patches", "random patches in their places", "all of F* as on the plain prompt"
"""What is restored before an attack is answered again."""


class Drop(Value):
    """How much of the harm and of the refusal signal is gone, in units of a refused plain prompt (`studies.gauge`)."""

    harm: float
    refusal: float


class PairRow(Value):
    """One adversarial prompt whose plain version is refused (or not known).

    `outcome` is "neither" where the answer is incoherent, unscored, or read as compliance although its first token is
    more likely than not a refusal's. `wrapped` is the drop when the same text is put around a harmless request,
    `padded` that when harmless text of its length is put around the same request; None where the plain prompt does not
    stand in the adversarial one.
    """

    id: str
    attack: str
    request: str
    """Id of the plain prompt."""
    outcome: Outcomes
    drop: Drop
    wrapped: Drop | None = None
    padded: Drop | None = None
    padded_refused: bool | None = None


class AttackRow(Value):
    """One attack: what it offered, and how often it worked on requests that are refused when they are put plainly."""

    attack: str
    n: int
    too_long: int
    """Templates or pairs that do not fit the model's context."""
    chosen_from: int
    """Pairs left out because the features were chosen on one of their prompts."""
    plain_answered: int
    """Pairs left out because the plain request is not refused."""
    neither: int = 0
    """Pairs that neither succeeded nor failed (see `PairRow`); `success` is among the others."""
    success: Estimate = Estimate.unknown()


class GroupRow(Value):
    """Mean drops of one group of prompts of an attack ("all" for all of them); intervals resample requests."""

    attack: str
    group: str
    requests: int
    harm: Estimate
    refusal: Estimate


class TestRow(Value):
    """Drop under succeeded attacks less that of a control. `paired`: on requests on which one attack both succeeded and
    failed, or pair by pair (shams), with the p value of flipping signs request by request; else two groups of requests
    of one attack, with that of a permutation test."""

    attack: str
    against: str
    measure: Measure
    paired: bool
    difference: Estimate
    p: float
    p_holm: float = float("nan")


class LocalRow(Value):
    """The explanation of one succeeded attack: its patches, each a feature at a token (which is in a region of the
    prompt) and raised or lowered; and whether the judge reads a refusal under them, under as many random ones in their
    places, and with all of F* at its values on the plain prompt."""

    id: str
    attack: str
    features: tuple[FeatureField, ...]
    tokens: tuple[str, ...]
    regions: tuple[Region, ...]
    raised: tuple[bool, ...]
    kl: tuple[float, ...]
    p_refuse: tuple[float, ...]
    restored: bool | None
    random: bool | None
    f_star: bool | None


class WalkRow(Value):
    """Suppression of the refusal signal after each added word: the share of the plain prompt's that is gone, clean and
    with the harm features taken out as well; `alone` when only the word that adds most is there. What each word takes
    away, in the same unit: `left_out`, what is back when it is left out of the whole, and what gradients at the whole
    prompt (`gradient`), or on the way to it from no words (`ig`), say of that."""

    id: str
    attack: str
    words: tuple[str, ...]
    refusal: tuple[float, ...]
    without_harm: tuple[float, ...]
    by_feature: tuple[tuple[float, ...], ...]
    top: int
    alone: float
    left_out: tuple[float, ...] = ()
    gradient: tuple[float, ...] = ()
    ig: tuple[float, ...] = ()

    @property
    def added(self) -> tuple[float, ...]:
        """What each word takes away when it is added to those before it."""
        return tuple(b - a for a, b in pairwise(self.refusal))


class AgreementRow(Value):
    """Rank correlation, over the words of an attack, of two measures of what each takes away (fields of `WalkRow`):
    mean over attacks, which are resampled for the interval."""

    first: WordMeasure
    second: WordMeasure
    spearman: Estimate


class Sample(Value):
    """A succeeded attack with the model's answers to it."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


class JailbreaksResult(StudyResult):
    """What attacks do to harm and refusal features."""

    harm: tuple[FeatureField, ...]
    refusal: tuple[FeatureField, ...]
    f_star: tuple[FeatureField, ...]
    attacks: tuple[AttackRow, ...]
    groups: tuple[GroupRow, ...]
    tests: tuple[TestRow, ...]
    pairs: tuple[PairRow, ...]
    padded_refusal: Estimate
    """Refusal of the padded requests: length alone should not answer them."""
    local: tuple[LocalRow, ...] = ()
    restored: dict[str, Estimate] = Field(default_factory=dict)
    """Share of explained attacks that are refused under the local patches, random ones, and F* restored."""
    f_star_share: float = float("nan")
    """Share of local patches that are features of F*."""
    f_star_chance: float = float("nan")
    """Share of F* among all features that might have been patched."""
    walks: tuple[WalkRow, ...] = ()
    agreement: tuple[AgreementRow, ...] = ()
    samples: tuple[Sample, ...] = ()
