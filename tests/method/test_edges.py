"""Edges between features: against the planted model's built-in weights, hand-computed graphs, and the golden case."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.method.activations import feature_activations
from demur.method.edges import (
    GraphNode,
    PromptGraph,
    estimate_edges,
    influence_of,
    intervene_edges,
    prompt_graph,
    pruned,
    suppression,
    suppression_effect,
)
from demur.method.interventions import PerPrompt, ScaleFeatures, ScaleFrom, bind
from demur.model import Budgets, ChatModel, Region, hooked, load_model
from demur.saes import Suite, load_suite
from demur.stats import spearman
from demur.testing import Planted, planted, tiny_model, tiny_suite
from demur.types import FeatureId, PromptSet


@dataclass(frozen=True)
class Known:
    made: Planted
    model: ChatModel
    prompts: PromptSet

    @property
    def items(self) -> Any:
        return self.model.tokenize(self.prompts)

    def named(self, axis: str) -> dict[int, FeatureId]:
        """Layer → the feature that reads an axis of the circuit."""
        found: dict[int, FeatureId] = {}
        for layer in self.made.suite.layers:
            reads = self.made.suite[layer].dense().w_dec @ self.made.axes[axis]
            if reads.max() > 0.99:
                found[layer] = FeatureId(layer, int(reads.argmax()))
        return found


@pytest.fixture(scope="module")
def known() -> Known:
    made = planted()
    kind = made.harmful.prompts[0].category
    model = ChatModel(made.model, made.tokenizer, name="planted")
    same = [p for p in made.harmful.prompts if p.category == kind]
    return Known(made, model, PromptSet(name="one category", prompts=tuple(same)))


HARM = [f"harm{n}" for n in range(8)]


def built_in(known: Known) -> dict[tuple[FeatureId, FeatureId], float]:
    """Edges between neighbouring layers as docs/explanation/planted.md states them, for a harmful prompt of three
    content words: what the source contributes to the target's mean over template tokens. The harm features of one
    category are 1.0 at their words; template tokens receive 2 of each, and `refuse` is clip(h/2 − ½), `aligned`
    1½ · (h/2 − ¼)."""
    edges: dict[tuple[FeatureId, FeatureId], float] = {}
    names = {name: known.named(name) for name in (*HARM, "refuse", "aligned", "aftermath", "backup")}
    names |= {name: known.named(name) for name in ("general0", "general1")}
    category = {f.index for f in known.made.harm_of[str(known.prompts.prompts[0].category)]}
    for name in HARM:
        on = float(names[name][0].index in category)
        edges[names[name][0], names["refuse"][1]] = 1.0 * on
        edges[names[name][0], names["aligned"][1]] = 1.5 * on
        for other in HARM:
            edges[names[name][0], names[other][1]] = 2.0 * on * (other == name)
        for general in ("general0", "general1"):
            edges[names[name][0], names[general][1]] = 0.0
    for layer in (1, 2):
        # Nothing but the residual stream carries them on.
        for name, value in (("refuse", 1.5), ("aligned", 2.625)):
            edges[names[name][layer], names[name][layer + 1]] = value
            for other in ("refuse", "aligned"):
                if other != name:
                    edges[names[name][layer], names[other][layer + 1]] = 0.0
    edges[names["refuse"][1], names["aftermath"][2]] = 1.875
    edges[names["aligned"][1], names["aftermath"][2]] = 0.0
    edges[names["aftermath"][2], names["aftermath"][3]] = 1.875
    edges[names["aftermath"][2], names["refuse"][3]] = 0.0
    edges[names["aligned"][2], names["backup"][3]] = 0.0
    # With intermediate features held, the harm features reach nothing beyond layer 1.
    for name in HARM:
        edges[names[name][0], names["refuse"][2]] = edges[names[name][0], names["refuse"][3]] = 0.0
    edges[names["refuse"][1], names["refuse"][3]] = 0.0
    return edges


@pytest.mark.parametrize("measure", [estimate_edges, intervene_edges])
def test_edges_are_the_built_in_weights(known: Known, measure: Any) -> None:
    truth = built_in(known)
    features = sorted({each for pair in truth for each in pair})
    table = measure(known.model, known.made.suite, known.items, features, paths="stopped")
    assert table.shape == (len(known.prompts), len(features), len(features))
    found = np.array([table[:, features.index(s), features.index(t)].mean() for s, t in truth])
    expected = np.array(list(truth.values()))
    # Equal weights are ties, and so is what rounding leaves of none.
    assert spearman(found.round(2), expected) >= 0.95
    np.testing.assert_allclose(found[expected == 0], 0.0, atol=1e-3)


def test_kept_paths_add_up_what_passes_through_other_features(known: Known) -> None:
    refuse, harm = known.named("refuse"), known.named(HARM[0])
    features = [harm[0], refuse[1], refuse[2], refuse[3]]
    kept = estimate_edges(known.model, known.made.suite, known.items, features, paths="kept")
    stopped = estimate_edges(known.model, known.made.suite, known.items, features, paths="stopped")
    np.testing.assert_allclose(kept[:, 0, 3], kept[:, 0, 1], rtol=1e-4)
    np.testing.assert_allclose(kept[:, 1, 3], kept[:, 1, 2], rtol=1e-4)
    np.testing.assert_allclose(stopped[:, 0, 1], kept[:, 0, 1], rtol=1e-4)
    np.testing.assert_allclose(stopped[:, 0, 2:], 0.0, atol=1e-4)
    # No edge leads down, sideways or to itself.
    assert not np.tril(kept).any()


def test_a_measured_edge_is_the_change_under_a_real_intervention(known: Known) -> None:
    source, target = known.named("refuse")[1], known.named("backup")[3]
    table = intervene_edges(known.model, known.made.suite, known.items, [source, target], paths="kept")

    def mean(item: Any) -> float:
        (values,) = feature_activations(known.model, known.made.suite, [item], [target])
        return float(values[np.array(item.regions) == Region.POST_INSTRUCTION].mean())

    for n, item in enumerate(known.items):
        before = mean(item)
        with known.model.intervene(bind(known.made.suite, ScaleFeatures((source,), 0.0))):
            assert table[n, 0, 1] == pytest.approx(before - mean(item), abs=1e-3)
    # The backup wakes: `refuse` holds it down. A gradient where it is silent does not see that.
    assert table[:, 0, 1].max() < -1
    assert not estimate_edges(known.model, known.made.suite, known.items, [source, target]).any()


def test_edges_do_not_depend_on_batches(known: Known) -> None:
    features = [known.named(HARM[0])[0], known.named("refuse")[1]]
    items = known.model.tokenize([*known.prompts.prompts[:3], known.made.harmless.prompts[0]])
    whole = estimate_edges(known.model, known.made.suite, items, features)
    for n, item in enumerate(items):
        np.testing.assert_allclose(
            estimate_edges(known.model, known.made.suite, [item], features)[0], whole[n], atol=1e-5
        )


@pytest.mark.parametrize("measure", [estimate_edges, intervene_edges])
def test_progress_is_told_batch_by_batch_and_weights_stay_with_their_prompts(known: Known, measure: Any) -> None:
    """Prompts are batched by length: a harmless one between harmful ones keeps its place."""
    features = [known.named(HARM[n])[0] for n in range(8)] + [known.named("refuse")[1]]
    harmful, harmless = known.prompts.prompts[:2], known.made.harmless.prompts[:1]
    items = known.model.tokenize([harmful[0], *harmless, harmful[1]])
    told: list[tuple[int, int]] = []
    before, known.model.budgets = known.model.budgets, Budgets(1, 1)
    try:
        table = measure(known.model, known.made.suite, items, features, progress=lambda *each: told.append(each))
    finally:
        known.model.budgets = before
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (np.abs(table).max((1, 2)) > 0.5).tolist() == [True, False, True]


def test_suppression_begins_at_the_first_peak(known: Known) -> None:
    feature = known.named(HARM[0])[0]
    (item,) = known.model.tokenize(known.prompts.prompts[:1])
    (values,) = feature_activations(known.model, known.made.suite, [item], [feature])
    (change,) = suppression(known.model, known.made.suite, [item], [feature], 0.0).by_prompt[item.prompt_id]
    assert isinstance(change, ScaleFrom)
    assert change.starts == (int(values[:, 0].argmax()),)
    (whole,) = suppression(known.model, known.made.suite, [item], [feature], 0.0, "start").by_prompt[item.prompt_id]
    assert isinstance(whole, ScaleFrom)
    assert whole.starts == (0,)
    before = ScaleFrom((feature,), 0.0, (change.starts[0] + 1,), len(item))
    for start, left in ((change, 0.0), (before, float(values.max()))):
        with known.model.intervene(bind(known.made.suite, PerPrompt({item.prompt_id: (start,)}))):
            (found,) = feature_activations(known.model, known.made.suite, [item], [feature])
        assert float(found.max()) == pytest.approx(left, abs=1e-4)


def test_scaling_from_the_start_is_scaling(known: Known) -> None:
    features = tuple(known.named(HARM[n])[0] for n in range(8))
    down = [known.named("refuse")[n] for n in (1, 2, 3)]
    before, after = suppression_effect(
        known.model, known.made.suite, known.items, features, down, factor=0.5, since="start"
    )
    with known.model.intervene(bind(known.made.suite, ScaleFeatures(features, 0.5))):
        _, same = suppression_effect(known.model, known.made.suite, known.items, features, down, factor=1.0)
    np.testing.assert_allclose(after, same, atol=1e-5)
    # h falls from 4 to 2: `refuse` from 1.5 to 0.5.
    assert (before[:, 0] - after[:, 0]).mean() == pytest.approx(1.0, abs=0.1)


def test_features_are_reversed_threefold_from_their_peak_and_paths_kept_unless_said(known: Known) -> None:
    up, down = [known.named(HARM[0])[0]], [known.named("refuse")[1]]
    items = known.items[:2]
    ways: list[dict[str, Any]] = [{}, {"factor": -3.0, "since": "peak"}, {"factor": -3.0, "since": "start"}]
    found, asked, other = (suppression_effect(known.model, known.made.suite, items, up, down, **how) for how in ways)
    np.testing.assert_array_equal(found, asked)
    assert found[0].shape == other[1].shape == (2, 1)
    assert (
        suppression(known.model, known.made.suite, items, up, -3.0).id
        == suppression(known.model, known.made.suite, items, up, -3.0, "peak").id
    )
    for measure in (estimate_edges, intervene_edges):
        features = [known.named(HARM[0])[0], known.named("refuse")[1], known.named("refuse")[3]]
        plain = measure(known.model, known.made.suite, items, features)
        kept = measure(known.model, known.made.suite, items, features, paths="kept")
        np.testing.assert_array_equal(plain, kept)
        assert abs(plain[:, 0, 2]).max() > 0.5


def test_bad_input_is_named(known: Known) -> None:
    feature = known.named("refuse")[1]
    with pytest.raises(InputError, match="twice"):
        estimate_edges(known.model, known.made.suite, known.items, [feature, feature])
    with pytest.raises(InputError, match="2 starts were given for 1 features"):
        ScaleFrom((feature,), 0.0, (1, 2), 5)


# -- the graph of one prompt -------------------------------------------------------------------------------------------


def test_the_graph_of_a_prompt_is_the_circuit(known: Known) -> None:
    features = sorted(known.made.truth.causal | known.made.truth.aligned_inert)
    logits = (known.made.refusal_token, known.made.compliance_token)
    graph = prompt_graph(known.model, known.made.suite, known.items[0], features, logits)
    place = {(n.kind, n.feature, n.token_id if n.kind == "logit" else n.position): k for k, n in enumerate(graph.nodes)}
    end = len(known.items[0]) - 1
    refuse, last = known.named("refuse"), place["logit", None, known.made.refusal_token]
    third, second = place["feature", refuse[3], end], place["feature", refuse[2], end]
    # 6 · refuse, less the mean logit.
    value = graph.nodes[third].value
    assert graph.weights[last, third] == pytest.approx(6 * value, rel=0.01)
    assert graph.weights[third, second] == pytest.approx(value, rel=1e-3)
    item = known.items[0]
    tokens, outer = graph.nodes[: len(item)], graph.nodes[-2:]
    assert tokens == tuple(GraphNode("token", -1, n, None, token, 1.0) for n, token in enumerate(item.ids))
    (values,) = feature_activations(known.model, known.made.suite, [item], features)
    scored = np.isin(item.regions, (Region.INSTRUCTION, Region.POST_INSTRUCTION))
    active = [(f, p) for n, f in enumerate(features) for p in range(len(item)) if scored[p] and values[p, n] > 0]
    assert [(n.feature, n.position) for n in graph.nodes[len(item) : -2]] == active
    for node in graph.nodes[len(item) : -2]:
        assert node.feature is not None
        assert (node.kind, node.layer, node.token_id) == ("feature", node.feature.layer, -1)
        assert node.value == pytest.approx(float(values[node.position, features.index(node.feature)]), abs=1e-4)
    # A harm feature of layer 0 reads its own word and no other: what is lost, by finite differences, with a small step
    # of all embeddings towards the mean one.
    inputs: Any = known.made.model.get_input_embeddings()
    step = 1e-3

    def nudge(output: torch.Tensor) -> torch.Tensor:
        return output - step * (output - inputs.weight.mean(0))

    with hooked([inputs], {0: nudge}):
        (less,) = feature_activations(known.model, known.made.suite, [item], features)
    first = [k for k, n in enumerate(graph.nodes) if n.kind == "feature" and n.layer == 0]
    assert len(first) > 1
    for k in first:
        own, feature, expected = graph.nodes[k].position, graph.nodes[k].feature, np.zeros(len(item))
        assert feature is not None
        column = features.index(feature)
        expected[own] = float(values[own, column] - less[own, column]) / step
        np.testing.assert_allclose(graph.weights[k, : len(item)], expected, atol=0.02)
        assert expected[own] > 0.5
    with torch.inference_mode():
        chances = known.model.last_logits(known.model.batch([item]))[0].softmax(-1)
    for node, token in zip(outer, logits, strict=True):
        assert node[:5] == ("logit", known.model.n_layers, end, None, token)
        assert node.value == pytest.approx(float(chances[token]), abs=1e-5)
    # The aligned features lead nowhere, so nothing flows through them, and pruning drops them.
    aligned = [k for k, n in enumerate(graph.nodes) if n.feature in known.made.truth.aligned_inert]
    assert len(aligned) > 0
    assert not graph.weights[last, aligned].any() or np.abs(graph.weights[last, aligned]).max() < 1e-3
    small = pruned(graph, 0.9, 0.98)
    kept = {n.feature for n in small.nodes if n.feature is not None}
    assert kept == known.made.truth.refusal | known.made.harm_of[str(known.prompts.prompts[0].category)]
    assert [n.kind for n in small.nodes if n.layer == known.model.n_layers] == ["logit", "logit"]
    # Two harm words, and the tokens at which their features fire.
    words = {n.position for n in small.nodes if n.kind == "feature" and n.layer == 0}
    assert words <= {n.position for n in small.nodes if n.kind == "token"}


def test_a_graph_keeps_the_400_nodes_that_move_the_residual_most() -> None:
    model = ChatModel(*tiny_model("llama3", n_layers=1, d_model=8), name="tiny")
    dense = tiny_suite(model.hf, d_sae=200)[0].dense()
    # Rows of different lengths: what counts is how far the residual moves, not how active a feature is.
    lengths = torch.linspace(0.1, 3, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    suite = Suite.from_dense({0: replace(dense, w_dec=dense.w_dec * lengths[:, None])})
    (item,) = model.tokenize(["Explain the rules of chess to a child who likes to read a book"])
    features = [FeatureId(0, n) for n in reversed(range(200))]
    graph = prompt_graph(model, suite, item, features, (5,))
    (values,) = feature_activations(model, suite, [item], features)
    scored = torch.isin(torch.tensor(item.regions), torch.tensor((Region.INSTRUCTION, Region.POST_INSTRUCTION)))
    moved = values.flip(1) * lengths * dense.w_dec.norm(dim=-1) * scored[:, None]
    assert int((moved > 0).sum()) > 420
    least = float(moved.flatten().topk(400).values[-1])
    kept = sorted((p, n) for p, n in (moved >= least).nonzero().tolist())
    found = [n for n in graph.nodes if n.feature is not None]
    # By feature and position, in whatever order the features were named.
    assert [(n.feature.index, n.position) for n in found if n.feature] == sorted((n, p) for p, n in kept)
    assert len(kept) == 400


def hand_made() -> PromptGraph:
    """Two tokens, two features, one logit: token 0 → a → logit (weight 3), token 1 → b → logit (weight −1)."""
    nodes = (
        GraphNode("token", -1, 0, None, 10, 1.0),
        GraphNode("token", -1, 1, None, 11, 1.0),
        GraphNode("feature", 0, 0, FeatureId(0, 0), -1, 2.0),
        GraphNode("feature", 0, 1, FeatureId(0, 1), -1, 2.0),
        GraphNode("logit", 1, 1, None, 5, 0.5),
    )
    weights = np.zeros((5, 5))
    weights[2, 0] = weights[3, 1] = 1.0
    weights[4, 2], weights[4, 3] = 3.0, -1.0
    return PromptGraph(nodes, weights, influence_of(weights, nodes))


def test_influence_is_shares_multiplied_along_paths() -> None:
    graph = hand_made()
    np.testing.assert_allclose(graph.influence, [0.75, 0.25, 0.75, 0.25, 1.0])


def test_pruning_keeps_the_fewest_nodes_that_hold_the_share() -> None:
    graph = pruned(hand_made(), 0.7, 0.98)
    assert [(n.kind, n.position) for n in graph.nodes] == [("token", 0), ("feature", 0), ("logit", 1)]
    np.testing.assert_array_equal(graph.weights, [[0, 0, 0], [1, 0, 0], [0, 3, 0]])
    assert len(pruned(hand_made(), 0.8, 0.98).nodes) == 5


def test_of_nodes_with_as_much_influence_the_first_are_kept() -> None:
    """Twelve features write 2 and twelve write 1: of 36, 27 are all that write 2 and three that write 1."""
    features = [GraphNode("feature", 0, n, FeatureId(0, n), -1, 1.0) for n in range(24)]
    nodes = (*features, GraphNode("logit", 1, 24, None, 5, 0.5))
    weights = np.zeros((25, 25))
    weights[24, :24] = [1.0, 2.0] * 12
    graph = pruned(PromptGraph(nodes, weights, influence_of(weights, nodes)), 0.749, 1.0)
    assert [n.position for n in graph.nodes] == sorted([*range(1, 24, 2), 0, 2, 4, 24])


@pytest.mark.parametrize(("share", "edges"), [(0.37, 0), (0.75, 2), (0.76, 2), (0.88, 4)])
def test_pruning_keeps_the_fewest_edges_that_hold_the_share(share: float, edges: int) -> None:
    """What passes along them is .75 and .75 of 2, and .25 and .25; one of two on a path leads nowhere."""
    graph = pruned(hand_made(), 1.0, share)
    assert (np.count_nonzero(graph.weights), len(graph.nodes)) == (edges, 1 + edges)


# -- the paper's own code ----------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_suppression_upstream_reproduces_the_golden_case(shared: Path) -> None:
    with np.load(shared / "golden" / "upstream.npz") as file:
        expected = {key: file[key] for key in file.files}
    organism = shared / "organism-en"
    model = load_model(organism / "model", device="cpu", dtype="float32")
    suite = load_suite(organism / "saes", average_l0=20)
    items = model.tokenize(json.loads((shared / "golden" / "prompts.json").read_text())["harmful"])
    up, down = ([FeatureId(*each) for each in expected[name].tolist()] for name in ("upstream", "downstream"))
    with torch.inference_mode():
        before, after = suppression_effect(model, suite, items, up, down, factor=-3.0, since="start")
    np.testing.assert_allclose(before, expected["before"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(after, expected["after"], atol=1e-3, rtol=0)
