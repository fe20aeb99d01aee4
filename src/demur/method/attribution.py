"""Which features move the answer: gradient, integrated gradients and exact patching behind one signature.

A feature's attribution estimates what moving it to its value in the patched run does to the metric: its difference
times the gradient along its decoder row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import InputError
from demur.method.interventions import Compiled
from demur.method.path import Ends, Estimator, Method, Metric, estimator, run_ends, run_path
from demur.model import SCORED_REGIONS, Batch, ChatModel, Items, Progress, Region, hooked
from demur.saes import DenseSae, Rows, Suite
from demur.types import FeatureField, FeatureId, Take, Value, by_layer, take_all

_NO_CHANGE = 1e-6
"""Logits: a smaller change of the metric is rounding."""


@dataclass(frozen=True)
class ScoredTokens:
    """Tokens over which attributions are summed: those of some `regions` (default: the user's words and the template
    tokens after them), or every token but the first `header_tokens` (the paper skips 1 on Gemma, 26 on Llama)."""

    header_tokens: int | None = None
    regions: tuple[Region, ...] = SCORED_REGIONS

    def mask(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """True at scored tokens."""
        if self.header_tokens is None:
            return batch.within(self.regions)
        return batch.real & (batch.position_ids >= self.header_tokens)


SCORED = ScoredTokens()


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
    def change(self) -> float:
        """The metric's whole change, patched − clean, logits."""
        return self.patched - self.clean

    @property
    def gap(self) -> float:
        """Completeness gap in logits: the metric's whole change less what is explained."""
        return self.change - self.explained


class AttributionSpec(Value):
    """What an attribution was asked, enough to ask it again: `refusal_ids` and `allow_refusal_target` are the metric's,
    `header_tokens` and `regions` the scoring's, `patch` the id of the patched run's interventions."""

    method: Method
    steps: int
    refusal_ids: tuple[int, ...]
    allow_refusal_target: bool
    header_tokens: int | None
    regions: tuple[Region, ...] = SCORED_REGIONS
    patch: str

    @classmethod
    def of(cls, method: Method, steps: int, metric: Metric, scoring: ScoredTokens, patch: str) -> Self:
        """What these parts ask; `steps` counts only where there are several ("ig", "paper")."""
        return cls(
            method=method,
            steps=steps if method in ("ig", "paper") else 1,
            refusal_ids=metric.refusal_ids,
            allow_refusal_target=metric.allow_refusal_target,
            header_tokens=scoring.header_tokens,
            regions=scoring.regions,
            patch=patch,
        )


@dataclass(frozen=True)
class Attribution:
    """Attributions of a pool, prompt by prompt."""

    features: tuple[FeatureId, ...]
    """Columns, in this order everywhere."""
    spec: AttributionSpec
    rows: tuple[PromptAttribution, ...]
    by_position: tuple[Float[Tensor, "_ feature"], ...] | None = None
    """One tensor `[pos, feature]` a prompt (all its tokens, padding left out), if asked for."""

    @property
    def method(self) -> Method:
        return self.spec.method

    @property
    def steps(self) -> int:
        return self.spec.steps

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
        return torch.tensor([row.change for row in self.rows], dtype=torch.float64)

    @property
    def signal(self) -> Bool[Tensor, " prompt"]:
        """Prompts whose scores say something about refusal: not those on which the metric aims at a refusal token,
        patching leaves the metric as it was, or every score is 0, as their order of features is an accident."""
        refusal = self.spec.refusal_ids
        rows = [r.target not in refusal and abs(r.change) > _NO_CHANGE and any(r.totals) for r in self.rows]
        return torch.tensor(rows, dtype=torch.bool)

    @property
    def share_without_signal(self) -> float:
        """Fraction of the prompts that carry no signal (nan when there are no prompts)."""
        return 1.0 - float(self.signal.double().mean())

    def ordered(self, prompt_ids: Sequence[str]) -> Attribution:
        """The same attribution with its prompts in the given order."""
        place = {row.prompt_id: n for n, row in enumerate(self.rows)}
        order = [place[prompt] for prompt in prompt_ids]
        kept = None if self.by_position is None else tuple(self.by_position[n] for n in order)
        return Attribution(self.features, self.spec, tuple(self.rows[n] for n in order), kept)

    @classmethod
    def joined(cls, parts: Sequence[Attribution]) -> Attribution:
        """Parts over the same features put together."""
        first = parts[0]
        kept = tuple(each for part in parts for each in part.by_position or ())
        rows = tuple(row for part in parts for row in part.rows)
        return cls(first.features, first.spec, rows, None if first.by_position is None else kept)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values to write to a run folder."""
        head = {"features": [list(each) for each in self.features], "spec": self.spec.model_dump(mode="json")}
        rows = [row.model_dump(mode="json", exclude={"totals"}) for row in self.rows]
        tensors = {"totals": self.totals}
        tensors |= {f"position.{n}": values for n, values in enumerate(self.by_position or ())}
        return tensors, {"head": head, "rows": rows, "positions": self.by_position is not None}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows = tuple(
            PromptAttribution.model_validate({**row, "totals": totals})
            for row, totals in zip(meta["rows"], tensors["totals"].tolist(), strict=True)
        )
        kept = tuple(tensors[f"position.{n}"] for n in range(len(rows))) if meta["positions"] else None
        features = tuple(FeatureId(*each) for each in meta["head"]["features"])
        return cls(features, AttributionSpec.model_validate(meta["head"]["spec"]), rows, kept)


def no_signal(patch: str, *, allow_refusal_target: bool) -> str:
    """What to tell a user whose prompts all carry no signal."""
    target = "; or let the metric aim at the likeliest token that is no refusal" if allow_refusal_target else ""
    return (
        f"attribution has nothing to rank features by: on no prompt does the patched run ({patch}) move the answer "
        "away from refusal, so every score is 0. Take another direction (another layer or position), or ablate it in "
        f"the affine form, to the mean of harmless prompts{target}"
    )


PoolIndices = Mapping[int, Sequence[int]]
"""Layer → indices of the features to attribute."""


class Pool(Value):
    """`F0`: per layer the features of highest signed cosine with the refusal direction, best first (paper, section
    3)."""

    features: tuple[FeatureField, ...]
    cosines: tuple[float, ...]

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer → indices, best first."""
        return by_layer(self.features)

    def cosine(self, feature: FeatureId) -> float:
        """Cosine of a feature of the pool with the direction."""
        return self.cosines[self.features.index(feature)]


def pool_features(pool: PoolIndices | Pool) -> tuple[FeatureId, ...]:
    """Features in column order: layers ascending, indices as given."""
    pool = pool.by_layer if isinstance(pool, Pool) else pool
    return tuple(FeatureId(layer, int(index)) for layer in sorted(pool) for index in pool[layer])


def attribute(
    model: ChatModel, suite: Suite, items: Items, pool: PoolIndices | Pool, *, progress: Progress = None, **asked: Any
) -> Attribution:
    """What moving each feature of a pool to its patched value does to the metric (paper, section 3): the attributions
    of `attribute_batches`, which has the other arguments, in the order of `items`."""
    parts: list[Attribution] = []
    for part in attribute_batches(model, suite, items, pool, **asked):
        parts.append(part)
        if progress is not None:
            progress(sum(len(each.rows) for each in parts), len(items))
    return Attribution.joined(parts).ordered([item.prompt_id for item in items])


def attribute_batches(
    model: ChatModel,
    suite: Suite,
    items: Items,
    pool: PoolIndices | Pool,
    *,
    patch: Compiled,
    metric: Metric,
    method: Method = "ig",
    steps: int = 10,
    scoring: ScoredTokens = SCORED,
    keep_positions: bool = False,
    take: Take = take_all,
) -> Iterator[Attribution]:
    """Attribute `items` batch by batch, and yield each batch's part as soon as it is there. Raises InputError: the pool
    is empty, or the method unknown; SaeError: a layer or feature of the pool does not exist.

    Args:
        suite: SAEs of the pool's layers.
        pool: features to attribute.
        patch: what the patched run does, usually the refusal direction ablated everywhere.
        metric: the answer's.
        method: one of the estimates (see `estimator`), or "exact", which patches one feature at a time: the oracle.
        steps: of integrated gradients.
        scoring: tokens that are summed over, or at which "exact" patches.
        keep_positions: keep attributions of every token.
        take: given the prompt ids of a batch just before it is attributed; where it says False the batch is left out.
    """
    pool = pool.by_layer if isinstance(pool, Pool) else pool
    if not any(len(indices) for indices in pool.values()):
        raise InputError("the pool holds no feature to attribute")
    features = pool_features(pool)
    rows = {layer: suite[layer].rows(pool[layer]).to(model.layer_device(layer)) for layer in sorted(pool)}
    how = None if method == "exact" else estimator(method, steps)
    if how is None and keep_positions:
        raise InputError("exact patching moves a feature at all scored tokens at once; it has no values by position")
    spec = AttributionSpec.of(method, steps, metric, scoring, patch.id)

    def run(batch: Batch) -> Attribution:
        ends = run_ends(model, batch, patch, metric, how, suite.reads)
        scored = scoring.mask(batch)
        by_position = None
        if how is None:
            totals = _exact(model, batch, ends, rows, metric, scored)
            explained = totals.sum(-1)
        else:
            by_position, explained = _estimate(model, batch, ends, rows, metric, how)
            totals = (by_position * scored[..., None]).sum(1)
        kept = None
        if keep_positions and by_position is not None:
            kept = tuple(values[real].cpu() for values, real in zip(by_position, batch.real, strict=True))
        return Attribution(features, spec, _rows(batch, ends, explained, scored, totals), kept)

    # Gradients survive half precision; differences of two logits, one feature apart, do not.
    with model.in_float32() if how is None else nullcontext():
        for _, part in model.over_batches(items, run, gradients=how is not None, take=take):
            yield part


def _rows(batch: Batch, ends: Ends, explained: Tensor, scored: Tensor, totals: Tensor) -> tuple[PromptAttribution, ...]:
    return tuple(
        PromptAttribution(
            prompt_id=batch.prompt_ids[row],
            target=ends.targets[row],
            clean=float(ends.clean_metric[row]),
            patched=float(ends.patched_metric[row]),
            explained=float(explained[row]),
            n_scored=int(scored[row].sum()),
            totals=tuple(totals[row].tolist()),
        )
        for row in range(len(batch))
    )


def patched_values(ends: Ends, layer: int, rows: Rows | DenseSae) -> Float[Tensor, "batch pos feature"]:
    """The values that features are moved to: those in the patched run. The patch changes what leaves a layer, which a
    dictionary that reads before that (a transcoder) does not see: its features are moved to 0, so that what is
    estimated is the effect of taking them out."""
    if layer in ends.reads:
        return torch.zeros(*ends.patched[layer].shape[:-1], len(rows.w_dec), device=rows.w_dec.device)
    return rows.encode(ends.patched[layer])


def _estimate(
    model: ChatModel, batch: Batch, ends: Ends, rows: Mapping[int, Rows], metric: Metric, how: Estimator
) -> tuple[Float[Tensor, "batch pos feature"], Float[Tensor, " batch"]]:
    """Attribution at every token, and what all features and error terms explain."""
    patched = {layer: patched_values(ends, layer, each) for layer, each in rows.items()}
    clean: dict[int, Tensor] = {}
    sums = {layer: torch.zeros_like(values) for layer, values in patched.items()}
    explained = torch.zeros(len(batch), device=model.device)
    share = 1.0 / len(how.alphas)

    def visit(layer: int, entered: Tensor, read: Tensor, gradient: Tensor) -> None:
        origin = entered if how.path else ends.clean[layer].float()
        moved = (gradient * (ends.patched[layer].float() - origin)).sum((0, -1))
        # Padding adds nothing: no real token attends to it, so no gradient reaches it.
        explained.add_(moved.sum(-1).to(explained.device), alpha=share)
        if layer in rows:
            along = gradient @ rows[layer].w_dec.T
            if not how.path and layer not in clean:
                clean[layer] = rows[layer].encode(ends.read[layer])
            start = rows[layer].encode(read) if how.path else clean[layer]
            sums[layer].add_(((patched[layer] - start) * along).sum(0), alpha=share)

    run_path(model, batch, ends, metric, how, visit)
    return torch.cat([sums[layer].to(model.device) for layer in rows], -1), explained


def _exact(
    model: ChatModel,
    batch: Batch,
    ends: Ends,
    rows: Mapping[int, Rows],
    metric: Metric,
    scored: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch feature"]:
    """Effect on the metric of moving each feature alone, at the scored tokens; one that does not move is not run."""
    columns = [(layer, column) for layer, each in rows.items() for column in range(len(each.w_dec))]
    totals = torch.zeros(len(batch), len(columns), device=model.device)

    def shift(layer: int, group: Sequence[int], changes: Mapping[int, Tensor], residual: Tensor) -> Tensor:
        places = [place for place, n in enumerate(group) if columns[n][0] == layer]
        picked = [columns[group[place]][1] for place in places]
        delta = changes[layer][:, picked].T[..., None] * rows[layer].w_dec[picked][:, None, :]
        residual = residual.clone()
        residual[places] += delta.to(residual.dtype)
        return residual

    to = {layer: patched_values(ends, layer, each) for layer, each in rows.items()}
    for row in range(len(batch)):
        single = batch.cut([row])
        changes: dict[int, Float[Tensor, "pos k"]] = {}
        for layer, each in rows.items():
            real, inside = (mask[row].to(each.w_dec.device) for mask in (batch.real, scored))
            moved = to[layer][row] - each.encode(ends.read[layer][row])
            changes[layer] = moved[real] * inside[real][:, None]

        moving = [n for n, (layer, column) in enumerate(columns) if bool(changes[layer][:, column].any())]
        at_once = max(1, model.budgets.plain // single.input_ids.shape[1])
        for start in range(0, len(moving), at_once):
            group = moving[start : start + at_once]
            edits = {layer: partial(shift, layer, group, changes) for layer in {columns[n][0] for n in group}}
            with torch.no_grad(), hooked(model.layers, edits):
                logits = model.last_logits(single.repeat(len(group)))
            effects = metric(logits, [ends.targets[row]] * len(group)) - ends.clean_metric[row]
            totals[row, group] = effects.to(totals.device)
    return totals
