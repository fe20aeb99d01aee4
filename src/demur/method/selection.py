"""Which features to keep: the pool, F*, and the baselines they are compared with.

All baselines see the same tokens (the scored ones), so no method gains or loses by how BOS or padding is treated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import InputError, ModelError
from demur.method.attribution import Attribution, ScoredTokens, no_signal
from demur.model import Batch, ChatModel, TokenizedPrompt
from demur.saes import Suite
from demur.types import FeatureField, FeatureId, FeatureSet, Value

_BLOCK = 8192

Reduce = Literal["max", "mean", "last"]
Score = Literal["mean", "total"]
Measure = Mapping[int, Float[Tensor, " d_sae"]]
"""Layer → one number for each feature of its dictionary."""


class Pool(Value):
    """`F0`: per layer the features of highest signed cosine with the refusal direction, best first (paper, section
    3)."""

    features: tuple[FeatureField, ...]
    cosines: tuple[float, ...]

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer → indices, best first."""
        layers: dict[int, list[int]] = {}
        for layer, index in self.features:
            layers.setdefault(layer, []).append(index)
        return {layer: tuple(indices) for layer, indices in layers.items()}

    def cosine(self, feature: FeatureId) -> float:
        """Cosine of a feature of the pool with the direction."""
        return self.cosines[self.features.index(feature)]


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
    unit = (direction / direction.norm()).float().cpu()
    features: list[FeatureId] = []
    cosines: list[float] = []
    for layer in suite.layers if layers is None else layers:
        found: list[Tensor] = []
        for _, rows in suite[layer].decoder_blocks(_BLOCK):
            rows = rows.cpu()
            found.append((rows @ unit) / rows.norm(dim=-1).clamp(min=1e-12))
        values, places = torch.cat(found).topk(min(k0, sum(map(len, found))))
        features += [FeatureId(layer, int(place)) for place in places]
        cosines += values.tolist()
    return Pool(features=tuple(features), cosines=tuple(cosines))


def pool_of(suite: Suite, direction: Float[Tensor, " d_model"], features: Sequence[FeatureId]) -> Pool:
    """Given features as a pool, with their cosines; only their rows are read."""
    unit = (direction / direction.norm()).float().cpu()
    cosines: dict[FeatureId, float] = {}
    for layer in sorted({layer for layer, _ in features}):
        mine = [feature for feature in features if feature[0] == layer]
        rows = suite[layer].rows([index for _, index in mine]).w_dec.float().cpu()
        values = (rows @ unit) / rows.norm(dim=-1).clamp(min=1e-12)
        cosines |= dict(zip(mine, values.tolist(), strict=True))
    return Pool(features=tuple(features), cosines=tuple(cosines[feature] for feature in features))


def _scores(attribution: Attribution, score: Score) -> Float[Tensor, "prompt feature"]:
    if attribution.share_without_signal == 1.0:
        spec = attribution.spec
        raise ModelError(no_signal(spec.patch, allow_refusal_target=spec.allow_refusal_target))
    return attribution.means if score == "mean" else attribution.totals


def _best(features: Sequence[FeatureId], scores: Tensor, k: int) -> tuple[tuple[FeatureId, ...], tuple[float, ...]]:
    values, places = scores.topk(min(k, len(features)))
    return tuple(features[int(place)] for place in places), tuple(values.tolist())


def global_set(attribution: Attribution, k: int, *, score: Score = "mean") -> FeatureSet:
    """F*: the `k` features of highest attribution, averaged over the prompts that carry signal.

    The method "paper" averages over all prompts, as the paper does: those without signal count as 0.

    Args:
        attribution: of the pool.
        k: how many.
        score: "mean" over scored tokens (the paper's) or "total".

    Raises:
        ModelError: no prompt carries signal, so there is nothing to rank by; says what to do.
    """
    scores = _scores(attribution, score)
    if attribution.method != "paper":
        scores = scores[attribution.signal]
    features, values = _best(attribution.features, scores.mean(0), k)
    return FeatureSet(features=features, scores=values, scope="global", method=f"pool+{attribution.method}")


def local_sets(attribution: Attribution, k: int, *, score: Score = "mean") -> tuple[FeatureSet, ...]:
    """For each prompt the `k` features of highest attribution, in the order of the attribution's rows.

    Args:
        attribution: of the pool.
        k: how many for each prompt.
        score: "mean" over scored tokens (the paper's) or "total".

    Raises:
        ModelError: no prompt carries signal, so there is nothing to rank by; says what to do.
    """
    sets: list[FeatureSet] = []
    for row, scores in zip(attribution.rows, _scores(attribution, score), strict=True):
        features, values = _best(attribution.features, scores, k)
        sets.append(
            FeatureSet(
                features=features,
                scores=values,
                scope="local",
                method=f"pool+{attribution.method}",
                prompt_id=row.prompt_id,
            )
        )
    return tuple(sets)


def cossim_set(suite: Suite, direction: Float[Tensor, " d_model"], k: int) -> FeatureSet:
    """CosSim baseline: the `k` features of highest signed cosine with the direction over all layers."""
    pool = cosine_pool(suite, direction, k)
    features, scores = _best(pool.features, torch.tensor(pool.cosines, dtype=torch.float64), k)
    return FeatureSet(features=features, scores=scores, scope="global", method="cossim")


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
        reduce: what is taken over a prompt's scored tokens: "mean", "max" or "last".
        scoring: which tokens these are.
    """

    def over_tokens(values: Float[Tensor, "batch pos k"], mask: Tensor) -> Float[Tensor, "batch k"]:
        if reduce == "last":
            return values[:, -1]
        if reduce == "max":
            return _maximum(values, mask)
        return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    return _mean_over_dictionaries(model, suite, items, layers, scoring, over_tokens)


def firing_rates(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    *,
    layers: Sequence[int] | None = None,
    scoring: ScoredTokens | None = None,
) -> dict[int, Float[Tensor, " d_sae"]]:
    """Mean over prompts of the share of scored tokens on which each feature is active, by layer."""

    def over_tokens(values: Float[Tensor, "batch pos k"], mask: Tensor) -> Float[Tensor, "batch k"]:
        return ((values > 0) & mask[..., None]).float().sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    return _mean_over_dictionaries(model, suite, items, layers, scoring, over_tokens)


def mean_max_activations(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    features: Sequence[FeatureId],
    *,
    scoring: ScoredTokens | None = None,
) -> Float[Tensor, " feature"]:
    """Mean over prompts of each feature's maximum activation over the scored tokens; only these rows are read.

    Args:
        model: the chat model.
        suite: the SAEs.
        items: tokenized prompts.
        features: which; the result is in their order.
        scoring: tokens over which the maximum is taken.
    """
    wanted: dict[int, list[int]] = {}
    for layer, index in features:
        wanted.setdefault(layer, []).append(index)
    rows = {layer: suite[layer].rows(indices).to(model.layer_device(layer)) for layer, indices in wanted.items()}

    def read(layer: int, residual: Tensor, mask: Tensor) -> Tensor:
        return _maximum(rows[layer].encode(residual), mask).cpu().double().sum(0)

    means = _mean_over_prompts(model, items, tuple(rows), scoring, read)
    return torch.stack([means[layer][wanted[layer].index(index)] for layer, index in features])


def _maximum(values: Float[Tensor, "batch pos k"], mask: Tensor) -> Float[Tensor, "batch k"]:
    # Activations are never negative, so a masked 0 cannot win a maximum that matters.
    return (values * mask[..., None]).amax(1)


def _mean_over_prompts(
    model: ChatModel,
    items: Sequence[TokenizedPrompt],
    layers: Sequence[int],
    scoring: ScoredTokens | None,
    read: Callable[[int, Tensor, Tensor], Tensor],
) -> dict[int, Float[Tensor, " k"]]:
    """Layer → mean over prompts of what `read(layer, residual, scored tokens)` sums over a batch (float64, on the
    CPU)."""
    scoring = scoring or ScoredTokens()
    totals: dict[int, Tensor] = {}

    def run(batch: Batch) -> dict[int, Tensor]:
        with torch.inference_mode():
            with model.capture(layers) as captured:
                model.last_logits(batch)
            mask = scoring.mask(batch)
            return {layer: read(layer, captured[layer], mask.to(captured[layer].device)) for layer in layers}

    for _, part in model.over_batches(items, run):
        for layer, values in part.items():
            totals[layer] = totals[layer] + values if layer in totals else values
    return {layer: (total / len(items)).float() for layer, total in totals.items()}


def _mean_over_dictionaries(
    model: ChatModel,
    suite: Suite,
    items: Sequence[TokenizedPrompt],
    layers: Sequence[int] | None,
    scoring: ScoredTokens | None,
    over_tokens: Callable[[Tensor, Tensor], Tensor],
) -> dict[int, Float[Tensor, " d_sae"]]:
    def read(layer: int, residual: Tensor, mask: Tensor) -> Tensor:
        return _encode_all(suite, layer, residual, mask, over_tokens)

    return _mean_over_prompts(model, items, tuple(suite.layers if layers is None else layers), scoring, read)


def _encode_all(
    suite: Suite, layer: int, residual: Tensor, mask: Tensor, over_tokens: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " d_sae"]:
    """Sum over prompts of the reduced activations of a whole dictionary."""
    sae = suite[layer]
    if sae.spec.activation == "topk":
        # A TopK feature is active only against all others, so the dictionary cannot be encoded in blocks.
        values = sae.dense().to(residual.device).encode(residual)
        return over_tokens(values, mask).cpu().double().sum(0)
    parts = [
        over_tokens(block.to(residual.device).encode(residual), mask).cpu().double().sum(0)
        for block in sae.encoder_blocks(_BLOCK)
    ]
    return torch.cat(parts)


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
    high = mean_activations(model, suite, harmful, reduce=reduce, scoring=scoring)
    low = mean_activations(model, suite, harmless, reduce=reduce, scoring=scoring)
    found: list[tuple[float, FeatureId]] = []
    for layer in high:
        values, places = (high[layer] - low[layer]).topk(min(k, len(high[layer])))
        found += [(v, FeatureId(layer, i)) for v, i in zip(values.tolist(), places.tolist(), strict=True)]
    best = sorted(found, key=lambda each: -each[0])[:k]
    return FeatureSet(
        features=tuple(feature for _, feature in best),
        scores=tuple(value for value, _ in best),
        scope="global",
        method=f"actdiff-{reduce}",
    )


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
    return FeatureSet(features=tuple(drawn), scores=(0.0,) * len(drawn), scope="global", method=f"random-{seed}")


def _ranks(values: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Rank of each value among all of them, from 0; equal values share the mean of their ranks."""
    ordered = values.sort().values
    first, past = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (first + past - 1).float() / 2
