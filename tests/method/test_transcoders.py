"""Transcoder features: where they are read and written, against passes edited by hand and the planted MLPs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import numpy as np
import pytest
import torch

from demur.errors import InputError, ModelError
from demur.guard import Reading, read_prompts
from demur.method.activations import feature_activations, mean_activations, mean_max_activations
from demur.method.attribution import SCORED, attribute
from demur.method.direction import Direction, find_direction
from demur.method.edges import estimate_edges, intervene_edges, prompt_graph
from demur.method.fidelity import reconstruction
from demur.method.interventions import (
    AblateDirection,
    Compiled,
    HoldFeatures,
    PerPrompt,
    ScaleFeatures,
    SetFeatures,
    bind,
)
from demur.method.local import LocalSearch, counterparts
from demur.method.path import Method, Metric
from demur.method.selection import attribute_dictionary, cosine_pool, global_set
from demur.method.tokens import token_effects
from demur.model import ChatModel, Region, count_hooks
from demur.saes import DenseSae, Suite
from demur.stats import spearman
from demur.testing import FAMILIES, Planted, planted, tiny_model
from demur.types import FeatureId, Site

CAUSAL = (*(f"harm{n}" for n in range(8)), "refuse")


@dataclass(frozen=True)
class Case:
    made: Planted
    model: ChatModel
    direction: Direction

    @property
    def items(self) -> Any:
        return self.model.tokenize(self.made.harmful.prompts[32:48])

    @property
    def asked(self) -> dict[str, Any]:
        return {
            "patch": Compiled(self.model, None, [self.direction.ablate()]),
            "metric": Metric((self.made.refusal_token,)),
        }


@cache
def case() -> Case:
    made = planted()
    model = ChatModel(made.model, made.tokenizer, name="planted")
    high, low = (model.tokenize(each) for each in (made.harmful, made.harmless))
    direction = find_direction(model, (high[:16], low[:16]), (high[16:24], low[16:24]), (made.refusal_token,))
    return Case(made, model, direction)


@pytest.mark.parametrize("method", ["gradient", "paper", "ig", "exact"])
def test_selection_finds_the_planted_units(method: Method) -> None:
    here = case()
    suite, causal = here.made.transcoders, {here.made.units[name] for name in CAUSAL}
    pool = cosine_pool(suite, here.direction.vector, 48)
    scores = attribute(here.model, suite, here.items, pool, method=method, **here.asked)
    assert set(global_set(scores, len(causal)).features) == causal
    if method != "exact":
        found = attribute_dictionary(here.model, suite, here.items, top=len(causal), method=method, **here.asked)
        assert set(found.overall.features) == causal
        exact = attribute(here.model, suite, here.items, pool, method="exact", **here.asked)
        known = [scores.features.index(unit) for unit in here.made.units.values()]
        # Equal effects are ties.
        estimate, truth = (each.totals.mean(0).numpy()[known].round(1) for each in (scores, exact))
        assert spearman(estimate, truth) >= 0.9
    else:
        # What is moved is the features alone, to 0: the effects of scaling them by 0.
        unit = here.made.units["harm0"]
        column = scores.totals[:, scores.features.index(unit)]
        batch = here.model.batch(here.items)
        with here.model.intervene(bind(suite, ScaleFeatures((unit,), 0.0))), torch.no_grad():
            after = here.asked["metric"](here.model.last_logits(batch), [row.target for row in scores.rows])
        expected = after - torch.tensor([row.clean for row in scores.rows])
        torch.testing.assert_close(column.float(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("paths", ["kept", "stopped"])
def test_edges_agree_with_interventions_and_with_the_weights(paths: Any) -> None:
    here = case()
    kind = here.made.harmful.prompts[0].category
    items = here.model.tokenize([p for p in here.made.harmful.prompts if p.category == kind])
    units = here.made.units
    features = sorted(units.values())
    guess, truth = (
        measure(here.model, here.made.transcoders, items, features, paths=paths).mean(0)
        for measure in (estimate_edges, intervene_edges)
    )
    pairs = [(s, t) for s, a in enumerate(features) for t, b in enumerate(features) if a.layer < b.layer]
    values = [np.array([table[pair] for pair in pairs]).round(2) for table in (guess, truth)]
    assert spearman(*values) >= 0.9
    # By hand: 2 of a harm arrive at a template token, of which `refuse` and `aligned` read one half each; `aftermath`
    # reads `refuse` (1.5); where that is taken out, `backup` wakes to 2 - 3/4, which no gradient sees.
    own = [name for name in CAUSAL[:8] if units[name] in here.made.harm_of_units(str(kind))]
    assert len(own) == 2

    def edge(table: np.ndarray, source: str, target: str) -> float:
        return float(table[features.index(units[source]), features.index(units[target])])

    for name in CAUSAL[:8]:
        for target in ("refuse", "aligned"):
            for table in (guess, truth):
                assert edge(table, name, target) == pytest.approx(1.0 if name in own else 0.0, abs=0.05)
    assert edge(truth, "refuse", "aftermath") == pytest.approx(1.5, rel=0.1)
    assert edge(truth, "refuse", "backup") == pytest.approx(-1.25, rel=0.1)
    assert edge(guess, "refuse", "backup") == 0.0
    through = edge(truth, own[0], "aftermath")
    assert through == pytest.approx(1.0 if paths == "kept" else 0.0, abs=0.05)


def test_a_graph_of_one_prompt_leads_from_words_over_units_to_the_answer() -> None:
    here = case()
    item = here.items[0]
    units = here.made.units
    kind = str(here.made.harmful.prompts[32].category)
    harm = sorted(here.made.harm_of_units(kind))
    graph = prompt_graph(
        here.model, here.made.transcoders, item, [*harm, units["refuse"]], [here.made.refusal_token]
    )  # fmt: skip
    places = {(node.kind, node.feature): n for n, node in enumerate(graph.nodes) if node.position == len(item) - 1}
    refuse, logit = places["feature", units["refuse"]], places["logit", None]
    # 6 per unit of `refuse`, which is 1.5 at the last token.
    assert graph.weights[logit, refuse] == pytest.approx(9.0, rel=0.05)
    sources = [n for n, node in enumerate(graph.nodes) if node.feature in harm]
    assert sum(graph.weights[refuse, n] for n in sources) == pytest.approx(2.0, rel=0.05)
    assert all(any(graph.weights[n, t] > 0 for t in range(len(item))) for n in sources)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_mlp_adds_is_what_its_layer_adds_to_the_residual_before_it(family: Any) -> None:
    model = ChatModel(*tiny_model(family, n_layers=2), name=family)
    batch = model.batch(model.tokenize(["How do I bake bread?", "Hi"]))
    found: dict[str, torch.Tensor] = {}
    sites: tuple[Site, ...] = ("resid_mid", "mlp_in", "mlp_out", "resid_post")
    with torch.no_grad():
        for site in sites:
            with model.capture([1], sites={1: site}) as seen:
                model.last_logits(batch)
            found[site] = seen[1]
        layer: Any = model.layers[1]
        torch.testing.assert_close(found["resid_mid"] + found["mlp_out"], found["resid_post"])
        norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        torch.testing.assert_close(norm(found["resid_mid"]), found["mlp_in"])
        after = getattr(layer, "post_feedforward_layernorm", lambda x: x)
        torch.testing.assert_close(after(layer.mlp(found["mlp_in"])), found["mlp_out"])
    assert count_hooks(model.hf) == 0


def random_transcoders(model: ChatModel, size: float) -> Suite:
    """Features that fire about half the time and write a little."""
    draw = torch.Generator().manual_seed(3)

    def one(layer: int) -> DenseSae:
        enc, dec = (torch.randn(model.d_model, 24, generator=draw) for _ in range(2))
        none = torch.zeros(24), None, size * dec.T.contiguous(), None, torch.zeros(model.d_model)
        return DenseSae(layer, enc, *none, reads="mlp_in", writes="mlp_out")

    return Suite.from_dense({layer: one(layer) for layer in range(model.n_layers)})


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "llama3"])
def test_interventions_change_what_the_mlp_adds(family: Any) -> None:
    """Against hooks set by hand on the module that ends the MLP."""
    model = ChatModel(*tiny_model(family, n_layers=3), name=family)
    suite = random_transcoders(model, 0.1)
    batch = model.batch(model.tokenize(["How do I bake bread?", "Hi"]))
    features = (FeatureId(0, 3), FeatureId(1, 5), FeatureId(1, 7))
    seen: dict[int, torch.Tensor] = {}

    def note(layer: int, _module: Any, inputs: Any) -> None:
        seen[layer] = inputs[0]

    def change(layer: int, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        rows = suite[layer].rows([index for place, index in features if place == layer])
        added = (4.0 - rows.encode(seen[layer])) @ rows.w_dec
        return output + added * batch.real[..., None]

    handles: list[Any] = []
    for layer in (0, 1):
        module: Any = model.layers[layer]
        handles.append(module.mlp.register_forward_pre_hook(partial(note, layer)))
        last = getattr(module, "post_feedforward_layernorm", module.mlp)
        handles.append(last.register_forward_hook(partial(change, layer)))
    with torch.no_grad():
        expected = model.last_logits(batch)
        for handle in handles:
            handle.remove()
        clean = model.last_logits(batch)
        with model.intervene(bind(suite, SetFeatures(features, 4.0))):
            found = model.last_logits(batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - clean).abs().max() > 0.05
    assert count_hooks(model.hf) == 0


def test_answers_are_written_under_them_token_by_token() -> None:
    """Against passes over the whole sequence, which keep no cache."""
    here = case()
    units, suite = here.made.units, here.made.transcoders
    change = SetFeatures((units["refuse"],), 3.0)
    prompts = here.made.harmless.prompts[:3]
    with here.model.intervene(bind(suite, change)):
        answers = here.model.generate(prompts, max_new_tokens=6)
        for prompt, answer in zip(prompts, answers, strict=True):
            (item,) = here.model.tokenize([prompt])
            ids = list(item.ids)
            for _ in range(6):
                with torch.no_grad():
                    ids.append(int(here.model.hf(torch.tensor([ids])).logits[0, -1].argmax()))
            assert here.model.decode(ids[len(item) :]).startswith(answer.text)
            assert answer.text.strip().startswith("I")
    # Harm words' units off: the answer is what is said to everything else.
    off = ScaleFeatures(tuple(units[name] for name in CAUSAL[:8]), 0.0)
    with here.model.intervene(bind(suite, off)):
        found = here.model.generate(here.made.harmful.prompts[:4], max_new_tokens=12)
    assert {answer.text for answer in found} == {here.made.compliance}


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "llama3"])
def test_estimated_edges_rank_as_measured_ones_in_real_classes(family: Any) -> None:
    model = ChatModel(*tiny_model(family, n_layers=3), name=family)
    suite = random_transcoders(model, 0.02)
    items = model.tokenize(["How do I bake bread?", "Tell me about the sea."])
    features = [FeatureId(layer, index) for layer in range(3) for index in range(4)]
    pairs = [(s, t) for s, a in enumerate(features) for t, b in enumerate(features) if a.layer < b.layer]
    for paths in ("kept", "stopped"):
        guess, truth = (m(model, suite, items, features, paths=paths) for m in (estimate_edges, intervene_edges))
        values = [np.array([table[n][pair] for n in range(2) for pair in pairs]) for table in (guess, truth)]
        assert spearman(*values) >= 0.9, paths


def test_activations_are_of_what_enters_the_mlp_under_interventions_below() -> None:
    here = case()
    units, suite = here.made.units, here.made.transcoders
    wanted = [units["refuse"], units["aftermath"]]
    off = ScaleFeatures((units["refuse"],), 0.0)
    (clean,) = feature_activations(here.model, suite, here.items[:1], wanted)
    with here.model.intervene(bind(suite, off)):
        (changed,) = feature_activations(here.model, suite, here.items[:1], wanted)
    # What a unit reads is as before; what it writes is gone, so the unit that reads that is off.
    torch.testing.assert_close(changed[:, 0], clean[:, 0])
    assert clean[:, 1].max() == pytest.approx(1.5, abs=0.2)
    assert changed[:, 1].max() < 1e-3
    assert mean_max_activations(here.model, suite, here.items[:1], wanted).tolist() == pytest.approx(
        clean.amax(0).tolist()
    )
    # Held at their clean values, downstream units are what they were.
    prompt = here.items[0].prompt_id
    hold = PerPrompt({prompt: (HoldFeatures((units["aftermath"],), clean[:, 1:]),)})
    changes = here.model.intervene([bind(suite, off), bind(suite, hold)])
    with changes, torch.no_grad(), here.model.capture([2]) as residuals:
        here.model.last_logits(here.model.batch(here.items[:1]))
    wrote = residuals[2][0] @ here.made.axes["aftermath"]
    torch.testing.assert_close(wrote, 1.25 * clean[:, 1], atol=1e-2, rtol=1e-2)


def test_words_are_credited_through_what_the_mlp_reads() -> None:
    here = case()
    item = here.items[0]
    (effects,) = token_effects(here.model, here.made.transcoders, [item], [here.made.units["refuse"]])
    harm = sorted(here.made.harm_of_units(str(here.made.harmful.prompts[32].category)))
    (fires,) = feature_activations(here.model, here.made.transcoders, [item], harm)
    words = fires.sum(1).topk(2).indices
    assert set(effects.topk(2).indices.tolist()) == set(words.tolist())


def test_the_transcoders_explain_what_their_mlps_write() -> None:
    here = case()
    found = reconstruction(here.model, here.made.transcoders[1].dense(), here.items)
    assert found.error[:, 1].sum() < 0.02 * found.spread[:, 1].sum()
    empty = DenseSae(1, torch.zeros(64, 1), torch.zeros(1), None, torch.zeros(1, 64), None, torch.zeros(64))
    nothing = replace(empty, reads="mlp_in", writes="mlp_out")
    # Nothing explained: the error is the MLP's output itself, not the residual (whose constant is 1000).
    error = reconstruction(here.model, nothing, here.items).error[:, 1].sum()
    assert 0 < error < 1e4


def test_what_needs_the_residual_says_so() -> None:
    here = case()
    with pytest.raises(InputError, match=r"probes read SAEs of the residual stream; memory holds transcoders"):
        read_prompts(here.model, ["Hi"], [Reading(kind="features", features=(FeatureId(0, 0),))], here.made.transcoders)
    layer = torch.nn.Linear(2, 2)
    odd = ChatModel(*tiny_model("qwen3", n_layers=1), name="odd")
    odd.layers = (layer,)
    with pytest.raises(ModelError, match=r"not known in a Linear; models of these types are supported: llama, mistral"):
        odd.points({0: "mlp_in"})


def random_case(size: float = 0.02) -> tuple[ChatModel, Suite, Any]:
    """A model whose norms and MLPs are not the identity, unlike the planted one's: it matters what is read."""
    model = ChatModel(*tiny_model("qwen3", n_layers=3), name="random")
    return model, random_transcoders(model, size), model.tokenize(["How do I bake bread?", "Tell me of the sea."])


@pytest.mark.parametrize("method", ["gradient", "paper", "ig"])
def test_attribution_ranks_as_taking_features_out(method: Method) -> None:
    model, suite, items = random_case(0.002)
    draw = torch.Generator().manual_seed(1)
    patch = Compiled(model, None, [AblateDirection(torch.randn(model.d_model, generator=draw), layers=(2,))])
    metric = Metric((7,))
    asked: dict[str, Any] = {"patch": patch, "metric": metric}
    pool = {layer: range(5) for layer in range(3)}
    guess = attribute(model, suite, items, pool, method=method, **asked)
    exact = attribute(model, suite, items, pool, method="exact", **asked)
    for mine, truth in zip(guess.totals.numpy(), exact.totals.numpy(), strict=True):
        assert spearman(mine.round(5), truth.round(5)) >= 0.9
    for n, feature in enumerate(exact.features[:6]):
        change = PerPrompt({item.prompt_id: (zeroed(model, item, feature),) for item in items})
        with model.intervene(bind(suite, change)), torch.no_grad():
            after = metric(model.last_logits(model.batch(items)), [row.target for row in exact.rows])
        moved = after - torch.tensor([row.clean for row in exact.rows])
        torch.testing.assert_close(exact.totals[:, n].float(), moved, atol=1e-4, rtol=1e-3)


def zeroed(model: ChatModel, item: Any, feature: FeatureId) -> HoldFeatures:
    """A feature held at 0 on the scored tokens of a prompt."""
    inside = SCORED.mask(model.batch([item]))[0]
    return HoldFeatures((feature,), torch.where(inside, 0.0, torch.nan)[:, None])


def test_words_are_credited_by_the_gradient_of_what_the_mlp_reads() -> None:
    model, suite, items = random_case()
    feature, item = FeatureId(1, 4), items[0]
    (found,) = token_effects(model, suite, [item], [feature], method="gradient")
    batch, kept = model.batch([item]), list[torch.Tensor]()
    embed, layer = model.hf.get_input_embeddings(), cast("Any", model.layers[1])
    with torch.enable_grad():
        table: Any = embed.weight
        inputs = table[batch.input_ids].detach().requires_grad_()
        handle = layer.mlp.register_forward_pre_hook(lambda _module, given: kept.append(given[0]))
        model.hf(inputs_embeds=inputs, attention_mask=batch.attention_mask)
        handle.remove()
        after = batch.within([Region.POST_INSTRUCTION])[0]
        value = suite[1].rows([4]).encode(kept[0])[0, after, 0].mean()
        (slope,) = torch.autograd.grad(value, inputs)
    expected = (slope[0] * (inputs[0] - table.mean(0))).sum(-1).detach()
    words = torch.tensor(item.regions) == Region.INSTRUCTION
    torch.testing.assert_close(found[words], expected[words], atol=1e-5, rtol=1e-3)


def test_patches_of_one_prompt_hold_what_the_mlp_reads_there() -> None:
    model, suite, _ = random_case()
    plain, other = model.tokenize(["Tell me of the sea.", "Please tell me of the sea."])
    search = LocalSearch(model, suite, plain, other, [7])
    patch = search.explain(limit=1, threshold=1.1).patches[0]
    place = counterparts(model, plain, other)[patch.token]
    there, here = (feature_activations(model, suite, [item], [patch.feature])[0] for item in (plain, other))
    assert patch.value == pytest.approx(float(there[place, 0]), abs=1e-5)
    assert patch.before == pytest.approx(float(here[patch.token, 0]), abs=1e-5)


def test_means_over_prompts_are_of_what_the_mlp_reads() -> None:
    model, suite, items = random_case()
    found = mean_activations(model, suite, items, reduce="last")[1]
    values = feature_activations(model, suite, items, [FeatureId(1, n) for n in range(24)])
    torch.testing.assert_close(found, torch.stack([each[-1] for each in values]).mean(0), atol=1e-5, rtol=1e-4)
    with torch.no_grad(), model.capture([1], sites={1: "mlp_in"}) as read:
        model.last_logits(model.batch(items[:1]))
    torch.testing.assert_close(values[0], suite[1].dense().encode(read[1][0]), atol=1e-5, rtol=1e-4)
