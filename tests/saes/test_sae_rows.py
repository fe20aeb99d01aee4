"""Encoding and decoding with weights small enough to work out by hand."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from demur.errors import SaeError
from demur.saes import DenseSae, FeatureRows, Suite, TopKRows


def ones(*, threshold: float | None = None, k: int | None = None, layer: int = 0) -> DenseSae:
    """d_model 2, three features: encoder ones, biases 0, 1, -1, decoder rows 1, 2, 3, output bias 10."""
    return DenseSae(
        layer=layer,
        w_enc=torch.ones(2, 3),
        b_enc=torch.tensor([0.0, 1.0, -1.0]),
        threshold=None if threshold is None else torch.full((3,), threshold),
        k=k,
        w_dec=torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
        b_dec=torch.tensor([10.0, 10.0]),
    )


def test_relu_by_hand():
    sae = ones()
    # pre-activations: 1 + 2 + bias = 3, 4, 2; and -1 + bias = -1, 0, -2
    encoded = sae.encode(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    assert encoded.tolist() == [[3.0, 4.0, 2.0], [0.0, 0.0, 0.0]]
    # 3·1 + 4·2 + 2·3 + 10 = 27; nothing active leaves the bias
    assert sae.decode(encoded).tolist() == [[27.0, 27.0], [10.0, 10.0]]
    assert sae.activation == "relu"


def test_jumprelu_by_hand_is_strict_at_the_threshold():
    sae = ones(threshold=3.0)
    assert sae.encode(torch.tensor([1.0, 2.0])).tolist() == [0.0, 4.0, 0.0]
    assert sae.encode(torch.tensor([1.0, 2.5])).tolist() == [3.5, 4.5, 0.0]


def test_topk_by_hand():
    sae = ones(k=1)
    assert sae.encode(torch.tensor([1.0, 2.0])).tolist() == [0.0, 4.0, 0.0]
    # the largest pre-activation is negative, so nothing is active
    assert sae.encode(torch.tensor([-4.0, 0.0])).tolist() == [0.0, 0.0, 0.0]
    rows = sae.sae().rows([2, 1])
    assert isinstance(rows, TopKRows)
    assert rows.encode(torch.tensor([[1.0, 2.0]])).tolist() == [[0.0, 4.0]]
    assert rows.w_dec.tolist() == [[3.0, 3.0], [2.0, 2.0]]
    assert rows.w_enc.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert rows.b_enc.tolist() == [-1.0, 1.0]
    assert rows.to("cpu").encode(torch.tensor([1.0, 2.0])).tolist() == [0.0, 4.0]


def test_rows_by_hand_in_the_order_asked():
    rows = ones(threshold=2.5).sae().rows([2, 0])
    assert isinstance(rows, FeatureRows)
    assert rows.indices == (2, 0)
    assert rows.encode(torch.tensor([[[1.0, 2.0]]])).tolist() == [[[0.0, 3.0]]]
    assert rows.w_dec.tolist() == [[3.0, 3.0], [1.0, 1.0]]
    assert rows.to("cpu").encode(torch.tensor([1.0, 2.0])).tolist() == [0.0, 3.0]


def test_encode_is_float32_whatever_comes_in():
    # 1 + 2^-12 is 1 in bfloat16, so a threshold compared there would not be exceeded.
    sae = DenseSae(
        layer=0,
        w_enc=torch.tensor([[1.0 + 2**-12]]),
        b_enc=torch.zeros(1),
        threshold=torch.tensor([1.0]),
        k=None,
        w_dec=torch.ones(1, 1),
        b_dec=torch.zeros(1),
    )
    x = torch.ones(1, dtype=torch.bfloat16)
    for encode in (sae.encode, sae.sae().rows([0]).encode):
        assert encode(x).dtype == torch.float32
        assert encode(x).tolist() == [1.0 + 2**-12]


@pytest.mark.parametrize(
    ("threshold", "k", "expected"),
    [(None, None, [3.0, 3.0]), (3.0, None, [1.0, 1.0]), (None, 2, [2.0, 2.0])],
)
def test_gradient_is_that_of_the_active_features(threshold: float | None, k: int | None, expected: list[float]):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    rows = ones(threshold=threshold, k=k).sae().rows([0, 1, 2])
    rows.encode(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == expected


def test_blocks_cover_the_dictionary_in_order():
    sae = ones(threshold=1.0).sae()
    assert [(start, rows[:, 0].tolist()) for start, rows in sae.decoder_blocks(2)] == [
        (0, [1.0, 2.0]),
        (2, [3.0]),
    ]
    blocks = list(sae.encoder_blocks(2))
    assert [block.b_enc.tolist() for block in blocks] == [[0.0, 1.0], [-1.0]]
    assert [block.w_enc.shape[1] for block in blocks] == [2, 1]
    whole = list(sae.blocks(2))
    assert [block.b_enc.tolist() for block in whole] == [[0.0, 1.0], [-1.0]]
    assert [block.w_dec[:, 0].tolist() for block in whole] == [[1.0, 2.0], [3.0]]


def test_a_topk_dictionary_is_one_block():
    sae = ones(k=1).sae()
    x = torch.tensor([[1.0, 2.0]])
    for blocks in (list(sae.encoder_blocks(2)), list(sae.blocks(2))):
        assert [block.encode(x).tolist() for block in blocks] == [sae.dense().encode(x).tolist()]


def test_block_of_no_features_is_refused():
    with pytest.raises(SaeError, match="at least one feature, not 0"):
        list(ones().sae().decoder_blocks(0))


@pytest.mark.parametrize("index", [3, -1])
def test_index_out_of_range_names_what_exists(index: int):
    with pytest.raises(SaeError, match=f"features 0 to 2, not {index}"):
        ones().sae().rows([0, index])


def test_no_rows_is_allowed():
    rows = ones().sae().rows([])
    assert rows.encode(torch.ones(4, 2)).shape == (4, 0)


def test_values_are_frozen():
    with pytest.raises(FrozenInstanceError):
        ones().layer = 1  # type: ignore[misc]


def test_suite_is_a_mapping_in_layer_order():
    suite = Suite.from_dense({4: ones(layer=4), 1: ones(layer=1, threshold=1.0)})
    assert suite.layers == (1, 4)
    assert [spec.activation for spec in suite.specs] == ["jumprelu", "relu"]
    assert 4 in suite
    assert 2 not in suite
    assert suite.get(2) is None
    assert suite.describe() == ("2 SAEs on layers 1, 4, 3 features, d_model 2, jumprelu and relu, from memory")
    with pytest.raises(SaeError, match=r"no SAE for layer 9; it has layers 1, 4 \(nearest: 4\)"):
        suite[9]


def test_suite_identity_is_that_of_the_numbers():
    one = Suite.from_dense({0: ones()})
    assert one.identity == Suite.from_dense({0: ones()}).identity
    assert one.identity != Suite.from_dense({0: ones(threshold=0.0)}).identity


def test_suite_refuses_wrong_layers_and_nothing():
    with pytest.raises(SaeError, match="layer 1 was given for layer 2"):
        Suite.from_dense({2: ones(layer=1)})
    with pytest.raises(SaeError, match="holds no SAEs"):
        Suite.from_dense({})


def test_suite_check():
    suite = Suite.from_dense({4: ones(layer=4)})
    suite.check(d_model=2, n_layers=5)
    with pytest.raises(SaeError, match=r"width 2, but the model's are 3"):
        suite.check(d_model=3, n_layers=5)
    with pytest.raises(SaeError, match="layer 4, but the model has 0 to 3"):
        suite.check(d_model=2, n_layers=4)
