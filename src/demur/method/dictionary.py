"""Attribution of every feature of every dictionary (the AP baseline), streamed: no dense feature is ever stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demur.errors import ModelError
from demur.method.attribution import SCORED, ScoredTokens, no_signal
from demur.method.interventions import Compiled
from demur.method.path import Ends, Estimator, Method, Metric, estimator, run_ends, run_path
from demur.method.selection import dictionary_blocks, feature_set
from demur.model import Batch, ChatModel, Items, Progress
from demur.saes import Sae, Suite
from demur.types import FeatureId, FeatureSet

Term = tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]
"""Origin of the difference, and gradient (already weighted by 1/steps)."""
Best = tuple[Float[Tensor, "*batch _"], Int[Tensor, "*batch _"]]
"""Highest scores so far and the codes of their features, best first."""

# A feature as one integer, so that a running top-k can carry it along.
_LAYER = 1 << 32


@dataclass(frozen=True)
class DictionaryAttribution:
    """The features of highest mean attribution over the whole dictionary."""

    local: tuple[FeatureSet, ...]
    """For each prompt, its best features (scores: means over its scored tokens, logits per token)."""
    overall: FeatureSet
    """The best by the mean of these scores over prompts."""


def attribute_dictionary(
    model: ChatModel,
    suite: Suite,
    items: Items,
    *,
    patch: Compiled,
    metric: Metric,
    top: int,
    method: Method = "gradient",
    steps: int = 10,
    scoring: ScoredTokens = SCORED,
    falling: bool = False,
    progress: Progress = None,
) -> DictionaryAttribution:
    """Attribute all features and keep the best `top`, for each prompt and overall.

    A feature may score high because it *rises* in the patched run; scaling it down then does the opposite of patching.
    With `falling`, only tokens at which the feature is lower in the patched run count. (A cosine pool holds features
    along the direction, which fall when it is ablated.)

    With `gradient` and `paper` the gradients are averaged first and each layer's dictionary is passed over once a
    batch: two matrix products, in blocks, with a running top-k. `ig` encodes anew at every step and keeps the residuals
    and gradients of all steps. A TopK layer is taken whole: `8 · d_model · d_sae` bytes of weights, and about four
    arrays of `4 · batch · pos · d_sae` bytes. The other arguments are as for `demur.method.attribution.attribute`.

    Raises:
        InputError: unknown method ("exact" cannot be afforded here).
        ModelError: every score is 0 on every prompt, so there is nothing to rank by; says what to do.
    """
    how = estimator(method, steps)
    codes = {layer: torch.arange(suite[layer].spec.d_sae) + layer * _LAYER for layer in suite.layers}
    overall = {layer: torch.zeros(len(codes[layer]), dtype=torch.float64) for layer in suite.layers}
    best: dict[str, Best] = {}

    def run(batch: Batch) -> None:
        ends = run_ends(model, batch, patch, metric, how)
        terms = _terms(model, suite, batch, ends, metric, how)
        mask = scoring.mask(batch)
        weight = mask / mask.sum(-1, keepdim=True).clamp(min=1)
        found: Best = torch.empty(len(batch), 0), torch.empty(len(batch), 0, dtype=torch.long)
        sums: dict[int, Tensor] = {}
        for layer in suite.layers:
            place = weight.to(model.layer_device(layer))
            scores = list(_scores(suite[layer], ends.patched[layer], terms[layer], place, falling))
            for block, names in zip(scores, codes[layer].split([each.shape[1] for each in scores]), strict=True):
                found = _best(found, block, names, top)
            sums[layer] = torch.cat([block.double().sum(0) for block in scores])
        # Added up only now, so that a batch that ran out of memory half-way and is repeated counts once.
        for layer, part in sums.items():
            overall[layer] += part
        best.update({prompt: (found[0][row], found[1][row]) for row, prompt in enumerate(batch.prompt_ids)})
        if progress is not None:
            progress(len(best), len(items))

    for _ in model.over_batches(items, run, gradients=True):
        pass
    everything = torch.cat([overall[layer] for layer in suite.layers]) / len(items)
    if not bool(everything.any()):
        raise ModelError(no_signal(patch.id, allow_refusal_target=metric.allow_refusal_target))
    values, places = everything.topk(min(top, len(everything)))
    return DictionaryAttribution(
        local=tuple(_feature_set(best[item.prompt_id], method, item.prompt_id) for item in items),
        overall=_feature_set((values, torch.cat([codes[layer] for layer in suite.layers])[places]), method, None),
    )


def _terms(
    model: ChatModel, suite: Suite, batch: Batch, ends: Ends, metric: Metric, how: Estimator
) -> dict[int, list[Term]]:
    terms: dict[int, list[Term]] = {layer: [] for layer in suite.layers}
    share = 1.0 / len(how.alphas)

    def visit(layer: int, entered: Tensor, gradient: Tensor) -> None:
        if layer not in terms:
            return
        if how.path:
            terms[layer] += [(x, g * share) for x, g in zip(entered, gradient, strict=True)]
        elif terms[layer]:
            terms[layer][0][1].add_(gradient.sum(0), alpha=share)
        else:
            terms[layer].append((ends.clean[layer].float(), gradient.sum(0) * share))

    run_path(model, batch, ends, metric, how, visit)
    return terms


def _scores(
    sae: Sae, patched: Tensor, terms: Sequence[Term], weight: Float[Tensor, "batch pos"], falling: bool
) -> Iterator[Float[Tensor, "batch block"]]:
    """Each feature's mean attribution over each prompt's tokens, block by block, on the CPU."""
    for block in dictionary_blocks(sae):
        block = block.to(weight.device)
        target = block.encode(patched)
        means = torch.zeros(len(weight), len(block.w_dec), device=weight.device)
        for origin, gradient in terms:
            along = gradient @ block.w_dec.T
            difference = target - block.encode(origin)
            if falling:
                difference = difference.clamp(max=0)
            means += torch.einsum("bpk,bpk,bp->bk", difference, along, weight)
        yield means.cpu()


def _best(found: Best, scores: Float[Tensor, "batch block"], codes: Int[Tensor, " block"], top: int) -> Best:
    """Running top-k of each row over blocks of features."""
    everything = torch.cat([found[0], scores], 1)
    names = torch.cat([found[1], codes.expand(len(scores), -1)], 1)
    values, places = everything.topk(min(top, everything.shape[1]), dim=1)
    return values, names.gather(1, places)


def _feature_set(best: Best, method: Method, prompt: str | None) -> FeatureSet:
    features = [FeatureId(*divmod(code, _LAYER)) for code in best[1].tolist()]
    return feature_set(features, best[0].tolist(), f"dictionary+{method}", prompt)
