"""What attribution gives, and what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import InputError
from demur.model import SCORED_REGIONS, Batch
from demur.types import FeatureField, FeatureId, Value

Method = Literal["gradient", "ig", "paper", "exact"]


@dataclass(frozen=True)
class Estimator:
    """A linear estimate of what moving one feature to its patched value does to the metric.

    Every layer's output is moved a fraction α of the way to its patched value, gradients are taken there, and a
    feature's attribution is its difference times the gradient along its decoder row, averaged over α.

    Attributes:
        name: "gradient", "ig" or "paper".
        alphas: fractions of the way.
        straight_through: gradients pass each layer's mixing unchanged (else they are scaled by 1 − α there, the true
            derivative).
        path: differences are taken from the current point of the path (else from the clean run).
        patch_before_edit: residuals of the patched run are taken before the layer's own edit, as the paper's code does.
    """

    name: Method
    alphas: tuple[float, ...]
    straight_through: bool
    path: bool
    patch_before_edit: bool = False

    @property
    def begins_clean(self) -> bool:
        """The first pass of the path is the clean run, which then need not be made apart."""
        return self.alphas[0] == 0.0


def estimator(method: Method, steps: int = 10) -> Estimator:
    """The estimator of that name.

    `gradient`: attribution patching, one gradient at the clean run. `paper`: integrated gradients as the paper's
    code computes them (α = k/N, straight-through). `ig`: the path-complete form (midpoints α = (k + ½)/N, true
    gradients, differences along the path), whose features and error terms over all layers add up to the metric's
    whole change.

    Raises:
        InputError: the name is none of these, or `steps` is below 1.
    """
    if steps < 1:
        raise InputError(f"integrated gradients need at least 1 step; {steps} were asked for")
    if method == "gradient":
        return Estimator("gradient", (0.0,), straight_through=True, path=False)
    if method == "paper":
        alphas = tuple(k / steps for k in range(steps))
        return Estimator("paper", alphas, straight_through=True, path=False, patch_before_edit=True)
    if method == "ig":
        return Estimator("ig", tuple((k + 0.5) / steps for k in range(steps)), straight_through=False, path=True)
    raise InputError(f"{method!r} is not an estimate; expected gradient, ig or paper")


@dataclass(frozen=True)
class Metric:
    """`m = logit(t_jb) − logit(t_refuse)` at the last position, in logits; positive when the model would rather comply.

    `t_jb` is, per prompt, the patched run's most likely token. Several refusal tokens count as one: the log of the
    sum of their exponentials.

    Attributes:
        refusal_ids: the model's refusal tokens.
        allow_refusal_target: take the patched run's most likely token even if it is a refusal token (as the
            paper's code does; the metric is then 0). By default the most likely other token is taken.
    """

    refusal_ids: tuple[int, ...]
    allow_refusal_target: bool = False

    def targets(self, patched_logits: Float[Tensor, "batch vocab"]) -> tuple[int, ...]:
        """`t_jb` of each row."""
        logits = patched_logits
        if not self.allow_refusal_target:
            logits = logits.clone()
            logits[:, list(self.refusal_ids)] = -torch.inf
        return tuple(int(token) for token in logits.argmax(-1))

    def __call__(self, logits: Float[Tensor, "batch vocab"], targets: Sequence[int]) -> Float[Tensor, " batch"]:
        chosen = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
        return chosen - logits[:, list(self.refusal_ids)].logsumexp(-1)


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens over which attributions are summed.

    `header_tokens=None`: the user's words and the template tokens after them. A number: every token but the first
    `header_tokens` (the paper skips 1 on Gemma, 26 on Llama).
    """

    header_tokens: int | None = None

    def mask(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """True at scored tokens."""
        if self.header_tokens is None:
            return batch.within(SCORED_REGIONS)
        return batch.real & (batch.position_ids >= self.header_tokens)


class PromptAttribution(Value):
    """Attribution of one prompt. `totals[k]` is feature `k`'s attribution summed over the scored tokens, in logits."""

    prompt_id: str
    target: int
    clean: float
    patched: float
    explained: float
    """What all features and error terms of all layers add up to (for `exact`: the effects of the pool)."""
    n_scored: int
    totals: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Completeness gap in logits: the metric's whole change less what is explained."""
        return self.patched - self.clean - self.explained


class AttributionSpec(Value):
    """What an attribution was asked: enough to ask it again.

    `refusal_ids` and `allow_refusal_target` are the metric's, `header_tokens` the scoring's, `patch` the id of the
    patched run's interventions.
    """

    method: Method
    steps: int
    refusal_ids: tuple[int, ...]
    allow_refusal_target: bool
    header_tokens: int | None
    patch: str

    @classmethod
    def of(cls, method: Method, steps: int, metric: Metric, scoring: ScoredTokens, patch: str) -> Self:
        """The question that these parts ask; `steps` counts only where there are several."""
        return cls(
            method=method,
            steps=steps if method in ("ig", "paper") else 1,
            refusal_ids=metric.refusal_ids,
            allow_refusal_target=metric.allow_refusal_target,
            header_tokens=scoring.header_tokens,
            patch=patch,
        )


class _Head(Value):
    features: tuple[FeatureField, ...]
    question: AttributionSpec


@dataclass(frozen=True)
class Attribution:
    """Attributions of a pool, prompt by prompt.

    Attributes:
        features: columns, in this order everywhere.
        question: metric, scored tokens, patched run and method.
        rows: one entry a prompt.
        by_position: one tensor `[pos, feature]` a prompt (all its tokens, padding left out), if asked for.
    """

    features: tuple[FeatureId, ...]
    question: AttributionSpec
    rows: tuple[PromptAttribution, ...]
    by_position: tuple[Float[Tensor, "_ feature"], ...] | None = None

    @property
    def method(self) -> Method:
        return self.question.method

    @property
    def steps(self) -> int:
        return self.question.steps

    @property
    def totals(self) -> Float[Tensor, "prompt feature"]:
        """Sums over scored tokens, logits, float64 (0 rows when there are no prompts)."""
        return torch.tensor([row.totals for row in self.rows], dtype=torch.float64).reshape(-1, len(self.features))

    @property
    def means(self) -> Float[Tensor, "prompt feature"]:
        """Means over scored tokens, logits per token: the paper's score."""
        counts = torch.tensor([row.n_scored for row in self.rows], dtype=torch.float64)
        return self.totals / counts[:, None].clamp(min=1)

    @property
    def gaps(self) -> Float[Tensor, " prompt"]:
        """Completeness gap of each prompt, logits."""
        return torch.tensor([row.gap for row in self.rows], dtype=torch.float64)

    @property
    def changes(self) -> Float[Tensor, " prompt"]:
        """The metric's whole change, patched − clean, logits."""
        return torch.tensor([row.patched - row.clean for row in self.rows], dtype=torch.float64)

    def ordered(self, prompt_ids: Sequence[str]) -> Attribution:
        """The same attribution with its prompts in the given order."""
        place = {row.prompt_id: n for n, row in enumerate(self.rows)}
        order = [place[prompt] for prompt in prompt_ids]
        kept = None if self.by_position is None else tuple(self.by_position[n] for n in order)
        return Attribution(self.features, self.question, tuple(self.rows[n] for n in order), kept)

    @classmethod
    def joined(cls, parts: Sequence[Attribution]) -> Attribution:
        """Parts over the same features put together."""
        first = parts[0]
        kept = None
        if all(part.by_position is not None for part in parts):
            kept = tuple(each for part in parts for each in part.by_position or ())
        rows = tuple(row for part in parts for row in part.rows)
        return cls(first.features, first.question, rows, kept)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values to write to a run folder."""
        head = _Head(features=self.features, question=self.question)
        rows = [row.model_dump(mode="json", exclude={"totals"}) for row in self.rows]
        tensors = {"totals": self.totals}
        tensors |= {f"position.{n}": values for n, values in enumerate(self.by_position or ())}
        return tensors, {"head": head.model_dump(mode="json"), "rows": rows, "positions": self.by_position is not None}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The attribution that `to_parts` took apart."""
        head = _Head.model_validate(meta["head"])
        rows = tuple(
            PromptAttribution.model_validate({**row, "totals": totals})
            for row, totals in zip(meta["rows"], tensors["totals"].tolist(), strict=True)
        )
        kept = tuple(tensors[f"position.{n}"] for n in range(len(rows))) if meta["positions"] else None
        return cls(head.features, head.question, rows, kept)
