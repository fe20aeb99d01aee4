"""Which features to keep: the pool, F*, and the baselines they are compared with.

All baselines see the same tokens (the scored ones), so no method gains or loses by how BOS or padding is treated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import InputError, ModelError
from demur.method.attribution import Attribution, Pool, ScoredTokens, by_layer, no_signal
from demur.model import Batch, ChatModel, TokenizedPrompt
from demur.saes import DenseSae, FeatureRows, Rows, Sae, Suite
from demur.types import FeatureId, FeatureSet

_BLOCK = 8192
"""Features encoded at a time."""

Reduce = Literal["max", "mean", "last", "rate"]
"""What is taken over a prompt's scored tokens: a feature's maximum, mean or last activation, or how often it fires."""
Score = Literal["mean", "total"]
Measure = Mapping[int, Float[Tensor, " d_sae"]]
"""Layer → one number for each feature of its dictionary."""


def cosine_pool(
    suite: Suite, direction: Float[Tensor, " d_model"], k0: int, layers: Sequence[int] | None = None
) -> Pool:
    """The `k0` features of each layer whose decoder rows have the highest signed cosine with `direction`.

    Decoders are streamed. Rows of zero norm count as cosine 0.

    Args:
        suite: the SAEs.
        direction: any norm.
        k0: features per layer (all, where a layer has fewer).
        layers: layers to take features from (default: every layer of the suite).
    """
    features: list[FeatureId] = []
    cosines: list[float] = []
    for layer in suite.layers if layers is None else layers:
        found = torch.cat([_cosines(rows, direction) for _, rows in suite[layer].decoder_blocks(_BLOCK)])
        values, places = found.topk(min(k0, len(found)))
        features += [FeatureId(layer, place) for place in places.tolist()]
        cosines += values.tolist()
    return Pool(features=tuple(features), cosines=tuple(cosines))


def pool_of(suite: Suite, direction: Float[Tensor, " d_model"], features: Sequence[FeatureId]) -> Pool:
    """Given features as a pool, with their cosines; only their rows are read."""
    cosines: dict[FeatureId, float] = {}
    for layer, indices in by_layer(features).items():
        values = _cosines(suite[layer].rows(indices).w_dec, direction).tolist()
        cosines |= {FeatureId(layer, index): value for index, value in zip(indices, values, strict=True)}
    return Pool(features=tuple(features), cosines=tuple(cosines[feature] for feature in features))


def _cosines(rows: Float[Tensor, "k d_model"], direction: Float[Tensor, " d_model"]) -> Float[Tensor, " k"]:
    rows = rows.float().cpu()
    return (rows @ (direction / direction.norm()).float().cpu()) / rows.norm(dim=-1).clamp(min=1e-12)


def feature_set(
    features: Iterable[FeatureId], scores: Iterable[float], method: str, prompt_id: str | None = None
) -> FeatureSet:
    """A set for one prompt, or a global one."""
    scope = "global" if prompt_id is None else "local"
    return FeatureSet(features=tuple(features), scores=tuple(scores), scope=scope, method=method, prompt_id=prompt_id)


def _best(
    features: Sequence[FeatureId], scores: Float[Tensor, " feature"], k: int, method: str, prompt_id: str | None = None
) -> FeatureSet:
    values, places = scores.topk(min(k, len(features)))
    return feature_set((features[place] for place in places.tolist()), values.tolist(), method, prompt_id)


def _scores(attribution: Attribution, score: Score) -> Float[Tensor, "prompt feature"]:
    if attribution.share_without_signal == 1.0:
        spec = attribution.spec
        raise ModelError(no_signal(spec.patch, allow_refusal_target=spec.allow_refusal_target))
    return attribution.means if score == "mean" else attribution.totals


def global_set(attribution: Attribution, k: int, *, score: Score = "mean") -> FeatureSet:
    """F*: the `k` features of highest attribution ("mean" over scored tokens, the paper's, or "total"), averaged over
    the prompts that carry signal.

    The method "paper" averages over all prompts, as the paper does: those without signal count as 0.

    Raises:
        ModelError: no prompt carries signal, so there is nothing to rank by; says what to do.
    """
    scores = _scores(attribution, score)
    if attribution.method != "paper":
        scores = scores[attribution.signal]
    return _best(attribution.features, scores.mean(0), k, f"pool+{attribution.method}")


def local_sets(attribution: Attribution, k: int, *, score: Score = "mean") -> tuple[FeatureSet, ...]:
    """For each prompt the `k` features of highest attribution, in the order of the attribution's rows; as `global_set`
    otherwise.
    """
    scored = zip(attribution.rows, _scores(attribution, score), strict=True)
    method = f"pool+{attribution.method}"
    return tuple(_best(attribution.features, scores, k, method, row.prompt_id) for row, scores in scored)


def cossim_set(suite: Suite, direction: Float[Tensor, " d_model"], k: int) -> FeatureSet:
    """CosSim baseline: the `k` features of highest signed cosine with the direction over all layers."""
    pool = cosine_pool(suite, direction, k)
    return _best(pool.features, torch.tensor(pool.cosines, dtype=torch.float64), k, "cossim")


def mean_activations(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    *,
    layers: Sequence[int] | None = None,
    reduce: Reduce = "mean",
    scoring: ScoredTokens | None = None,
) -> dict[int, Float[Tensor, " d_sae"]]:
    """Mean over prompts of each feature's mean, maximum or last activation over the scored tokens, by layer.

    Whole dictionaries are encoded, in blocks; nothing dense over positions is kept.

    Args:
        model: the chat model.
        suite: the SAEs.
        items: tokenized prompts.
        layers: layers to encode (default: every layer of the suite).
        reduce: what is taken over a prompt's scored tokens.
        scoring: which tokens these are.
    """
    chosen = suite.layers if layers is None else layers
    return _mean_over_prompts(model, items, chosen, lambda layer: dictionary_blocks(suite[layer]), reduce, scoring)


def firing_rates(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    *,
    layers: Sequence[int] | None = None,
    scoring: ScoredTokens | None = None,
) -> dict[int, Float[Tensor, " d_sae"]]:
    """Mean over prompts of the share of scored tokens on which each feature is active, by layer."""
    return mean_activations(model, suite, items, layers=layers, reduce="rate", scoring=scoring)


def mean_max_activations(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    features: Sequence[FeatureId],
    *,
    scoring: ScoredTokens | None = None,
) -> Float[Tensor, " feature"]:
    """Mean over prompts of each feature's maximum activation over the scored tokens, in the order of `features`; only
    their rows are read.
    """
    wanted = by_layer(features)
    rows = {layer: suite[layer].rows(indices).to(model.layer_device(layer)) for layer, indices in wanted.items()}
    means = _mean_over_prompts(model, items, tuple(rows), lambda layer: [rows[layer]], "max", scoring)
    return torch.stack([means[layer][wanted[layer].index(index)] for layer, index in features])


def dictionary_blocks(sae: Sae) -> Iterator[FeatureRows | DenseSae]:
    """A whole dictionary in blocks of features, or in one where a feature is active only against all others (TopK)."""
    if sae.spec.activation == "topk":
        yield sae.dense()
    else:
        yield from sae.encoder_blocks(_BLOCK)


def _over_tokens(
    values: Float[Tensor, "batch pos k"], scored: Bool[Tensor, "batch pos"], reduce: Reduce
) -> Float[Tensor, "batch k"]:
    if reduce == "last":
        return values[:, -1]
    mask = scored[..., None]
    if reduce == "max":
        # Activations are never negative, so a masked 0 cannot win a maximum that matters.
        return (values * mask).amax(1)
    counted = ((values > 0) & mask).float() if reduce == "rate" else values * mask
    return counted.sum(1) / scored.sum(1, keepdim=True).clamp(min=1)


def _mean_over_prompts(
    model: ChatModel,
    items: Sequence[TokenizedPrompt],
    layers: Sequence[int],
    blocks: Callable[[int], Iterable[Rows | DenseSae]],
    reduce: Reduce,
    scoring: ScoredTokens | None,
) -> dict[int, Float[Tensor, " k"]]:
    """Layer → mean over prompts (summed in float64, on the CPU) of activations over the scored tokens, for the features
    of the layer's `blocks`.
    """

    def read(layer: int, residual: Tensor, scored: Tensor) -> Tensor:
        encoded = (block.to(residual.device).encode(residual) for block in blocks(layer))
        return torch.cat([_over_tokens(values, scored, reduce).cpu().double().sum(0) for values in encoded])

    def run(batch: Batch) -> dict[int, Tensor]:
        with torch.inference_mode():
            with model.capture(layers) as captured:
                model.last_logits(batch)
            scored = (scoring or ScoredTokens()).mask(batch)
            return {layer: read(layer, captured[layer], scored.to(captured[layer].device)) for layer in layers}

    totals: dict[int, Tensor] = {}
    for _, part in model.over_batches(items, run):
        for layer, values in part.items():
            totals[layer] = totals[layer] + values if layer in totals else values
    return {layer: (total / len(items)).float() for layer, total in totals.items()}


def actdiff_set(
    model: ChatModel,
    suite: Suite,
    harmful: Sequence[TokenizedPrompt],
    harmless: Sequence[TokenizedPrompt],
    k: int,
    *,
    reduce: Reduce = "max",
    scoring: ScoredTokens | None = None,
) -> FeatureSet:
    """ActDiff baseline: the `k` features whose activation differs most between harmful and harmless prompts.

    Args:
        model: the chat model.
        suite: the SAEs.
        harmful, harmless: tokenized prompts.
        k: how many.
        reduce: activation of a prompt: its maximum, mean or last over the scored tokens.
        scoring: which tokens these are.
    """
    high, low = (mean_activations(model, suite, items, reduce=reduce, scoring=scoring) for items in (harmful, harmless))
    found: list[tuple[float, FeatureId]] = []
    for layer in high:
        values, places = (high[layer] - low[layer]).topk(min(k, len(high[layer])))
        found += [(v, FeatureId(layer, i)) for v, i in zip(values.tolist(), places.tolist(), strict=True)]
    best = sorted(found, key=lambda each: -each[0])[:k]
    return feature_set((feature for _, feature in best), (value for value, _ in best), f"actdiff-{reduce}")


def random_set(
    like: FeatureSet,
    matched: Measure | Sequence[Measure],
    *,
    exclude: Sequence[FeatureId] = (),
    neighbours: int = 8,
    seed: int = 0,
) -> FeatureSet:
    """Random features matched to `like` one by one: same layer, and among the `neighbours` nearest by some measures.

    One measure is compared by its value. Several, which have units of their own, are compared by rank within the layer
    (ties share their mean rank), and their differences add up.

    Args:
        like: the set to be matched.
        matched: what the features are matched by, each layer → value of every feature: firing rates, for example
            (`firing_rates`), and the size of what they add to the residual.
        exclude: features that may not be drawn (the pool); those of `like` never are.
        neighbours: each draw is uniform over this many unused features that are nearest.
        seed: of the draw.

    Raises:
        InputError: a layer has too few features left.
    """
    measures: Sequence[Measure] = [matched] if isinstance(matched, Mapping) else matched
    scales = {
        layer: [m[layer] if len(measures) == 1 else _ranks(m[layer]) for m in measures] for layer in like.by_layer()
    }
    generator = torch.Generator().manual_seed(seed)
    used = {*exclude, *like.features}
    drawn: list[FeatureId] = []
    for layer, index in like.features:
        distance = torch.stack([(scale - scale[index]).abs() for scale in scales[layer]]).sum(0)
        order = (FeatureId(layer, i) for i in distance.argsort(stable=True).tolist())
        free = list(islice((feature for feature in order if feature not in used), neighbours))
        if not free:
            raise InputError(
                f"layer {layer} has no features left to draw a random control from; lower k0 or k, or use wider SAEs"
            )
        feature = free[int(torch.randint(len(free), (), generator=generator))]
        used.add(feature)
        drawn.append(feature)
    return feature_set(drawn, [0.0] * len(drawn), f"random-{seed}")


def _ranks(values: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Rank of each value among all of them, from 0; equal values share the mean of their ranks."""
    ordered = values.sort().values
    first, past = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (first + past - 1).float() / 2
