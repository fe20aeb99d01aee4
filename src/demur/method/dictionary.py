"""Attribution of every feature of every dictionary (the AP baseline), streamed: no dense feature is ever stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import ModelError
from demur.method.attribution import ScoredTokens, no_signal
from demur.method.interventions import Compiled
from demur.method.path import Ends, Estimator, Method, Metric, estimator, run_ends, run_path
from demur.model import Batch, ChatModel, TokenizedPrompt
from demur.saes import DenseSae, FeatureRows, Sae, Suite
from demur.types import FeatureId, FeatureSet

_BLOCK = 8192
"""Features encoded at a time."""

Term = tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]]
"""Origin of the difference, and gradient (already weighted by 1/steps)."""


@dataclass(frozen=True)
class DictionaryAttribution:
    """The features of highest mean attribution over the whole dictionary.

    Attributes:
        local: for each prompt, its best features (scores: means over its scored tokens, logits per token).
        overall: the best by the mean of these scores over prompts.
    """

    local: tuple[FeatureSet, ...]
    overall: FeatureSet


def attribute_dictionary(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    *,
    patch: Compiled,
    metric: Metric,
    top: int,
    method: Method = "gradient",
    steps: int = 10,
    scoring: ScoredTokens | None = None,
    falling: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DictionaryAttribution:
    """Attribute all features and keep the best `top`.

    A feature may score high because it *rises* in the patched run; scaling it down then does the opposite of patching.
    With `falling`, only tokens at which the feature is lower in the patched run count, so that a high score says that
    scaling it down helps. (A cosine pool holds features along the direction, which fall when it is ablated.)

    With `gradient` and `paper` the gradients are averaged first and each layer's dictionary is passed over once a
    batch: two matrix products, in blocks of 8,192 features, with a running top-k. `ig` encodes anew at every step and
    keeps the residuals and gradients of all steps: `steps` times the time and memory of that last part.

    A TopK layer is taken whole, because its features are active only against all others: `8 · d_model · d_sae` bytes of
    weights, and about four arrays of `4 · batch · pos · d_sae` bytes, one layer at a time. Batches that a device does
    not hold are halved, as everywhere.

    Args:
        model: the chat model.
        suite: the SAEs.
        items: tokenized prompts.
        patch: what the patched run does.
        metric: the answer's metric.
        top: how many features to keep, for each prompt and overall.
        method: "gradient", "ig" or "paper" (see `demur.method.path.estimator`).
        steps: integrated-gradients steps (no meaning for "gradient").
        scoring: tokens that are averaged over.
        falling: count only tokens at which the feature falls.
        progress: called with (attributed, all) prompts.

    Raises:
        InputError: unknown method ("exact" cannot be afforded here).
        ModelError: every score is 0 on every prompt, so there is nothing to rank by; says what to do.
    """
    how = estimator(method, steps)
    scoring = scoring or ScoredTokens()
    overall: dict[int, Tensor] = {
        layer: torch.zeros(suite[layer].spec.d_sae, dtype=torch.float64) for layer in suite.layers
    }
    best: dict[str, tuple[Tensor, Tensor]] = {}

    def run(batch: Batch) -> None:
        ends = run_ends(model, batch, patch, metric, how)
        terms = _terms(model, suite, batch, ends, metric, how)
        mask = scoring.mask(batch)
        running = _Top(len(batch), top)
        sums: dict[int, Tensor] = {}
        for layer in suite.layers:
            device = model.layer_device(layer)
            sums[layer] = _layer(suite, layer, ends, terms[layer], mask, running, device, falling)
        # Added up only now, so that a batch that ran out of memory half-way and is repeated counts once.
        for layer, part in sums.items():
            overall[layer] += part
        best.update({prompt: running.of(row) for row, prompt in enumerate(batch.prompt_ids)})
        if progress is not None:
            progress(len(best), len(items))

    for _ in model.over_batches(items, run, gradients=True):
        pass
    local = tuple(_feature_set(*best[item.prompt_id], method, item.prompt_id) for item in items)
    everything = torch.cat([overall[layer] for layer in suite.layers]) / len(items)
    if not bool(everything.any()):
        raise ModelError(no_signal(patch.id, allow_refusal_target=metric.allow_refusal_target))
    values, places = everything.topk(min(top, len(everything)))
    codes = torch.cat([_codes(layer, 0, len(overall[layer])) for layer in suite.layers])
    return DictionaryAttribution(local, _feature_set(values, codes[places], method, None))


def _terms(
    model: ChatModel, suite: Suite, batch: Batch, ends: Ends, metric: Metric, how: Estimator
) -> Mapping[int, list[Term]]:
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


def _layer(
    suite: Suite,
    layer: int,
    ends: Ends,
    terms: Sequence[Term],
    mask: Tensor,
    running: _Top,
    device: torch.device,
    falling: bool,
) -> Float[Tensor, " d_sae"]:
    """Sum over prompts of each feature's mean attribution; the running top-k of each prompt is brought up to date."""
    weight = (mask / mask.sum(-1, keepdim=True).clamp(min=1)).to(device)
    sums: list[Tensor] = []
    start = 0
    for block in _blocks(suite[layer]):
        block = block.to(device)
        size = len(block.w_dec)
        target = block.encode(ends.patched[layer])
        means = torch.zeros(len(mask), size, device=device)
        for origin, gradient in terms:
            along = gradient @ block.w_dec.T
            difference = target - block.encode(origin)
            if falling:
                difference = difference.clamp(max=0)
            means += torch.einsum("bpk,bpk,bp->bk", difference, along, weight)
        running.add(means.cpu(), _codes(layer, start, size))
        sums.append(means.cpu().double().sum(0))
        start += size
    return torch.cat(sums)


def _blocks(sae: Sae) -> Iterator[FeatureRows | DenseSae]:
    if sae.spec.activation == "topk":
        yield sae.dense()
    else:
        yield from sae.encoder_blocks(_BLOCK)


# A feature as one integer, so that a running top-k can carry it along.
_LAYER = 1 << 32


def _codes(layer: int, start: int, n: int) -> Tensor:
    return torch.arange(start, start + n) + layer * _LAYER


def _feature_set(values: Tensor, codes: Tensor, method: str, prompt: str | None) -> FeatureSet:
    features = tuple(FeatureId(int(code) // _LAYER, int(code) % _LAYER) for code in codes)
    return FeatureSet(
        features=features,
        scores=tuple(values.tolist()),
        scope="global" if prompt is None else "local",
        method=f"dictionary+{method}",
        prompt_id=prompt,
    )


class _Top:
    """Running top-k of each row over blocks of features."""

    def __init__(self, n_rows: int, top: int) -> None:
        self.top = top
        self.values = torch.empty(n_rows, 0)
        self.codes = torch.empty(n_rows, 0, dtype=torch.long)

    def add(self, values: Float[Tensor, "batch block"], codes: Tensor) -> None:
        everything = torch.cat([self.values, values], 1)
        names = torch.cat([self.codes, codes.expand(len(values), -1)], 1)
        self.values, places = everything.topk(min(self.top, everything.shape[1]), dim=1)
        self.codes = names.gather(1, places)

    def of(self, row: int) -> tuple[Tensor, Tensor]:
        return self.values[row], self.codes[row]
