"""Pools, sets and baselines, with answers by hand."""

from __future__ import annotations

import pytest
import torch

from demur.errors import InputError
from demur.method.attribution import Attribution, AttributionSpec, Metric, PromptAttribution, ScoredTokens
from demur.method.selection import (
    actdiff_set,
    cosine_pool,
    cossim_set,
    firing_rates,
    global_set,
    local_sets,
    mean_peaks,
    peak_activations,
    random_set,
)
from demur.model import ChatModel, Region
from demur.saes import ActivationName, DenseSae, Suite
from demur.testing import tiny_model, tiny_suite
from demur.types import FeatureId, FeatureSet


def _suite() -> Suite:
    """Two layers over three axes: decoder rows point along known directions."""
    rows = {
        0: [[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [1, 1, 0]],
        1: [[0, 0, 1.0], [3, 4, 0], [0, 0, 0], [0.1, 0, 0]],
    }
    saes = {
        layer: DenseSae(layer, torch.zeros(3, 4), torch.zeros(4), None, None, torch.tensor(w), torch.zeros(3))
        for layer, w in rows.items()
    }
    return Suite.from_dense(saes)


def test_the_pool_takes_signed_cosines_layer_by_layer() -> None:
    pool = cosine_pool(_suite(), torch.tensor([2.0, 0, 0]), 2)
    assert pool.by_layer == {0: (0, 3), 1: (3, 1)}
    assert pool.cosines == pytest.approx((1.0, 2**-0.5, 1.0, 0.6))
    assert pool.cosine(FeatureId(1, 1)) == pytest.approx(0.6)
    assert cosine_pool(_suite(), torch.tensor([2.0, 0, 0]), 9).by_layer[0] == (0, 3, 1, 2)
    assert cosine_pool(_suite(), torch.tensor([2.0, 0, 0]), 1, layers=[1]).features == (FeatureId(1, 3),)


def test_cossim_takes_the_best_of_all_layers() -> None:
    found = cossim_set(_suite(), torch.tensor([3.0, 4.0, 0]), 3)
    assert found.features == (FeatureId(1, 1), FeatureId(0, 3), FeatureId(0, 1))
    assert found.scores == pytest.approx((1.0, 7 / 5 / 2**0.5, 0.8))


def _attribution() -> Attribution:
    def row(prompt: str, n: int, *totals: float) -> PromptAttribution:
        return PromptAttribution(
            prompt_id=prompt, target=0, clean=0.0, patched=1.0, explained=1.0, n_scored=n, totals=totals
        )

    features = tuple(FeatureId(0, n) for n in range(3))
    return Attribution(
        features,
        AttributionSpec.of("ig", 10, Metric((7,)), ScoredTokens(), "none"),
        (row("a", 10, 10.0, 0.0, 5.0), row("b", 1, 0.0, 3.0, 2.0)),
    )


def test_sets_by_mean_and_by_total() -> None:
    found = global_set(_attribution(), 2)
    assert found.features == (FeatureId(0, 1), FeatureId(0, 2))
    assert found.scores == pytest.approx((1.5, 1.25))
    assert global_set(_attribution(), 2, score="total").features == (FeatureId(0, 0), FeatureId(0, 2))
    local = local_sets(_attribution(), 1)
    assert [(each.prompt_id, each.features) for each in local] == [("a", (FeatureId(0, 0),)), ("b", (FeatureId(0, 1),))]
    assert len(global_set(_attribution(), 9)) == 3


@pytest.fixture(scope="module")
def model() -> ChatModel:
    hf, tokenizer = tiny_model("gemma2")
    return ChatModel(hf, tokenizer, name="gemma2")


TEXTS = ["Tell me how to bake bread", "Sing", "Explain the rules of chess"]


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_activations_over_scored_tokens(
    model: ChatModel, activation: ActivationName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demur.method.selection._BLOCK", 5)
    suite = tiny_suite(model.hf, d_sae=24, activation=activation)
    items = model.tokenize(TEXTS)
    expected: dict[str, list[torch.Tensor]] = {"max": [], "mean": [], "last": [], "rate": []}
    for item in items:
        with torch.inference_mode(), model.capture([2]) as captured:
            model.last_logits(model.batch([item]))
        scored = torch.tensor([region in (Region.INSTRUCTION, Region.POST_INSTRUCTION) for region in item.regions])
        f = suite[2].dense().encode(captured[2][0])[scored]
        expected["max"].append(f.amax(0))
        expected["mean"].append(f.mean(0))
        expected["last"].append(f[-1])
        expected["rate"].append((f > 0).float().mean(0))
    for reduce in ("max", "mean", "last"):
        found = peak_activations(model, suite, items, layers=[2], reduce=reduce)
        torch.testing.assert_close(found[2], torch.stack(expected[reduce]).mean(0), rtol=1e-4, atol=1e-4)
    rates = firing_rates(model, suite, items, layers=[2])
    torch.testing.assert_close(rates[2], torch.stack(expected["rate"]).mean(0), rtol=1e-4, atol=1e-4)
    some = [17, 0, 5]
    peaks = mean_peaks(model, suite, items, [FeatureId(2, n) for n in some])
    torch.testing.assert_close(peaks, torch.stack(expected["max"]).mean(0)[some], rtol=1e-4, atol=1e-4)


def test_decoders_and_controls_of_a_topk_suite(model: ChatModel) -> None:
    suite = tiny_suite(model.hf, d_sae=24, activation="topk")
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(2))
    chosen = cossim_set(suite, direction, 4)
    decoder = torch.cat([suite[layer].dense().w_dec for layer in suite.layers])
    cosines = torch.cosine_similarity(decoder, direction[None], dim=-1)
    values, places = cosines.topk(4)
    assert chosen.features == tuple(FeatureId(suite.layers[n // 24], n % 24) for n in places.tolist())
    assert chosen.scores == pytest.approx(values.tolist(), abs=1e-6)
    rates = firing_rates(model, suite, model.tokenize(TEXTS))
    drawn = random_set(chosen, rates, neighbours=3, seed=1)
    used = {*chosen.features}
    for found, original in zip(drawn.features, chosen.features, strict=True):
        assert found.layer == original.layer
        assert found not in used
        distance = (rates[original.layer] - rates[original.layer][original.index]).abs()
        free = [n for n in range(24) if FeatureId(original.layer, n) not in used]
        assert sum(float(distance[n]) < float(distance[found.index]) for n in free) < 3
        used.add(found)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_actdiff_takes_the_largest_differences(model: ChatModel, activation: ActivationName) -> None:
    suite = tiny_suite(model.hf, d_sae=24, activation=activation)
    one, two = model.tokenize(TEXTS[:1]), model.tokenize(TEXTS[1:])
    found = actdiff_set(model, suite, one, two, 5)
    high, low = peak_activations(model, suite, one), peak_activations(model, suite, two)
    every = {FeatureId(l, i): float(high[l][i] - low[l][i]) for l in suite.layers for i in range(24)}
    best = sorted(every, key=lambda feature: -every[feature])[:5]
    assert list(found.features) == best
    assert found.scores == pytest.approx([every[feature] for feature in best], abs=1e-6)
    every_token = ScoredTokens(header_tokens=0)
    high, low = (peak_activations(model, suite, items, reduce="mean", scoring=every_token) for items in (one, two))
    everywhere = actdiff_set(model, suite, one, two, 5, reduce="mean", scoring=every_token)
    assert everywhere.scores[0] == pytest.approx(max(float((high[l] - low[l]).max()) for l in suite.layers))
    assert everywhere.scores != actdiff_set(model, suite, one, two, 5, reduce="mean").scores


def test_random_features_match_layer_and_rate() -> None:
    rates = {0: torch.linspace(0, 0.5, 51), 1: torch.linspace(0, 0.5, 51)}
    like = FeatureSet(
        features=(FeatureId(0, 10), FeatureId(0, 11), FeatureId(1, 40)),
        scores=(3.0, 2.0, 1.0),
        scope="global",
        method="x",
    )
    exclude = [FeatureId(0, 9), FeatureId(1, 41)]
    sets = [random_set(like, rates, exclude=exclude, neighbours=4, seed=seed) for seed in range(20)]
    assert len({each.features for each in sets}) > 5
    assert random_set(like, rates, exclude=exclude, neighbours=4, seed=3) == sets[3]
    for found in sets:
        assert not {*found.features} & {*exclude, *like.features}
        assert [f.layer for f in found.features] == [0, 0, 1]
        for drawn, original in zip(found.features, like.features, strict=True):
            assert abs(float(rates[drawn.layer][drawn.index] - rates[original.layer][original.index])) <= 0.05
    with pytest.raises(InputError, match="layer 0 has no features left"):
        random_set(like, rates, exclude=[FeatureId(0, n) for n in range(51)])
