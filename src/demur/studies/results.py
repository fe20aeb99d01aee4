"""What the features study writes to `results.json`, and reports read. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from demur.types import Candidate, FeatureField, Outcome, Rate, RefusalToken, Value

Kind = Literal["baseline", "suppress", "induce"]
Method = Literal["none", "features", "random", "direction", "direction_affine"]


class ModelInfo(Value):
    """The model that was studied."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    parameters: int
    dtype: str
    device: str


class SuiteInfo(Value):
    """The SAEs that were used."""

    source: str
    layers: tuple[int, ...]
    d_sae: int
    activation: str
    average_l0: float | None = None


class DirectionInfo(Value):
    """The chosen direction and what it was chosen from (Arditi et al., 2024)."""

    chosen: Candidate
    token: str
    norm: float
    candidates: tuple[Candidate, ...]
    note: str = ""


class FeatureRow(Value):
    """One feature of F*.

    `score` is its estimated effect on the metric over the selection prompts that chose it, `exact` its exactly patched
    effect over the first test prompts that the model refuses; both in logits per scored token, mean over prompts.
    `active_*` are shares of scored tokens on which it fires, `peak_harmful` its highest activation in a prompt, means
    over prompts.
    """

    feature: FeatureField
    score: float
    cosine: float
    exact: float | None
    active_harmful: float
    active_harmless: float
    peak_harmful: float


class EstimatorRow(Value):
    """How well an attribution method ranks the pool against exact patching of one feature at a time, on test prompts.

    `spearman` is the rank correlation over the pool of the means over prompts, `spearman_prompt` the mean over
    prompts of the rank correlation within each. `gap` is the mean absolute completeness gap in logits,
    `gap_relative` that gap divided by the mean absolute total effect.
    """

    method: str
    steps: int
    spearman: float
    spearman_prompt: float
    gap: float
    gap_relative: float
    used: bool


class EffectRow(Value):
    """What an intervention did to a set of test prompts.

    `strength` is the scale factor c (suppress), the value or multiple v (induce), or 1 for a direction. `unchanged` is
    the share of answers equal, letter for letter, to the clean ones. `p_value` is McNemar's exact test of refusal
    against the baseline on the same prompts.
    """

    prompts: Literal["harmful", "harmless"]
    kind: Kind
    method: Method
    strength: float
    refusal: Rate
    compliance: Rate
    outcomes: dict[Outcome, int]
    unscored: int
    unchanged: Rate | None = None
    p_value: float | None = None
    p_vs_random: float | None = None
    """The same test of refusal against matched random features at the same strength (rows of F* only)."""
    chosen: bool = False


class Sample(Value):
    """A generated answer shown in the report. Harmful prompts' answers stay collapsed there."""

    prompt_id: str
    prompt: str
    label: Literal["harmful", "harmless"]
    kind: Kind
    method: Method
    strength: float
    text: str
    outcome: Outcome | None


class SplitSize(Value):
    """Prompts in one split; `used_*` are those left after the model's own behaviour was checked."""

    name: str
    harmful: int
    harmless: int
    used_harmful: int
    used_harmless: int


class FeaturesResult(Value):
    """Everything the features study found, in the order in which it was found."""

    model: ModelInfo
    suite: SuiteInfo
    judge: str
    strength_unit: Literal["value", "multiple"]
    """What `strength` of induce rows means: an activation, or a multiple of each feature's own peak on harmful
    prompts."""
    induce_where: Literal["all", "prompt"]
    """Tokens on which features were set."""
    splits: tuple[SplitSize, ...]
    refusal_tokens: tuple[RefusalToken, ...]
    direction: DirectionInfo
    pool_size: int
    features: tuple[FeatureRow, ...]
    features_by_layer: dict[int, int]
    """How many features of F* each layer holds."""
    estimators: tuple[EstimatorRow, ...]
    local_overlap: float
    """Mean share of F* that a prompt's own local set holds."""
    effects: tuple[EffectRow, ...]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall-clock seconds of each stage that this process ran."""
