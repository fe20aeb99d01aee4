"""Activations over tokens and prompts: what is kept at once, and what is taken over a prompt, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from demur.method import activations
from demur.method.activations import (
    KEPT_BYTES,
    Reduce,
    TokenActivations,
    by_prompt,
    chunks,
    dictionary_means,
    feature_activations,
    feature_means,
    filled,
    mean_max_activations,
    mean_within,
    over_regions,
    placed,
    scored_residuals,
)
from demur.method.attribution import ScoredTokens
from demur.model import SCORED_REGIONS, ChatModel, Region, TokenizedPrompt
from demur.saes import Suite
from demur.testing import tiny_model, tiny_suite
from demur.types import FeatureId

TEXTS = ["Tell me how to bake bread", "Sing", "Explain the rules of chess"]
ANSWERS = ScoredTokens(regions=(Region.RESPONSE,))


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return ChatModel(*tiny_model("gemma2"), name="tiny")


@pytest.fixture(scope="module")
def suite(model: ChatModel) -> Suite:
    return tiny_suite(model.hf, d_sae=24)


def prompt(name: str, *regions: Region) -> TokenizedPrompt:
    return TokenizedPrompt(name, tuple(range(len(regions))), tuple(map(int, regions)))


WORDS, END, HEAD = Region.INSTRUCTION, Region.POST_INSTRUCTION, Region.SPECIAL


def test_maxima_and_means_over_some_regions() -> None:
    items = [prompt("a", HEAD, WORDS, WORDS, END), prompt("b", HEAD, END), prompt("c", HEAD)]
    values = [torch.tensor([[9.0, 9], [1, -5], [3, -6], [2, -7]]), torch.tensor([[9.0, 9], [4, 5]]), torch.ones(1, 2)]
    assert over_regions(items, values).tolist() == [[3, -5], [4, 5], [0, 0]]
    assert over_regions(items, values, reduce="mean").tolist() == [[2, -6], [4, 5], [0, 0]]
    assert over_regions(items, values, [WORDS], "mean").tolist() == [[2, -5.5], [0, 0], [0, 0]]
    assert over_regions(items, values, [HEAD, END], "max").tolist() == [[9, 9], [9, 9], [1, 1]]
    assert over_regions(items, values).dtype == np.float64
    assert over_regions([], []).shape == (0, 0)


def test_means_within_a_mask() -> None:
    values = torch.tensor([[[1.0, 2], [3, 4], [50, 60]], [[7, 8], [9, 10], [11, 12]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert mean_within(values, mask).tolist() == [[2, 3], [0, 0]]


def test_activations_that_are_kept_are_found_by_prompt_and_feature() -> None:
    features = (FeatureId(1, 5), FeatureId(0, 2), FeatureId(3, 1))
    kept = TokenActivations(features, {"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(1, 3)})
    assert kept.of("b", (features[2], features[0])).tolist() == [[2, 0], [5, 3]]
    tensors, meta = kept.to_parts()
    again = TokenActivations.from_parts(tensors, meta)
    assert again.features == features
    assert {name: each.tolist() for name, each in again.by_prompt.items()} == {
        "b": [[0, 1, 2], [3, 4, 5]],
        "a": [[0, 0, 0]],
    }


def test_prompts_are_kept_until_the_limit_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, none lost: each prompt of these has 3 values of 4 bytes in each of two layers."""
    prompts = [(n, {0: (torch.ones(1, 2), torch.ones(1, 1)), 1: (torch.ones(3),)}) for n in range(5)]
    for limit, groups in (
        (24, [[0], [1], [2], [3], [4]]),
        (25, [[0, 1], [2, 3], [4]]),
        (48, [[0, 1], [2, 3], [4]]),
        (49, [[0, 1, 2], [3, 4]]),
        (KEPT_BYTES, [[0, 1, 2, 3, 4]]),
    ):
        monkeypatch.setattr(activations, "KEPT_BYTES", limit)
        found = list(filled(prompts))
        assert [[name for name, _ in some] for some in found] == groups
        assert [kept for some in found for _, kept in some] == [kept for _, kept in prompts]
    assert list(filled([])) == []


def test_prompts_are_joined_up_to_what_may_be_encoded_at_once() -> None:
    """2^24 activations at once: of 2^22 features those at four tokens. A longer prompt still stands alone."""
    lengths = [1, 2, 1, 3, 2, 5, 1]
    prompts = [(torch.full((n, 1), float(n)), torch.full((n, 2), -float(n))) for n in lengths]
    found = list(chunks(iter(prompts), 1 << 22))
    assert [counts for _, counts in found] == [[1, 2, 1], [3], [2], [5], [1]]
    for joined, counts in found:
        expected = [float(n) for n in counts for _ in range(n)]
        assert [joined[0][:, 0].tolist(), joined[1][:, 1].tolist()] == [expected, [-n for n in expected]]
    assert [counts for _, counts in chunks(iter(prompts), (1 << 24) // 3)] == [[1, 2], [1], [3], [2], [5], [1]]
    assert [counts for _, counts in chunks(iter(prompts), 1)] == [lengths]
    assert list(chunks(iter([]), 1)) == []


def test_blocks_know_their_place(suite: Suite) -> None:
    found = list(placed(suite[1].encoder_blocks(10), torch.device("cpu")))
    assert [place for place, _ in found] == [slice(0, 10), slice(10, 20), slice(20, 24)]
    assert torch.equal(torch.cat([block.b_enc for _, block in found]), suite[1].dense().b_enc)


def test_a_batch_is_parted_by_prompt(model: ChatModel) -> None:
    batch = model.batch(model.tokenize(TEXTS))
    mask = batch.within([WORDS])
    values = torch.arange(float(batch.input_ids.numel())).reshape(batch.input_ids.shape)[..., None]
    found = by_prompt(batch, {0: [values[mask], -values[mask]], 3: [values[mask] + 1]}, mask)
    assert [name for name, _ in found] == list(batch.prompt_ids)
    for row, (_, kept) in enumerate(found):
        own = values[row][mask[row]]
        assert [each.tolist() for each in kept[0]] == [own.tolist(), (-own).tolist()]
        assert [each.tolist() for each in kept[3]] == [(own + 1).tolist()]


def alone(model: ChatModel, item: TokenizedPrompt, layer: int) -> torch.Tensor:
    with torch.inference_mode(), model.capture([layer]) as captured:
        model.last_logits(model.batch([item]))
    return captured[layer][0]


def test_activations_at_every_token_in_the_order_asked_for(model: ChatModel, suite: Suite) -> None:
    items = model.tokenize(TEXTS)
    features = (FeatureId(2, 9), FeatureId(0, 3), FeatureId(2, 1))
    for item, found in zip(items, feature_activations(model, suite, items, features), strict=True):
        columns = [suite[f.layer].dense().encode(alone(model, item, f.layer))[:, f.index] for f in features]
        torch.testing.assert_close(found, torch.stack(columns, -1), rtol=1e-4, atol=1e-4)


def test_what_is_kept_of_prompts_is_their_scored_tokens(model: ChatModel) -> None:
    items = model.tokenize(TEXTS)
    for scoring, wanted in ((None, SCORED_REGIONS), (ScoredTokens(regions=(END,)), (END,))):
        options: dict[str, Any] = {} if scoring is None else {"scoring": scoring}
        found = dict(scored_residuals(model, items, [2, 0], **options))
        assert found.keys() == {"0", "1", "2"}
        for item in items:
            inside = torch.isin(torch.tensor(item.regions), torch.tensor(wanted))
            for layer in (0, 2):
                (kept,) = found[item.prompt_id][layer]
                torch.testing.assert_close(kept, alone(model, item, layer)[inside], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [1, KEPT_BYTES])
def test_means_of_groups_count_prompts_without_a_scored_token_as_0(
    model: ChatModel, suite: Suite, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Two groups in one pass over the dictionaries; of the second one prompt of two has an answer to score."""
    monkeypatch.setattr(activations, "KEPT_BYTES", limit)
    plain = model.tokenize(TEXTS)
    answered = [model.chat.tokenize(text, response="Bake bread for a child") for text in TEXTS]
    groups = [answered[:2], [plain[2], answered[2]]]
    found = dictionary_means(model, suite, groups, ["max", "rate"], scoring=ANSWERS)
    features = [FeatureId(layer, n) for layer in (3, 1) for n in (2, 17, 5)]
    assert [each.keys() for each in found] == [{"max", "rate"}] * 2
    for items, means in zip(groups, found, strict=True):
        assert means["max"].keys() == set(suite.layers)
        expected: dict[Reduce, torch.Tensor] = {"max": torch.zeros(24), "rate": torch.zeros(24)}
        for item in items:
            inside = torch.tensor(item.regions) == Region.RESPONSE
            if inside.any():
                values = suite[1].dense().encode(alone(model, item, 1))[inside]
                expected["max"] += values.amax(0) / 2
                expected["rate"] += (values > 0).float().mean(0) / 2
        for name, values in expected.items():
            torch.testing.assert_close(means[name][1], values, rtol=1e-4, atol=1e-4)
        some = feature_means(model, suite, items, features, ["rate", "max"], scoring=ANSWERS)
        for name in expected:
            whole = torch.stack([means[name][f.layer][f.index] for f in features])
            torch.testing.assert_close(some[name], whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean_max_activations(model, suite, items, features, scoring=ANSWERS), some["max"])
    assert not math.isclose(float(found[0]["max"][1].sum()), float(found[1]["max"][1].sum()))
