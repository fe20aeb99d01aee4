"""Pools, sets and baselines, with answers by hand."""

from __future__ import annotations

import pytest
import torch

from demur.errors import InputError, ModelError
from demur.method.activations import mean_activations, mean_max_activations
from demur.method.attribution import Attribution, AttributionSpec, PromptAttribution, ScoredTokens
from demur.method.path import Method, Metric
from demur.method.selection import (
    actdiff_set,
    cosine_pool,
    cossim_set,
    global_set,
    local_sets,
    pool_of,
    random_set,
)
from demur.model import Budgets, ChatModel, Region
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
        layer: DenseSae(
            layer=layer,
            w_enc=torch.zeros(3, 4),
            b_enc=torch.zeros(4),
            threshold=None,
            k=None,
            w_dec=torch.tensor(w),
            b_dec=torch.zeros(3),
        )
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


def _signal_case(method: Method, *rows: PromptAttribution) -> Attribution:
    metric = Metric((7,), allow_refusal_target=method == "paper")
    return Attribution(
        (FeatureId(0, 0), FeatureId(0, 1)), AttributionSpec.of(method, 3, metric, ScoredTokens(), "x"), rows
    )


def _row(prompt: str, patched: float, *totals: float, target: int = 3) -> PromptAttribution:
    return PromptAttribution(
        prompt_id=prompt, target=target, clean=-1.0, patched=patched, explained=0.0, n_scored=2, totals=totals
    )


MOVED, FLAT = _row("moved", 2.0, 4.0, 1.0), _row("flat", -1.0, 0.0, 0.0)
AIMED_AT_REFUSAL, UNMOVED = _row("aimed", 2.0, 1.0, 9.0, target=7), _row("unmoved", -1.0 + 1e-8, 1.0, 9.0)
NO_SCORE = _row("no score", 2.0, 0.0, 0.0)


def test_prompts_without_signal_are_told_and_left_out_of_the_mean() -> None:
    found = _signal_case("ig", MOVED, FLAT, AIMED_AT_REFUSAL, UNMOVED, NO_SCORE)
    assert found.signal.tolist() == [True, False, False, False, False]
    assert found.share_without_signal == pytest.approx(0.8)
    assert global_set(found, 2).scores == pytest.approx((2.0, 0.5))
    assert global_set(found, 2).features == (FeatureId(0, 0), FeatureId(0, 1))


def test_the_papers_mean_counts_every_prompt() -> None:
    found = _signal_case("paper", MOVED, FLAT)
    assert found.signal.tolist() == [True, False]
    assert global_set(found, 2).scores == pytest.approx((1.0, 0.25))


@pytest.mark.parametrize("method", ["ig", "paper", "exact"])
def test_where_no_prompt_has_signal_nothing_is_ranked(method: Method) -> None:
    found = _signal_case(method, FLAT, AIMED_AT_REFUSAL, UNMOVED, NO_SCORE)
    assert found.share_without_signal == 1.0
    for ranked in (global_set, local_sets):
        with pytest.raises(ModelError, match=r"nothing to rank.*another direction.*affine form") as error:
            ranked(found, 2)
        assert ("let the metric aim" in str(error.value)) == (method == "paper")


@pytest.fixture(scope="module")
def model() -> ChatModel:
    hf, tokenizer = tiny_model("gemma2")
    return ChatModel(hf, tokenizer, name="gemma2")


TEXTS = ["Tell me how to bake bread", "Sing", "Explain the rules of chess"]


@pytest.mark.parametrize(("activation", "d_sae"), [("jumprelu", 8200), ("topk", 24)])
def test_activations_over_scored_tokens(model: ChatModel, activation: ActivationName, d_sae: int) -> None:
    """Also of a dictionary that is encoded in several blocks."""
    suite = tiny_suite(model.hf, d_sae=d_sae, activation=activation)
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
        found = mean_activations(model, suite, items, layers=[2], reduce=reduce)
        torch.testing.assert_close(found[2], torch.stack(expected[reduce]).mean(0), rtol=1e-4, atol=1e-4)
    rates = mean_activations(model, suite, items, reduce="rate", layers=[2])
    torch.testing.assert_close(rates[2], torch.stack(expected["rate"]).mean(0), rtol=1e-4, atol=1e-4)
    some = [17, 0, d_sae - 1]
    peaks = mean_max_activations(model, suite, items, [FeatureId(2, n) for n in some])
    torch.testing.assert_close(peaks, torch.stack(expected["max"]).mean(0)[some], rtol=1e-4, atol=1e-4)


def test_means_do_not_depend_on_how_prompts_are_batched(model: ChatModel) -> None:
    suite = tiny_suite(model.hf, d_sae=24)
    items = model.tokenize(TEXTS)
    some = [FeatureId(0, 3), FeatureId(2, 7)]

    def measured() -> list[torch.Tensor]:
        maxima = mean_max_activations(model, suite, items, some)
        return [
            mean_activations(model, suite, items)[1],
            mean_activations(model, suite, items, reduce="rate")[1],
            maxima,
        ]

    together, before = measured(), model.budgets
    try:
        model.budgets = Budgets(1, 1)
        apart = measured()
    finally:
        model.budgets = before
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_decoders_and_controls_of_a_topk_suite(model: ChatModel) -> None:
    suite = tiny_suite(model.hf, d_sae=24, activation="topk")
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(2))
    chosen = cossim_set(suite, direction, 4)
    decoder = torch.cat([suite[layer].dense().w_dec for layer in suite.layers])
    cosines = torch.cosine_similarity(decoder, direction[None], dim=-1)
    values, places = cosines.topk(4)
    assert chosen.features == tuple(FeatureId(suite.layers[n // 24], n % 24) for n in places.tolist())
    assert chosen.scores == pytest.approx(values.tolist(), abs=1e-6)
    rates = mean_activations(model, suite, model.tokenize(TEXTS), reduce="rate")
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
    assert (found.method, found.scope) == ("actdiff-max", "global")
    high, low = (mean_activations(model, suite, items, reduce="max") for items in (one, two))
    every = {FeatureId(l, i): float(high[l][i] - low[l][i]) for l in suite.layers for i in range(24)}
    best = sorted(every, key=lambda feature: -every[feature])[:5]
    assert list(found.features) == best
    assert found.scores == pytest.approx([every[feature] for feature in best], abs=1e-6)
    every_token = ScoredTokens(header_tokens=0)
    high, low = (mean_activations(model, suite, items, reduce="mean", scoring=every_token) for items in (one, two))
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


def test_a_random_feature_is_one_of_the_eight_nearest_unless_said() -> None:
    rates = {0: torch.arange(20.0) ** 2}
    like = FeatureSet(features=(FeatureId(0, 10),), scores=(1.0,), scope="global", method="x")
    drawn = {random_set(like, rates, exclude=[FeatureId(0, 9)], seed=seed).features[0].index for seed in range(120)}
    # Rates are 84 to 36 below that of 10, and 21 to 69 above; the next ones are 91 below and 96 above.
    assert drawn == {4, 5, 6, 7, 8, 11, 12, 13}
    plain = random_set(like, rates)
    assert plain == random_set(like, rates, neighbours=8, seed=0)
    assert (plain.method, plain.scores, plain.scope, plain.prompt_id) == ("random-0", (0.0,), "global", None)
    # The last one that is left is drawn, though it is far.
    left = random_set(like, rates, exclude=[FeatureId(0, n) for n in range(19)])
    assert left.features == (FeatureId(0, 19),)


def test_given_features_as_a_pool_keep_their_order_and_have_their_cosines() -> None:
    asked = (FeatureId(1, 1), FeatureId(0, 2), FeatureId(1, 2), FeatureId(0, 3))
    pool = pool_of(_suite(), torch.tensor([2.0, 0, 0]), asked)
    assert pool.features == asked
    assert pool.cosines == pytest.approx((0.6, -1.0, 0.0, 2**-0.5))


def test_sets_say_how_they_were_chosen_and_for_whom() -> None:
    found, (one, two) = global_set(_attribution(), 2), local_sets(_attribution(), 2, score="total")
    assert (found.method, found.scope, found.prompt_id) == ("pool+ig", "global", None)
    assert (one.method, one.scope, one.prompt_id, two.prompt_id) == ("pool+ig", "local", "a", "b")
    assert (one.features, one.scores) == ((FeatureId(0, 0), FeatureId(0, 2)), (10.0, 5.0))
    assert (two.features, two.scores) == ((FeatureId(0, 1), FeatureId(0, 2)), (3.0, 2.0))
    assert cossim_set(_suite(), torch.tensor([1.0, 0, 0]), 1).method == "cossim"


def test_random_features_match_several_measures_by_rank() -> None:
    """Ten features: rates rise with the index, sizes (in quite other units) fall, but for one far-off pair."""
    rates = {0: torch.arange(10.0) / 100}
    sizes = {0: torch.tensor([900.0, 800, 700, 600, 500, 400, 300, 200, 100, 650])}
    like = FeatureSet(features=(FeatureId(0, 3),), scores=(1.0,), scope="global", method="x")

    def nearest(*matched: dict[int, torch.Tensor]) -> set[int]:
        drawn = (random_set(like, matched, neighbours=2, seed=seed) for seed in range(30))
        return {found.features[0].index for found in drawn}

    # By rank of both: 2 and 4 are one rank off in rate; 2 is two ranks off in size (9 lies between), 4 one.
    assert nearest(rates, sizes) == {2, 4}
    assert {found.features[0].index for found in (random_set(like, sizes, neighbours=1, seed=0),)} == {9}
    tied = {0: torch.tensor([0.0, 0, 0, 5, 5, 5, 9, 9, 9, 9])}
    # Ties share a rank, so the second measure decides among them.
    assert nearest(tied, sizes) == {4, 5}
