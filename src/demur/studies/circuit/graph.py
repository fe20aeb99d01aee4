"""One prompt's graph in the format of attribution graphs, which Neuronpedia and circuit-tracer read.

A feature's number is the Cantor pair of its layer and index (`schema_version` 1). Weights are contributions with the
graph's other features held: activation times gradient, in the target's units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from demur import __version__
from demur.types import FeatureId

if TYPE_CHECKING:
    from demur.method.edges import GraphNode, PromptGraph


def cantor_pair(first: int, second: int) -> int:
    """One number for two that are not negative."""
    return (first + second) * (first + second + 1) // 2 + second


def node_id(node: GraphNode) -> str:
    """Unique in a graph: tokens begin with E, and logits have a layer that no feature has."""
    if node.kind == "token":
        return f"E_{node.token_id}_{node.position}"
    if node.feature is not None:
        return f"{node.layer}_{node.feature.index}_{node.position}"
    return f"{node.layer + 1}_{node.token_id}_{node.position}"


_DESCRIPTION = "Harm and refusal features of residual-stream SAEs; other paths are not in the graph."


def attribution_graph(
    graph: PromptGraph,
    *,
    prompt: str,
    tokens: Sequence[str],
    model: str,
    saes: str,
    groups: Mapping[str, Sequence[FeatureId]],
    decode: Callable[[int], str],
    thresholds: tuple[float, float],
) -> dict[str, Any]:
    """The graph as JSON data.

    Args:
        graph: of one prompt, pruned.
        prompt, tokens: the rendered prompt, whole and token by token.
        model, saes: names.
        groups: label → features: the supernodes.
        decode: text of a token.
        thresholds: shares of influence that pruning left, of nodes and of edges.
    """
    label = {feature: name for name, features in groups.items() for feature in features}
    ids = [node_id(node) for node in graph.nodes]
    before = _cumulative(graph)
    nodes = [_node(node, ids[n], label, decode) | {"influence": before[n]} for n, node in enumerate(graph.nodes)]
    links = [
        {"source": ids[source], "target": ids[target], "weight": float(graph.weights[target, source])}
        for target, source in zip(*graph.weights.nonzero(), strict=True)
    ]
    members = [
        [name, *(i for i, node in zip(ids, graph.nodes, strict=True) if node.feature in set(features))]
        for name, features in groups.items()
    ]
    return {
        "metadata": {
            "slug": _plain(f"refusal-{prompt[:40]}"),
            "scan": _plain(model),
            "transcoder_list": [_plain(saes)],
            "prompt_tokens": list(tokens),
            "prompt": prompt,
            "node_threshold": thresholds[0],
            "schema_version": 1,
            "info": {"description": _DESCRIPTION, "generator": {"name": "demur", "version": __version__}},
            "pruning_settings": {"node_threshold": thresholds[0], "edge_threshold": thresholds[1]},
        },
        "qParams": {
            "pinnedIds": [i for i, node in zip(ids, graph.nodes, strict=True) if node.kind != "token"],
            "supernodes": [each for each in members if len(each) > 1],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def _node(node: GraphNode, name: str, label: Mapping[FeatureId, str], decode: Callable[[int], str]) -> dict[str, Any]:
    known = {"node_id": name, "ctx_idx": node.position, "reverse_ctx_idx": 0}
    if node.kind == "token":
        return known | {
            "feature": node.position,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"E_{node.token_id}-{node.position}",
            "clerp": decode(node.token_id),
        }
    if node.feature is not None:
        return known | {
            "feature": cantor_pair(*node.feature),
            "layer": str(node.layer),
            "feature_type": "cross layer transcoder",
            "jsNodeId": f"{node.layer}_{node.feature.index}-0",
            "clerp": f"{label.get(node.feature, 'feature')} {node.feature}",
            "activation": node.value,
        }
    return known | {
        "feature": node.token_id,
        "layer": str(node.layer + 1),
        "feature_type": "logit",
        "jsNodeId": f"L_{node.token_id}-{node.position}",
        "clerp": f'Output "{decode(node.token_id)}" (p={node.value:.3f})',
        "token_prob": node.value,
        "is_target_logit": True,
    }


def _cumulative(graph: PromptGraph) -> list[float]:
    """Per node: the share of its kind's influence that nodes at least as influential hold. Readers prune by it."""
    found = [0.0] * len(graph.nodes)
    for kind in ("token", "feature", "logit"):
        places = [n for n, node in enumerate(graph.nodes) if node.kind == kind]
        total, so_far = sum(float(graph.influence[n]) for n in places) or 1.0, 0.0
        for n in sorted(places, key=lambda place: -float(graph.influence[place])):
            so_far += float(graph.influence[n])
            found[n] = so_far / total if kind != "logit" else 0.0
    return found


def _plain(name: str) -> str:
    """A name of the characters that readers take."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "model"
