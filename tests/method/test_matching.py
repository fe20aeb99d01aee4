"""Counterparts of features in another dictionary, with dictionaries whose answers are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from demur.method import activations
from demur.method.matching import Nearest, by_correlation, by_cosine, mutual_nearest, nearest, unit_rows
from demur.model import SCORED_REGIONS, ChatModel
from demur.saes import DenseSae, Suite
from demur.testing import tiny_model, tiny_suite
from demur.types import FeatureId


def suite_of(rows: dict[int, list[list[float]]]) -> Suite:
    """SAEs of which only the decoder matters."""
    decoders = {layer: torch.tensor(each) for layer, each in rows.items()}
    return Suite.from_dense(
        {
            layer: DenseSae(layer, w.T.contiguous(), torch.zeros(len(w)), None, w, None, torch.zeros(w.shape[1]))
            for layer, w in decoders.items()
        }
    )


def features(*pairs: tuple[int, int]) -> tuple[FeatureId, ...]:
    return tuple(FeatureId(*pair) for pair in pairs)


ONE = suite_of({0: [[3.0, 4, 0], [0, 0, 2], [0, 0, 0]], 2: [[0, 5.0, 0]], 3: [[1.0, 0, 0]]})
OTHER = suite_of({0: [[0, 0, 9.0], [0.3, 0.3, 0], [0, 0, 0], [0, 0.1, 0]], 2: [[0, -1.0, 0], [4, 3, 0]]})


def test_rows_have_length_one_in_the_order_asked_for() -> None:
    rows, norms = unit_rows(ONE, features((2, 0), (0, 1), (0, 0), (0, 2)))
    assert norms.tolist() == [5, 2, 5, 0]
    assert rows.tolist() == [pytest.approx(row) for row in ([0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0, 0])]
    none, lengths = unit_rows(ONE, ())
    assert none.shape == (0, 0)
    assert lengths.shape == (0,)


def test_the_best_by_cosine_is_signed_whatever_the_length() -> None:
    """Layer 3 has no SAE in the other suite: its feature has no counterpart, which is no failure."""
    asked = features((3, 0), (2, 0), (0, 0), (0, 1))
    found, scores = by_cosine(ONE, OTHER, asked)
    assert found == dict(zip(features((2, 0), (0, 0), (0, 1)), features((2, 1), (0, 1), (0, 0)), strict=True))
    assert [scores[each] for each in features((2, 0), (0, 0), (0, 1))] == pytest.approx([0.6, 1.4 / 2**0.5, 1.0])


def test_the_best_by_cosine_is_found_in_every_block_of_a_large_dictionary() -> None:
    rows = torch.zeros(activations.BLOCK + 3, 3)
    rows[5, 0], rows[activations.BLOCK + 1, 1] = 2.0, 0.1
    large = suite_of({0: rows.tolist()})
    found, scores = by_cosine(ONE, large, features((0, 0)))
    assert found == {FeatureId(0, 0): FeatureId(0, activations.BLOCK + 1)}
    assert scores[FeatureId(0, 0)] == pytest.approx(0.8)


def test_a_counterpart_is_mutual_if_it_would_choose_the_feature_too() -> None:
    first = suite_of({0: [[1.0, 0, 0], [1, 0.1, 0], [0, 0, 1]], 1: [[1.0, 0, 0]]})
    second = suite_of({0: [[1.0, 0, 0], [0, 0.2, 1]]})
    found = nearest(first, second, features((0, 1), (1, 0), (0, 2), (0, 0)), by_cosine)
    assert found.others == (FeatureId(0, 0), None, FeatureId(0, 1), FeatureId(0, 0))
    assert found.mutual == (False, False, True, True)
    assert found.scores == pytest.approx((1 / 1.01**0.5, math.nan, 1 / 1.04**0.5, 1.0), nan_ok=True)
    assert nearest(first, second, (), by_cosine) == Nearest((), (), ())


def test_pairs_come_with_the_best_first() -> None:
    scores = torch.tensor([[0.2, 0.1, 0.0], [0.0, 0.9, 0.0], [0.1, 0.8, 0.5]])
    assert mutual_nearest(scores) == [(1, 1, pytest.approx(0.9)), (0, 0, pytest.approx(0.2))]
    assert mutual_nearest(torch.zeros(3, 0)) == []


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return ChatModel(*tiny_model("gemma2"), name="tiny")


@pytest.mark.parametrize(("kept", "d_sae"), [(activations.KEPT_BYTES, 40), (1, 40), (1, activations.BLOCK + 8)])
def test_correlations_are_numpys_over_all_scored_tokens(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch, kept: int, d_sae: int
) -> None:
    """Whether prompts are kept together or read one by one, and the dictionary in one block or several."""
    monkeypatch.setattr(activations, "KEPT_BYTES", kept)
    items = model.tokenize(["Tell me how to bake bread", "Sing", "Explain the rules of chess to a child"])
    first, second = tiny_suite(model.hf, d_sae=24), tiny_suite(model.hf, d_sae=d_sae, seed=1)
    # A feature that never fires has no correlation with any; one whose unit is small has the same as before.
    sae = first[1].dense()
    assert sae.threshold is not None
    unit = torch.ones(24)
    unit[7] = 1e-3
    b_enc = sae.b_enc * unit
    b_enc[0] = -1e6
    small = replace(sae, w_enc=sae.w_enc * unit, b_enc=b_enc, threshold=sae.threshold * unit)
    first = Suite.from_dense({1: small, 2: first[2].dense()})
    asked = features((2, 3), (1, 0), (1, 7), (2, 11))
    found, scores = by_correlation(model, items)(first, second, asked)

    inside = [torch.isin(torch.tensor(item.regions), torch.tensor(SCORED_REGIONS)) for item in items]
    read: dict[int, torch.Tensor] = {}
    for layer in (1, 2):
        parts = [model.residuals(model.batch([item]), [layer])[layer][0] for item in items]
        read[layer] = torch.cat([part[where] for part, where in zip(parts, inside, strict=True)])

    for feature in asked:
        own, every = (suite[feature.layer].dense().encode(read[feature.layer]).numpy() for suite in (first, second))
        own = own[:, feature.index]
        if not own.any():
            assert (feature, scores[feature]) == (FeatureId(1, 0), 0.0)
            continue
        own, every = own - own.mean(), every - every.mean(0)
        norms = np.linalg.norm(own) * np.linalg.norm(every, axis=0)
        expected = np.divide(own @ every, norms, out=np.zeros(d_sae), where=norms > 1e-6)
        assert found[feature].layer == feature.layer
        assert expected[found[feature].index] == pytest.approx(expected.max(), abs=1e-4)
        assert scores[feature] == pytest.approx(expected.max(), abs=1e-4)
        assert 0.1 < scores[feature] <= 1
