"""Which features to keep: the pool, F*, and the baselines they are compared with.

All baselines see the same tokens (the scored ones), so no method gains or loses by how BOS or padding is treated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.errors import InputError, ModelError
from demur.method.activations import BLOCK, Kept, Reduce, by_prompt, chunks, dictionary_means, filled, placed
from demur.method.attribution import SCORED, Attribution, Pool, ScoredTokens, no_signal
from demur.method.interventions import Compiled
from demur.method.path import Ends, Estimator, Method, Metric, estimator, run_ends, run_path
from demur.model import Batch, ChatModel, Items, Progress
from demur.saes import Features, Suite
from demur.types import FeatureId, FeatureSet, by_layer

Score = Literal["mean", "total"]
Measure = Mapping[int, Float[Tensor, " d_sae"]]
"""Layer → one number for each feature of its dictionary."""


def cosine_pool(
    suite: Suite, direction: Float[Tensor, " d_model"], k0: int, layers: Sequence[int] | None = None
) -> Pool:
    """The `k0` features of each layer whose decoder rows have the highest signed cosine with `direction`, of any norm.
    Decoders are streamed. Rows of zero norm count as cosine 0."""
    features: list[FeatureId] = []
    cosines: list[float] = []
    for layer in suite.layers if layers is None else layers:
        found = torch.cat([_cosines(rows, direction) for _, rows in suite[layer].decoder_blocks(BLOCK)])
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
    the prompts that carry signal; with the method "paper" over all, as the paper does. Raises ModelError: no prompt
    carries signal, so there is nothing to rank by; says what to do."""
    scores = _scores(attribution, score)
    if attribution.method != "paper":
        scores = scores[attribution.signal]
    return _best(attribution.features, scores.mean(0), k, f"pool+{attribution.method}")


def local_sets(attribution: Attribution, k: int, *, score: Score = "mean") -> tuple[FeatureSet, ...]:
    """For each prompt, in the attribution's order, the `k` features of highest attribution; else as `global_set`."""
    scored = zip(attribution.rows, _scores(attribution, score), strict=True)
    method = f"pool+{attribution.method}"
    return tuple(_best(attribution.features, scores, k, method, row.prompt_id) for row, scores in scored)


def cossim_set(suite: Suite, direction: Float[Tensor, " d_model"], k: int) -> FeatureSet:
    """CosSim baseline: the `k` features of highest signed cosine with the direction over all layers."""
    pool = cosine_pool(suite, direction, k)
    return _best(pool.features, torch.tensor(pool.cosines, dtype=torch.float64), k, "cossim")


def actdiff_set(
    model: ChatModel,
    suite: Suite,
    harmful: Items,
    harmless: Items,
    k: int,
    *,
    reduce: Reduce = "max",
    scoring: ScoredTokens = SCORED,
) -> FeatureSet:
    """ActDiff baseline: the `k` features whose activation (the maximum, mean or last over a prompt's scored tokens)
    differs most between harmful and harmless prompts."""
    means = dictionary_means(model, suite, [harmful, harmless], [reduce], scoring=scoring)
    high, low = (each[reduce] for each in means)
    found: list[tuple[float, FeatureId]] = []
    for layer in high:
        values, places = (high[layer] - low[layer]).topk(min(k, len(high[layer])))
        found += [(v, FeatureId(layer, i)) for v, i in zip(values.tolist(), places.tolist(), strict=True)]
    best = sorted(found, key=lambda each: -each[0])[:k]
    return feature_set((feature for _, feature in best), (value for value, _ in best), f"actdiff-{reduce}")


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
    to_zero: bool = False,
    progress: Progress = None,
) -> DictionaryAttribution:
    """Attribute all features and keep the best `top`, for each prompt and overall.

    A feature may score high because it *rises* in the patched run; scaling it down then does the opposite of patching.
    With `falling`, only tokens at which the feature is lower in the patched run count; with `to_zero`, what counts is
    not the patched run's activation but 0: the effect of taking the feature out, one at a time.

    Residuals and gradients at the scored tokens (with `ig`, those of every step) are kept, up to half a gibibyte; then
    each dictionary is read once for all of them, in blocks; a TopK layer is taken whole, in `8 · d_model · d_sae`
    bytes. Other arguments are as for `attribute_batches`. Raises InputError: unknown method ("exact" cannot be afforded
    here); ModelError: every score is 0 on every prompt, so there is nothing to rank by; says what to do.
    """
    how = estimator(method, steps)
    codes = {layer: torch.arange(suite[layer].spec.d_sae) + layer * _LAYER for layer in suite.layers}

    def run(batch: Batch) -> list[tuple[str, Kept]]:
        ends = run_ends(model, batch, patch, metric, how, suite.reads)
        mask = scoring.mask(batch)
        terms = _terms(model, suite, batch, ends, metric, how, mask)
        for layer, each in terms.items():
            # As `patched_values`: what a transcoder reads comes before the patch of its layer.
            if not to_zero and layer not in suite.reads:
                each.append(ends.patched[layer][mask.to(ends.patched[layer].device)])
        return by_prompt(batch, terms, mask)

    best: dict[str, Best] = {}
    sums = {layer: torch.zeros(suite[layer].spec.d_sae, dtype=torch.float64) for layer in suite.layers}
    for some in filled(each for _, part in model.over_batches(items, run, gradients=True) for each in part):
        found: Best = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.long)
        for layer in suite.layers:
            for place, block in placed(suite[layer].blocks(BLOCK), model.layer_device(layer)):
                parts = chunks((kept[layer] for _, kept in some), len(block.b_enc))
                scores = torch.cat([_block_scores(block, each, counts, falling) for each, counts in parts])
                found = _running_best(found, scores, codes[layer][place], top)
                sums[layer][place] += scores.double().sum(0)
        best |= {prompt: values for (prompt, _), values in zip(some, zip(*found, strict=True), strict=True)}
        if progress is not None:
            progress(len(best), len(items))
    overall = torch.cat(list(sums.values()))
    if not bool(overall.any()):
        raise ModelError(no_signal(patch.id, allow_refusal_target=metric.allow_refusal_target))
    values, places = (overall / len(items)).topk(min(top, len(overall)))
    return DictionaryAttribution(
        local=tuple(_feature_set(best[item.prompt_id], method, item.prompt_id) for item in items),
        overall=_feature_set((values, torch.cat(list(codes.values()))[places]), method, None),
    )


def _terms(
    model: ChatModel,
    suite: Suite,
    batch: Batch,
    ends: Ends,
    metric: Metric,
    how: Estimator,
    mask: Bool[Tensor, "batch pos"],
) -> dict[int, list[Float[Tensor, "tokens d_model"]]]:
    """By layer, at the scored tokens: where the difference begins, gradient (times 1/steps), and so on for each step
    that has a beginning of its own."""
    terms: dict[int, list[Tensor]] = {layer: [] for layer in suite.layers}
    share = 1.0 / len(how.alphas)

    def visit(layer: int, _entered: Tensor, read: Tensor, gradient: Tensor) -> None:
        if layer not in terms:
            return
        scored = mask.to(gradient.device)
        if how.path:
            for x, g in zip(read, gradient, strict=True):
                terms[layer] += [x[scored], g[scored] * share]
        elif terms[layer]:
            terms[layer][1].add_(gradient.sum(0)[scored], alpha=share)
        else:
            terms[layer] += [ends.read[layer].float()[scored], gradient.sum(0)[scored] * share]

    run_path(model, batch, ends, metric, how, visit)
    return terms


def _block_scores(
    block: Features, terms: Sequence[Float[Tensor, "tokens d_model"]], counts: Sequence[int], falling: bool
) -> Float[Tensor, "prompt block"]:
    """Each feature's mean attribution over each prompt's tokens, on the CPU: of `_terms`, and last, if its features are
    not moved to 0, of the patched run."""
    target = block.encode(terms[-1]) if len(terms) % 2 else 0.0

    def score(origin: Tensor, gradient: Tensor) -> Tensor:
        difference = target - block.encode(origin)
        return (difference.clamp(max=0) if falling else difference) * (gradient @ block.w_dec.T)

    total = functools.reduce(torch.add, map(score, terms[0::2], terms[1::2]))
    return torch.stack([each.sum(0) / max(1, len(each)) for each in total.split(list(counts))]).cpu()


def _running_best(found: Best, scores: Float[Tensor, "batch block"], codes: Int[Tensor, " block"], top: int) -> Best:
    everything = torch.cat([found[0], scores], 1)
    names = torch.cat([found[1], codes.expand(len(scores), -1)], 1)
    values, places = everything.topk(min(top, everything.shape[1]), dim=1)
    return values, names.gather(1, places)


def _feature_set(best: Best, method: Method, prompt: str | None) -> FeatureSet:
    features = [FeatureId(*divmod(code, _LAYER)) for code in best[1].tolist()]
    return feature_set(features, best[0].tolist(), f"dictionary+{method}", prompt)


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
    (ties share their mean rank), and their differences add up. Raises InputError: a layer has too few features left.

    Args:
        like: the set to be matched.
        matched: measures, such as firing rates and the size of what features add to the residual.
        exclude: features that may not be drawn (the pool); those of `like` never are.
        neighbours: each draw is uniform over this many unused features that are nearest.
        seed: of the draw.
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
