"""`demur circuit` on the planted model: what drives what is known, and the graph is one that other readers accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from graph_schema import GRAPH_SCHEMA
from page_parts import unshown

from demur.errors import InputError, ModelError
from demur.method.edges import GraphNode, PromptGraph, estimate_edges, intervene_edges
from demur.stats import spearman
from demur.studies import STUDIES
from demur.studies.circuit.graph import attribution_graph, cantor_pair
from demur.studies.circuit.sections import Result
from demur.studies.config import load_config
from demur.studies.context import open_context
from demur.types import FeatureId


@pytest.fixture(scope="module")
def circuit(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("run") / "circuit"
    return files.study(out, "circuit", random_sets=3), out


@pytest.fixture(scope="module")
def graph(circuit: Any) -> dict[str, Any]:
    return json.loads((circuit[1] / "graph.json").read_text())


def test_harm_and_refusal_features_are_the_planted_ones(circuit: Any, files: Any) -> None:
    result: Result = circuit[0]
    assert set(result.harm) == files.truth.truth.harm
    assert set(result.refusal) == files.truth.truth.refusal


def test_harm_features_drive_refusal_and_random_ones_do_not(circuit: Any) -> None:
    result: Result = circuit[0]
    for row in result.drops:
        # Without harm nothing is left of any refusal feature, and nothing else drives them.
        assert row.drop.value == pytest.approx(1.0, abs=1e-3)
        # Harmless prompts do not activate them at all.
        assert (row.harmless, row.of_excess.value) == (0.0, row.drop.value)
        assert abs(row.random.value) < 1e-3
        assert row.difference.low > 0.99
        assert row.drop.n == 20
    assert [(row.factor, row.feature) for row in result.drops] == [
        (factor, feature) for factor in (0.0, -3.0) for feature in (None, *result.refusal)
    ]
    for drawn in result.draws:
        assert drawn.draws == pytest.approx((0.0, 0.0, 0.0), abs=1e-3)
        assert drawn.one_more.p == 0.25
    assert result.page().verdicts[0].count("beyond the range of one more random set") == 2
    assert "); scaled by −3, by 1.00" in result.page().verdicts[0]


def test_edges_are_those_of_the_circuit(circuit: Any, files: Any) -> None:
    result: Result = circuit[0]
    share = {f: [] for f in result.harm}
    for row in (row for row in result.edges if row.paths == "stopped"):
        step = row.target.layer - row.source.layer
        if row.from_harm and row.target.layer == 1:
            share[row.source].append(row.measured.value)
        elif step > 1:
            # What a feature does two layers on goes through the features between, which are held.
            assert abs(row.measured.value) < 1e-3
        else:
            assert row.measured.value == pytest.approx(1.5, abs=0.1)
            assert row.estimated == pytest.approx(row.measured.value, rel=1e-3)
    # Each half of a category adds 1 to `refuse` on its own prompts, so the two do the same and all eight add up to 2.
    assert sum(value for values in share.values() for value in values) == pytest.approx(2.0, abs=0.1)
    for pair in files.truth.harm_of.values():
        first, second = (share[each][0] for each in sorted(pair))
        assert first == pytest.approx(second, abs=1e-2)
    kept = {(r.source, r.target): r for r in result.edges if r.paths == "kept"}
    for harm in result.harm:
        values = [kept[harm, target].measured.value for target in result.refusal]
        assert values == pytest.approx([values[0]] * 3, rel=1e-3)


def test_estimates_are_checked_against_interventions(circuit: Any) -> None:
    result: Result = circuit[0]
    assert [(row.paths, row.edges) for row in result.checks] == [("kept", 27), ("stopped", 27)]
    for row in result.checks:
        assert row.spearman.value > 0.95
        assert row.spearman.low <= row.spearman.value <= row.spearman.high
        assert row.same_sign.value == 1.0
        edges = [each for each in result.edges if each.paths == row.paths]
        agree = spearman([each.estimated for each in edges], [each.measured.value for each in edges])
        assert row.spearman.value == pytest.approx(agree)


def test_estimates_and_measurements_are_those_of_the_method(circuit: Any, files: Any) -> None:
    result, out = circuit
    study = STUDIES["circuit"]
    features = (*result.harm, *result.refusal)
    with open_context(study, load_config(None, files.options(), study.config), out) as context:
        items = context.model.tokenize(context.splits.test.harmful.prompts)
        tables = {
            (measure, paths): measure(context.model, context.suite, items, features, paths=paths).mean(0)
            for measure in (estimate_edges, intervene_edges)
            for paths in ("kept", "stopped")
        }
    apart = 0
    for row in result.edges:
        place = features.index(row.source), features.index(row.target)
        estimated, measured = (
            float(tables[measure, row.paths][place]) for measure in (estimate_edges, intervene_edges)
        )
        # Weights below a share of 1e-4 of the largest are rounding, prompt by prompt.
        assert row.estimated == pytest.approx(estimated, abs=1e-6 if abs(estimated) > 0.01 else 1e-3)
        assert row.measured.value == pytest.approx(measured, abs=1e-6 if abs(measured) > 0.01 else 1e-3)
        assert row.measured.n == 20
        apart += abs(estimated - measured) > 3e-6
    assert apart > 3


def test_the_drawn_graph_leads_from_harm_words_to_the_refusal_token(circuit: Any) -> None:
    result: Result = circuit[0]
    kinds = {point.node: point.kind for point in result.points}
    leads = {(kinds[link.source], kinds[link.target]) for link in result.links}
    assert {("token", "harm"), ("harm", "refusal"), ("refusal", "refusal"), ("refusal", "logit")} <= leads
    assert not [kind for _, kind in leads if kind == "token"]
    harm = [point for point in result.points if point.kind == "harm"]
    assert len(harm) == 2
    assert all(point.token.strip() in result.prompt for point in harm)
    assert result.chart("The graph of one prompt") is not None
    assert result.chart("Edges, estimated and measured") is not None


def test_the_exported_graph_fits_the_schema(graph: dict[str, Any], circuit: Any) -> None:
    jsonschema.Draft7Validator(GRAPH_SCHEMA).validate(graph)
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids) == len(circuit[0].points)
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(ids)
    assert {member for each in graph["qParams"]["supernodes"] for member in each[1:]} <= set(ids)
    for node in graph["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, index, _ = map(int, node["node_id"].split("_"))
            assert (int(node["layer"]), node["feature"]) == (layer, cantor_pair(layer, index))
        assert node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"])


def test_circuit_tracers_reader_takes_the_exported_graph(graph: dict[str, Any]) -> None:
    reader = pytest.importorskip(
        "circuit_tracer.frontend.graph_models",
        reason="circuit-tracer is not installed (it needs an older transformers than demur)",
    )
    read = reader.Model.model_validate(graph)
    assert [node.node_id for node in read.nodes] == [node["node_id"] for node in graph["nodes"]]


def test_layer_0_features_and_logits_never_share_an_id() -> None:
    nodes = (
        GraphNode("token", -1, 0, None, 3, 1.0),
        GraphNode("feature", 0, 1, FeatureId(0, 3), -1, 2.0),
        GraphNode("feature", 1, 1, FeatureId(1, 3), -1, 2.0),
        GraphNode("logit", 2, 1, None, 3, 0.7),
    )
    weights = np.zeros((4, 4))
    weights[1, 0], weights[2, 1], weights[3, 2] = 1.0, -0.5, 2.0
    made = attribution_graph(
        PromptGraph(nodes, weights, np.array([0.4, 0.4, 1.0, 1.0])),
        prompt="a prompt / with marks?",
        tokens=["a", "b"],
        model="folder/my model",
        saes="../some/saes",
        groups={"harm feature": [FeatureId(0, 3)]},
        decode=lambda token: f"<{token}>",
        thresholds=(0.9, 0.98),
    )
    jsonschema.Draft7Validator(GRAPH_SCHEMA).validate(made)
    assert [n["node_id"] for n in made["nodes"]] == ["E_3_0", "0_3_1", "1_3_1", "3_3_1"]
    assert [n["feature"] for n in made["nodes"]] == [0, 9, 13, 3]
    assert made["nodes"][1]["clerp"] == "harm feature 0:3"
    assert made["nodes"][2]["clerp"] == "feature 1:3"
    assert made["nodes"][0]["clerp"] == "<3>"
    assert [n["layer"] for n in made["nodes"]] == ["E", "0", "1", "3"]
    assert [n["feature_type"] for n in made["nodes"]] == [
        "embedding", *["cross layer transcoder"] * 2, "logit",
    ]  # fmt: skip
    assert [n["jsNodeId"] for n in made["nodes"]] == ["E_3-0", "0_3-0", "1_3-0", "L_3-1"]
    assert [(n["ctx_idx"], n["reverse_ctx_idx"]) for n in made["nodes"]] == [(0, 0), (1, 0), (1, 0), (1, 0)]
    assert [n.get("activation") for n in made["nodes"]] == [None, 2.0, 2.0, None]
    assert (made["nodes"][3]["token_prob"], made["nodes"][3]["is_target_logit"]) == (0.7, True)
    assert made["qParams"] == {
        "pinnedIds": ["0_3_1", "1_3_1", "3_3_1"],
        "supernodes": [["harm feature", "0_3_1"]],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    about = made["metadata"]
    assert about.pop("info")["generator"]["name"] == "demur"
    assert about == {
        "slug": "refusal-a-prompt-with-marks",
        "scan": "folder-my-model",
        "transcoder_list": ["..-some-saes"],
        "prompt_tokens": ["a", "b"],
        "prompt": "a prompt / with marks?",
        "node_threshold": 0.9,
        "schema_version": 1,
        "pruning_settings": {"node_threshold": 0.9, "edge_threshold": 0.98},
    }
    assert made["nodes"][3]["clerp"] == 'Output "<3>" (p=0.700)'
    assert made["links"][1] == {"source": "0_3_1", "target": "1_3_1", "weight": -0.5}
    # The most influential feature first: it alone holds 1.0 of 1.4.
    assert [n["influence"] for n in made["nodes"]] == pytest.approx([1.0, 1.0, 1 / 1.4, 0.0])


def test_the_same_command_again_computes_nothing(circuit: Any, files: Any) -> None:
    result, out = circuit
    calls: list[str] = []
    again = files.study(out, "circuit", lambda what, *_: calls.append(what), random_sets=3)
    assert again.model_copy(update={"seconds": {}}).model_dump_json() == (
        result.model_copy(update={"seconds": {}}).model_dump_json()
    )
    assert not [what for what in calls if what.startswith("edges")]


def test_without_features_downstream_there_is_no_circuit(files: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no circuit to trace"):
        files.study(tmp_path / "run", "circuit", layers="0")
    with pytest.raises(InputError, match="node_threshold"):
        files.study(tmp_path / "run", "circuit", node_threshold=2)


def test_the_fall_of_what_harm_adds_leaves_out_what_harmless_prompts_have_too(files: Any, tmp_path: Path) -> None:
    """Over-refusal prompts have h/2 − ½ = ½ of `refuse` where harmful ones have 1.5, so the fall of all is 1.5 of 1."""
    over = tmp_path / "over.jsonl"
    over.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in files.truth.over_refusal.texts))
    result = files.study(
        tmp_path / "run", "circuit", test_harmless=str(over), random_sets=2, n="20,16,8,8", edge_prompts=3
    )
    assert {row.measured.n for row in result.edges} == {3}
    row = result.drops[0]
    assert row.drop.value == pytest.approx(1.0, abs=1e-3)
    assert row.of_excess.value == pytest.approx(1.5, abs=0.1)
    assert row.of_excess.low < row.of_excess.value < row.of_excess.high


def test_what_the_result_holds_is_on_its_page(circuit: Any) -> None:
    # Left out of the page: details for code that reads results, and what is in a cell with its neighbour.
    assert unshown(circuit[0]) == {
        "DrawRow.draws",
        "GraphPoint.influence",
        "GraphPoint.value",
        "Result.harm",
        "Result.refusal",
    }
