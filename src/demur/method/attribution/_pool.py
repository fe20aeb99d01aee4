"""Attribution of a given pool of features: gradient, integrated gradients, and exact patching."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import InputError
from demur.method.attribution._runs import Ends, run_ends, run_path
from demur.method.attribution._values import (
    Attribution,
    AttributionSpec,
    Estimator,
    Method,
    Metric,
    PromptAttribution,
    ScoredTokens,
    estimator,
)
from demur.method.interventions import Compiled
from demur.model import Batch, ChatModel, TokenizedPrompt, hooked
from demur.saes import Rows, Suite
from demur.types import FeatureId

PoolIndices = Mapping[int, Sequence[int]]
"""Layer → indices of the features to attribute."""


def pool_features(pool: PoolIndices) -> tuple[FeatureId, ...]:
    """Features in column order: layers ascending, indices as given."""
    return tuple(FeatureId(layer, int(index)) for layer in sorted(pool) for index in pool[layer])


def attribute_batches(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    pool: PoolIndices,
    *,
    patch: Compiled,
    metric: Metric,
    method: Method = "ig",
    steps: int = 10,
    scoring: ScoredTokens | None = None,
    keep_positions: bool = False,
    done: Collection[str] = (),
) -> Iterator[Attribution]:
    """Attribute batch by batch, as `attribute` does, and yield each batch's part as soon as it is there.

    Args:
        done: ids of prompts already attributed; a batch that holds only such prompts is left out.
    """
    if not any(len(indices) for indices in pool.values()):
        raise InputError("the pool holds no feature to attribute")
    features = pool_features(pool)
    rows = {layer: suite[layer].rows(pool[layer]).to(model.layer_device(layer)) for layer in sorted(pool)}
    scoring = scoring or ScoredTokens()
    if method == "exact" and keep_positions:
        raise InputError("exact patching moves a feature at all scored tokens at once; it has no values by position")
    question = AttributionSpec.of(method, steps, metric, scoring, patch.id)
    job = _Job(model, rows, features, patch, metric, scoring, question, keep_positions)

    def run(batch: Batch) -> Attribution:
        return _exact(job, batch) if method == "exact" else _estimate(job, batch, estimator(method, steps))

    # Gradients survive half precision; differences of two logits, one feature apart, do not.
    with model.in_float32() if method == "exact" else nullcontext():
        for _, part in model.over_batches(items, run, gradients=method != "exact", done=done):
            yield part


@dataclass(frozen=True)
class _Job:
    """What all batches have in common."""

    model: ChatModel
    rows: Mapping[int, Rows]
    features: tuple[FeatureId, ...]
    patch: Compiled
    metric: Metric
    scoring: ScoredTokens
    question: AttributionSpec
    keep_positions: bool


def attribute(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    pool: PoolIndices,
    *,
    patch: Compiled,
    metric: Metric,
    method: Method = "ig",
    steps: int = 10,
    scoring: ScoredTokens | None = None,
    keep_positions: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """What moving each feature of a pool to its patched value does to the metric (paper, section 3).

    Args:
        model: the chat model.
        suite: SAEs of the pool's layers.
        items: tokenized prompts.
        pool: layer → indices.
        patch: what the patched run does, usually the refusal direction ablated everywhere.
        metric: the answer's metric.
        method: "gradient", "ig" and "paper" are estimates (see `estimator`); "exact" patches one feature at a time and
            runs the model: the oracle, for small pools.
        steps: integrated-gradients steps (no meaning for the others).
        scoring: tokens that are summed over; "exact" patches at these tokens.
        keep_positions: keep attributions of every token.
        progress: called with (attributed, all) prompts.

    Returns:
        Attributions of `items` in their order.

    Raises:
        InputError: the pool is empty, or the method unknown.
        SaeError: a layer or feature of the pool does not exist.
    """
    parts: list[Attribution] = []
    for part in attribute_batches(
        model,
        suite,
        items,
        pool,
        patch=patch,
        metric=metric,
        method=method,
        steps=steps,
        scoring=scoring,
        keep_positions=keep_positions,
    ):
        parts.append(part)
        if progress is not None:
            progress(sum(len(each.rows) for each in parts), len(items))
    return Attribution.joined(parts).ordered([item.prompt_id for item in items])


# On a CPU larger passes are no faster, they only hold more activations.
_CPU_PATH_TOKENS = 256


def path_chunk(model: ChatModel, batch: Batch, steps: int) -> int:
    """How many α's to batch together with this batch's prompts."""
    tokens = model.budget(gradients=True)
    if model.device.type == "cpu":
        tokens = min(tokens, _CPU_PATH_TOKENS)
    return max(1, min(steps, tokens // batch.input_ids.numel()))


def _estimate(job: _Job, batch: Batch, how: Estimator) -> Attribution:
    model, rows = job.model, job.rows
    ends = run_ends(model, batch, job.patch, job.metric, how)
    real = batch.real
    patched = {layer: each.encode(ends.patched[layer]) for layer, each in rows.items()}
    clean: dict[int, Tensor] = {}
    sums = {layer: torch.zeros_like(values) for layer, values in patched.items()}
    explained = torch.zeros(len(batch), device=model.device)
    share = 1.0 / len(how.alphas)

    def visit(layer: int, entered: Tensor, gradient: Tensor) -> None:
        origin = entered if how.path else ends.clean[layer].float()
        moved = (gradient * (ends.patched[layer].float() - origin)).sum((0, -1))
        explained.add_((moved * real.to(moved.device)).sum(-1).to(explained.device), alpha=share)
        if layer in rows:
            along = gradient @ rows[layer].w_dec.T
            if not how.path and layer not in clean:
                clean[layer] = rows[layer].encode(ends.clean[layer])
            start = rows[layer].encode(entered) if how.path else clean[layer]
            sums[layer].add_(((patched[layer] - start) * along).sum(0), alpha=share)

    run_path(model, batch, ends, job.metric, how, visit, alphas_at_once=path_chunk(model, batch, len(how.alphas)))
    by_position = torch.cat([sums[layer].to(model.device) for layer in sorted(rows)], -1)
    scored = job.scoring.mask(batch)
    totals = (by_position * scored[..., None]).sum(1)
    kept = tuple(by_position[row, real[row]].cpu() for row in range(len(batch))) if job.keep_positions else None
    return Attribution(job.features, job.question, _rows(batch, ends, explained, scored, totals), kept)


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


def _exact(job: _Job, batch: Batch) -> Attribution:
    """One forward pass for each feature and prompt, features batched; a feature that does not move is not run."""
    model, rows, metric = job.model, job.rows, job.metric
    ends = run_ends(model, batch, job.patch, metric)
    scored = job.scoring.mask(batch)
    totals = torch.zeros(len(batch), len(job.features), device=model.device)
    for row in range(len(batch)):
        single = batch.row(row)
        mask = scored[row][batch.real[row]]
        changes: dict[int, Tensor] = {}
        for layer, each in rows.items():
            real, inside = batch.real[row].to(each.w_dec.device), mask.to(each.w_dec.device)
            moved = each.encode(ends.patched[layer][row]) - each.encode(ends.clean[layer][row])
            changes[layer] = moved[real] * inside[:, None]
        totals[row] = _patch_each(model, single, changes, rows, metric, ends.targets[row], ends.clean_metric[row])
    return Attribution(job.features, job.question, _rows(batch, ends, totals.sum(-1), scored, totals))


def _patch_each(
    model: ChatModel,
    single: Batch,
    changes: Mapping[int, Float[Tensor, "pos k"]],
    rows: Mapping[int, Rows],
    metric: Metric,
    target: int,
    clean: Float[Tensor, ""],
) -> Float[Tensor, " feature"]:
    """Effect on the metric of moving each feature by `changes`, one at a time."""
    order = [(layer, column) for layer in sorted(changes) for column in range(changes[layer].shape[1])]
    moving = [n for n, (layer, column) in enumerate(order) if bool(changes[layer][:, column].any())]
    effects = torch.zeros(len(order), device=model.device)
    at_once = max(1, model.budget() // single.input_ids.shape[1])
    for start in range(0, len(moving), at_once):
        group = moving[start : start + at_once]
        per_layer: dict[int, list[tuple[int, int]]] = {}
        for place, n in enumerate(group):
            per_layer.setdefault(order[n][0], []).append((place, order[n][1]))

        def shift(layer: int, picked: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
            places = [place for place, _ in picked]
            columns = [column for _, column in picked]
            delta = changes[layer][:, columns].T[..., None] * rows[layer].w_dec[columns][:, None, :]

            def run(residual: Tensor) -> Tensor:
                residual = residual.clone()
                residual[places] += delta.to(residual.dtype)
                return residual

            return run

        edits = {layer: shift(layer, picked) for layer, picked in per_layer.items()}
        with torch.no_grad(), hooked(model.layers, edits):
            logits = model.last_logits(single.repeat(len(group)))
        effects[group] = (metric(logits, [target] * len(group)) - clean).to(effects.device)
    return effects
