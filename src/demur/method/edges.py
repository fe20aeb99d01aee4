"""What drives what: effects of upstream features on downstream ones, edges, and the graph of one prompt (section 4.2).

An edge's weight is what its source contributes to its target: the target's value less its value without the source.
It is estimated as activation times gradient along the decoder row, and measured by really taking the source out. With
`kept` paths it is the whole effect. With `stopped` paths every other feature of the graph in the layers between is held
at its clean value, so that only what goes past them counts, and weights along a path may be multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import InputError
from demur.method.activations import feature_activations, mean_within, over_regions
from demur.method.interventions import PerPrompt, ScaleFrom, bind
from demur.method.tokens import embedding_excess
from demur.model import SCORED_REGIONS, Batch, ChatModel, Items, Progress, Region, Sites, TokenizedPrompt, hooked
from demur.saes import Rows, Suite
from demur.types import FeatureId, by_layer

Paths = Literal["stopped", "kept"]
"""What becomes of paths through the graph's other features in the layers between."""
Since = Literal["start", "peak"]
"""Where suppression begins: at the prompt's first token, or at each feature's first peak."""

Table = Float[np.ndarray, "prompt source target"]


def post_means(model: ChatModel, suite: Suite, items: Items, features: Sequence[FeatureId]) -> np.ndarray:
    """Mean activation over each prompt's post-instruction tokens, shape (prompt, feature), under whatever interventions
    are open on the model."""
    values = feature_activations(model, suite, items, features)
    return over_regions(items, values, [Region.POST_INSTRUCTION], "mean").reshape(len(items), len(features))


def suppression(
    model: ChatModel,
    suite: Suite,
    items: Items,
    features: Sequence[FeatureId],
    factor: float,
    since: Since = "peak",
) -> PerPrompt:
    """Each feature scaled by `factor` from the token on at which it first has its maximum over the user's words and the
    template tokens after them, in the clean run; or from the prompt's start."""
    features = tuple(features)
    starts = [(0,) * len(features)] * len(items)
    if since == "peak":
        values = feature_activations(model, suite, items, features)
        inside = [torch.isin(torch.tensor(item.regions), torch.tensor(SCORED_REGIONS)) for item in items]
        starts = [tuple((v * m[:, None]).argmax(0).tolist()) for v, m in zip(values, inside, strict=True)]
    changes = {
        item.prompt_id: (ScaleFrom(features, factor, start, len(item)),)
        for item, start in zip(items, starts, strict=True)
    }
    return PerPrompt(changes, f"suppress-from-{since}")


def suppression_effect(
    model: ChatModel,
    suite: Suite,
    items: Items,
    upstream: Sequence[FeatureId],
    downstream: Sequence[FeatureId],
    *,
    factor: float = -3.0,
    since: Since = "peak",
) -> tuple[np.ndarray, np.ndarray]:
    """The downstream features' mean activation over the post-instruction tokens, shape (prompt, feature), in the clean
    run and with the upstream features suppressed (paper, section 4.2)."""
    change = suppression(model, suite, items, upstream, factor, since)
    before = post_means(model, suite, items, downstream)
    with model.intervene(bind(suite, change)):
        return before, post_means(model, suite, items, downstream)


@dataclass(frozen=True)
class _Nodes:
    """The features of a graph, in the order given, with their rows."""

    features: tuple[FeatureId, ...]
    rows: Mapping[int, Rows]
    places: tuple[int, ...]
    """Each feature's column in its layer."""
    reads: Sites
    """Where their dictionaries read that do not read the residual."""

    @classmethod
    def of(cls, model: ChatModel, suite: Suite, features: Sequence[FeatureId]) -> _Nodes:
        if len(set(features)) != len(features):
            raise InputError("a feature is in the graph twice; name each once")
        wanted = by_layer(features)
        rows = {layer: suite[layer].rows(wanted[layer]).to(model.layer_device(layer)) for layer in sorted(wanted)}
        places = tuple(wanted[layer].index(index) for layer, index in features)
        return cls(tuple(features), rows, places, {la: site for la, site in suite.reads.items() if la in rows})

    def column(self, n: int) -> tuple[int, int]:
        """Layer and column of feature `n`."""
        return self.features[n].layer, self.places[n]


class _Pass(NamedTuple):
    """One forward pass: what each layer's features read, and where gradients arrive that come from above the layer."""

    read: dict[int, Tensor]
    out: dict[int, Tensor]


@contextmanager
def _traced(model: ChatModel, nodes: _Nodes, paths: Paths) -> Iterator[_Pass]:
    """Record a pass with its gradients. With stopped paths each feature's contribution to what leaves its layer carries
    no gradient to what entered: the derivative of holding the feature at its value."""
    found = _Pass({}, {})

    def visit(layer: int, residual: Tensor) -> Tensor:
        x = residual if residual.requires_grad else residual.detach().requires_grad_()
        found.read[layer] = nodes.rows[layer].encode(seen.get(layer, x))
        if paths == "stopped":
            own = (found.read[layer] @ nodes.rows[layer].w_dec).to(x.dtype)
            x = x - own + own.detach()
        found.out[layer] = x
        return x

    visits = hooked(model.layers, {layer: partial(visit, layer) for layer in nodes.rows})
    with torch.enable_grad(), model.reading(nodes.reads) as seen, visits:
        yield found


def _post(batch: Batch) -> Bool[Tensor, "batch pos"]:
    return batch.within([Region.POST_INSTRUCTION])


def _scored(batch: Batch, values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Activations at scored tokens, 0 elsewhere: what an edge's source takes with it."""
    inside = batch.within(SCORED_REGIONS)
    return {layer: v.detach() * inside.to(v.device)[..., None] for layer, v in values.items()}


def estimate_edges(
    model: ChatModel,
    suite: Suite,
    items: Items,
    features: Sequence[FeatureId],
    *,
    paths: Paths = "kept",
    progress: Progress = None,
) -> Table:
    """Edge weights between features, in SAE units: activation times gradient, summed over the source's tokens (the
    user's words and the template's after them), of the target's mean over the post-instruction tokens. 0 unless the
    source is in an earlier layer than the target. One forward pass a batch, one backward pass a target."""
    nodes = _Nodes.of(model, suite, features)

    def run(batch: Batch) -> Float[Tensor, "batch source target"]:
        with _traced(model, nodes, paths) as found:
            model.last_logits(batch)
        own = _scored(batch, found.read)
        weights = torch.zeros(len(batch), len(features), len(features))
        post = _post(batch)
        for target in range(len(features)):
            layer, column = nodes.column(target)
            below = [each for each in nodes.rows if each < layer]
            if not below:
                continue
            value = mean_within(found.read[layer], post)[:, column].sum()
            outs = [found.out[each] for each in below]
            gradients = torch.autograd.grad(value, outs, retain_graph=True, materialize_grads=True)
            for each, gradient in zip(below, gradients, strict=True):
                along = (own[each] * (gradient.float() @ nodes.rows[each].w_dec.T)).sum(1).cpu()
                for source in (n for n, feature in enumerate(features) if feature.layer == each):
                    weights[:, source, target] = along[:, nodes.places[source]]
        return weights

    return _over(model, items, run, progress, gradients=True)


def intervene_edges(
    model: ChatModel,
    suite: Suite,
    items: Items,
    features: Sequence[FeatureId],
    *,
    paths: Paths = "kept",
    progress: Progress = None,
) -> Table:
    """The same weights, measured: each source is taken out of its layer's output (its clean activation times its
    decoder row), with stopped paths while the graph's features in later layers are held at their clean values, and each
    target is read before it is held. One forward pass a source."""
    nodes = _Nodes.of(model, suite, features)

    def run(batch: Batch) -> Float[Tensor, "batch source target"]:
        clean: dict[int, Tensor] = {}
        changed: dict[int, Tensor] = {}

        def read(into: dict[int, Tensor], layer: int, residual: Tensor) -> None:
            into[layer] = nodes.rows[layer].encode(seen.get(layer, residual))

        def edit(source: int, layer: int, residual: Tensor) -> Tensor | None:
            rows, (origin, column) = nodes.rows[layer], nodes.column(source)
            changed[layer] = rows.encode(seen.get(layer, residual))
            if layer == origin:
                return residual - (own[layer][..., column, None] * rows.w_dec[column]).to(residual.dtype)
            if layer > origin and paths == "stopped":
                return residual + ((clean[layer] - changed[layer]) @ rows.w_dec).to(residual.dtype)
            return None

        with torch.inference_mode(), model.reading(nodes.reads) as seen:
            with hooked(model.layers, {layer: partial(read, clean, layer) for layer in nodes.rows}):
                model.last_logits(batch)
            own, post = _scored(batch, clean), _post(batch)
            before = {layer: mean_within(values, post) for layer, values in clean.items()}
            weights = torch.zeros(len(batch), len(features), len(features))
            for source in range(len(features)):
                with hooked(model.layers, {layer: partial(edit, source, layer) for layer in nodes.rows}):
                    model.last_logits(batch)
                for target in range(len(features)):
                    layer, column = nodes.column(target)
                    if layer > features[source].layer:
                        after = mean_within(changed[layer], post)[:, column]
                        weights[:, source, target] = (before[layer][:, column] - after).cpu()
        return weights

    return _over(model, items, run, progress, gradients=False)


def _over(
    model: ChatModel, items: Items, run: Callable[[Batch], Tensor], progress: Progress, *, gradients: bool
) -> Table:
    """One table a prompt, in the order of `items`; in float32, as half precision rounds small effects away."""
    with model.in_float32():
        return torch.stack(model.each(items, run, progress, gradients=gradients)).double().numpy()


class GraphNode(NamedTuple):
    """A node of one prompt's graph: a token (`feature` None, `layer` −1), a feature at a token, or a logit (`layer` is
    the number of layers; `token_id` its token). `value` is its activation; of a logit, its token's probability."""

    kind: Literal["token", "feature", "logit"]
    layer: int
    position: int
    feature: FeatureId | None
    token_id: int
    value: float


@dataclass(frozen=True)
class PromptGraph:
    """The graph of one prompt: edge weights by target and source, in the order of `nodes`."""

    nodes: tuple[GraphNode, ...]
    weights: Float[np.ndarray, "node node"]
    influence: Float[np.ndarray, " node"]
    """Share of what reaches the logits that passes through each node."""


_MOST_NODES = 400
"""Feature nodes at most, those that move the residual most: each takes a backward pass."""


def prompt_graph(
    model: ChatModel, suite: Suite, item: TokenizedPrompt, features: Sequence[FeatureId], logits: Sequence[int]
) -> PromptGraph:
    """The graph of one prompt with stopped paths: its tokens (gradient times embedding less the mean embedding, which
    says nothing of the token), each of `features` at each token where it is active, and the logits of the tokens
    `logits` less the mean logit, weighted by probability."""
    nodes, batch = _Nodes.of(model, suite, features), model.batch([item])
    embedding: list[Tensor] = []

    def embed(output: Tensor) -> Tensor:
        embedding.append(output.detach().requires_grad_())
        return embedding[0]

    inputs: Any = model.hf.get_input_embeddings()
    with (
        model.in_float32(),
        torch.enable_grad(),
        hooked([inputs], {0: embed}),
        _traced(model, nodes, "stopped") as found,
    ):
        last = model.last_logits(batch)[0]
    excess = embedding_excess(model, batch, embedding[0].detach().float())
    own = {layer: values[0] for layer, values in _scored(batch, found.read).items()}
    active = _active(nodes, own)
    chances = last.detach().softmax(-1)
    tokens = [GraphNode("token", -1, n, None, token, 1.0) for n, token in enumerate(item.ids)]
    inner = [GraphNode("feature", features[n].layer, p, features[n], -1, value) for n, p, value in active]
    end, top = len(item) - 1, model.n_layers
    outer = [GraphNode("logit", top, end, None, token, float(chances[token])) for token in logits]
    values = [found.read[features[n].layer][0, p, nodes.places[n]] for n, p, _ in active]
    values += [last[token] - last.mean() for token in logits]
    layers = list(nodes.rows)
    weights = np.zeros((len(tokens) + len(values), len(tokens) + len(values)))
    for row, value in enumerate(values, start=len(tokens)):
        roots = [embedding[0], *(found.out[layer] for layer in layers)]
        gradients = torch.autograd.grad(value, roots, retain_graph=True, materialize_grads=True)
        weights[row, : len(tokens)] = (gradients[0].float() * excess)[0].sum(-1).cpu().numpy()
        limit = inner[row - len(tokens)].layer if row - len(tokens) < len(inner) else top
        along = {
            layer: gradient[0].float() @ nodes.rows[layer].w_dec.T
            for layer, gradient in zip(layers, gradients[1:], strict=True)
            if layer < limit
        }
        for column, (n, p, activation) in enumerate(active, start=len(tokens)):
            if features[n].layer in along:
                weights[row, column] = activation * float(along[features[n].layer][p, nodes.places[n]])
    found_nodes = (*tokens, *inner, *outer)
    return PromptGraph(found_nodes, weights, influence_of(weights, found_nodes))


def _active(nodes: _Nodes, own: Mapping[int, Tensor]) -> list[tuple[int, int, float]]:
    """Feature, position and activation where features are active, by layer and position."""
    found: list[tuple[float, int, int, float]] = []
    for n in range(len(nodes.features)):
        layer, column = nodes.column(n)
        values, norm = own[layer][:, column], float(nodes.rows[layer].w_dec[column].norm())
        found += [(float(values[p]) * norm, n, p, float(values[p])) for p in values.nonzero()[:, 0].tolist()]
    kept = sorted(found, reverse=True)[:_MOST_NODES]
    return sorted(((n, p, value) for _, n, p, value in kept), key=lambda each: (nodes.features[each[0]], each[1]))


def influence_of(weights: Float[np.ndarray, "node node"], nodes: Sequence[GraphNode]) -> Float[np.ndarray, " node"]:
    """Influence of each node on the logits, weighted by their probabilities: shares of each target's incoming absolute
    weight, multiplied along every path and added up. Shares are of what comes from features, and apart from these of
    what comes from tokens: the features of a graph are not all there are, so the two have no common whole."""
    tokens = np.array([node.kind == "token" for node in nodes])
    shares = _shares(weights * tokens) + _shares(weights * ~tokens)
    reached = np.array([node.value if node.kind == "logit" else 0.0 for node in nodes])
    reached, found = reached / reached.sum(), np.zeros(len(nodes))
    # Edges lead upwards only, so paths end after as many steps as there are nodes.
    while reached.any():
        found += reached
        reached = reached @ shares
    return found


def _shares(weights: Float[np.ndarray, "node node"]) -> Float[np.ndarray, "node node"]:
    total = np.abs(weights).sum(1, keepdims=True)
    return np.divide(np.abs(weights), total, out=np.zeros_like(weights), where=total > 0)


def pruned(graph: PromptGraph, nodes: float, edges: float) -> PromptGraph:
    """The smallest graph whose features, and whose tokens, hold the share `nodes` of the influence of all, and then
    whose edges hold the share `edges`; logits stay, and what no longer leads to a logit goes."""
    kept = np.array([node.kind == "logit" for node in graph.nodes])
    for kind in ("token", "feature"):
        kept |= _largest(np.where([node.kind == kind for node in graph.nodes], graph.influence, 0.0), nodes)
    weights = graph.weights * kept[:, None] * kept[None, :]
    tokens = np.array([node.kind == "token" for node in graph.nodes])
    scores = influence_of(weights, graph.nodes)[:, None] * (_shares(weights * tokens) + _shares(weights * ~tokens))
    weights = weights * _largest(scores.ravel(), edges).reshape(weights.shape)
    influence = influence_of(weights, graph.nodes)
    used = np.flatnonzero([node.kind == "logit" or influence[n] > 0 for n, node in enumerate(graph.nodes)])
    return PromptGraph(tuple(graph.nodes[n] for n in used), weights[np.ix_(used, used)], influence[used])


def _largest(scores: Float[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """The fewest scores that add up to a share of all; none of those that are 0."""
    order = np.argsort(-scores, kind="stable")
    before = np.cumsum(scores[order]) - scores[order]
    kept = np.zeros(len(scores), dtype=bool)
    kept[order[before < share * scores.sum()]] = True
    return kept & (scores > 0)
