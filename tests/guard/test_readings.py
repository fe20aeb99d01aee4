"""Readings against a full forward pass, token by token."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from demur.errors import InputError
from demur.guard import Pooling, Reader, Reading, read_prompts
from demur.method.interventions import AblateDirection, bind
from demur.model import Region, count_hooks
from demur.types import FeatureId


def by_hand(made, texts, layer, pooling, rows=None) -> np.ndarray:
    """The same from the residuals of one whole, unbatched pass a prompt."""
    found = []
    for text in texts:
        item = made.model.chat.tokenize(text)
        batch = made.model.batch([item])
        with torch.inference_mode(), made.model.capture([layer]) as residuals:
            made.model.last_logits(batch)
        x = residuals[layer][0].float()
        x = x if rows is None else rows.encode(x)
        regions = np.array(item.regions)
        scored = np.flatnonzero(regions >= Region.INSTRUCTION)
        words = np.flatnonzero(regions == Region.INSTRUCTION)
        found.append(
            {"last": x[len(item) - 1], "instruction": x[words[-1]],
             "mean": x[scored].mean(0), "max": x[scored].max(0).values}[pooling].numpy()
        )  # fmt: skip
    return np.stack(found)


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_each_pooling_reads_its_tokens(made, pooling: Pooling) -> None:
    texts = ["What is bread?", *made.truth.harmful.texts[:3], made.truth.harmless.texts[0] + " today at home"]
    features = (FeatureId(2, 5), FeatureId(1, 7), FeatureId(2, 0))
    readings = [
        Reading(kind="dense", layer=1, pooling=pooling),
        Reading(kind="features", features=features, pooling=pooling),
    ]
    dense, sparse = read_prompts(made.model, texts, readings, made.truth.suite)
    assert dense.dtype == sparse.dtype == np.float32
    np.testing.assert_allclose(dense, by_hand(made, texts, 1, pooling), rtol=1e-5, atol=1e-4)
    for column, (layer, index) in enumerate(features):
        rows = made.truth.suite[layer].rows([index])
        expected = by_hand(made, texts, layer, pooling, rows)[:, 0]
        np.testing.assert_allclose(sparse[:, column], expected, rtol=1e-4, atol=1e-3)


def test_a_whole_dictionary_keeps_the_order_of_its_features(made) -> None:
    size = made.truth.suite[0].spec.d_sae
    forward = tuple(FeatureId(0, n) for n in range(size))
    readings = [Reading(kind="features", features=each, pooling="max") for each in (forward, forward[::-1])]
    one, other = read_prompts(made.model, made.truth.harmful.texts[:4], readings, made.truth.suite)
    assert (one > 0).any()
    np.testing.assert_array_equal(one, other[:, ::-1])


def test_the_pass_ends_after_the_deepest_layer_and_leaves_no_hook(made) -> None:
    called: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, n=n: called.append(n)) for n, layer in enumerate(made.model.layers)
    ]
    try:
        before = count_hooks(made.model.hf)
        read_prompts(made.model, ["one prompt"], [Reading(kind="dense", layer=n) for n in (2, 1)])
        assert called == [0, 1, 2]
        assert count_hooks(made.model.hf) == before
    finally:
        for handle in handles:
            handle.remove()


def test_open_interventions_act_on_what_is_read(made) -> None:
    reading = Reading(kind="dense", layer=2)
    direction = torch.zeros(made.model.d_model)
    direction[3] = 1.0
    (clean,) = read_prompts(made.model, ["one prompt"], [reading])
    with made.model.intervene(bind(None, AblateDirection(direction))):
        (changed,) = read_prompts(made.model, ["one prompt"], [reading])
    assert abs(clean[0, 3]) > 1e-3
    assert abs(changed[0, 3]) < 1e-6


def test_an_error_in_the_pass_is_not_taken_for_its_end(made) -> None:
    def fail(_x: Tensor) -> None:
        raise RuntimeError("in the pass")

    with made.model.capture([0], transform=fail), pytest.raises(RuntimeError, match="in the pass"):
        read_prompts(made.model, ["one prompt"], [Reading(kind="dense", layer=1)])


def test_bad_readings_are_refused(made) -> None:
    with pytest.raises(InputError, match=r"layer 9 .* has 0 to 3"):
        Reader(made.model, [Reading(kind="dense", layer=9)])
    with pytest.raises(InputError, match="no SAEs"):
        Reader(made.model, [Reading(kind="features", features=(FeatureId(0, 0),))])
    with pytest.raises(ValueError, match="at least one feature"):
        Reading(kind="features")
    with pytest.raises(ValueError, match="has a layer"):
        Reading(kind="dense")


def test_no_prompts_give_empty_arrays(made) -> None:
    (found,) = read_prompts(made.model, [], [Reading(kind="dense", layer=1)])
    assert found.shape == (0, made.model.d_model)
