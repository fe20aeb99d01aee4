"""The canonical form equals the SAE as its file means it, for every way of training one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from demur.saes import Sae, SaeSpec
from demur.saes.layouts import Convention, NamedArray, SaeWeights, memory_array


def build(
    seed: int, *, centred: bool, scale: float, unit_decoder: bool, activation: str, transposed: bool
) -> tuple[SaeWeights, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    d_model, d_sae = 5, 7
    raw = {
        "w_enc": torch.randn(d_model, d_sae, generator=generator),
        "w_dec": torch.randn(d_sae, d_model, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "b_dec": torch.randn(d_model, generator=generator),
        "threshold": torch.randn(d_sae, generator=generator),
    }

    def array(name: str, *, features_last: bool = False) -> NamedArray:
        stored = raw[name].T.contiguous() if transposed else raw[name]
        found = memory_array("test", name, stored)
        return found.T if features_last != transposed else found

    convention = Convention(
        activation=activation,  # type: ignore[arg-type]
        k=3 if activation == "topk" else None,
        centred=centred,
        scale=scale,
        unit_decoder=unit_decoder,
    )
    weights = SaeWeights(
        file="test",
        encoder=array("w_enc", features_last=True),
        decoder=array("w_dec"),
        b_enc=memory_array("test", "b_enc", raw["b_enc"]),
        b_dec=memory_array("test", "b_dec", raw["b_dec"]),
        convention=convention,
        threshold=memory_array("test", "threshold", raw["threshold"]) if activation == "jumprelu" else None,
    )
    return weights, raw


def meaning(raw: dict[str, torch.Tensor], weights: SaeWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction, step by step, in float64."""
    raw = {name: tensor.double() for name, tensor in raw.items()}
    how = weights.convention
    inner = x.double() * how.scale
    if how.centred:
        inner = inner - raw["b_dec"]
    pre = inner @ raw["w_enc"] + raw["b_enc"]
    norms = raw["w_dec"].norm(dim=1)
    if how.unit_decoder:
        pre = pre * norms
    f = pre.clamp(min=0)
    if how.activation == "jumprelu":
        f = torch.where(pre > raw["threshold"], f, 0.0)
    if how.activation == "topk":
        cut = pre.sort(dim=-1, descending=True).values[..., 2:3]
        f = torch.where(pre >= cut, f, 0.0)
    decoded = (f / norms if how.unit_decoder else f) @ raw["w_dec"] + raw["b_dec"]
    return f, decoded / how.scale


FORMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "centred": st.booleans(),
        "scale": st.sampled_from([1.0, 0.125, 3.7]),
        "unit_decoder": st.booleans(),
        "activation": st.sampled_from(["relu", "jumprelu", "topk"]),
        "transposed": st.booleans(),
    }
)


def as_sae(weights: SaeWeights) -> Sae:
    how = weights.convention
    spec = SaeSpec(layer=3, d_model=5, d_sae=7, activation=how.activation, k=how.k, source="s", identity="i")
    return Sae(spec, lambda: weights)


@given(form=FORMS)
def test_canonical_form_means_the_same(form: dict[str, Any]):
    weights, raw = build(**form)
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    dense = as_sae(weights).dense()
    f, x_hat = meaning(raw, weights, x)
    encoded = dense.encode(x)
    # Features within rounding of their threshold may fall on either side; random numbers do not hit it.
    torch.testing.assert_close(encoded.double(), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense.decode(encoded).double(), x_hat, rtol=1e-4, atol=1e-4)


@given(indices=st.lists(st.integers(0, 6), max_size=9), form=FORMS)
def test_rows_are_the_dense_ones_to_the_bit(indices: list[int], form: dict[str, Any]):
    weights, _ = build(**form)
    sae = as_sae(weights)
    dense, rows = sae.dense(), sae.rows(indices)
    assert torch.equal(rows.w_enc, dense.w_enc[:, indices])
    assert torch.equal(rows.b_enc, dense.b_enc[indices])
    assert torch.equal(rows.w_dec, dense.w_dec[indices])
    if dense.threshold is None:
        assert rows.threshold is None
    else:
        assert rows.threshold is not None
        assert torch.equal(rows.threshold, dense.threshold[indices])


@given(size=st.integers(1, 9), form=FORMS)
def test_blocks_are_the_dense_ones_to_the_bit(size: int, form: dict[str, Any]):
    weights, _ = build(**form)
    sae = as_sae(weights)
    dense = sae.dense()
    assert torch.equal(torch.cat([rows for _, rows in sae.decoder_blocks(size)]), dense.w_dec)
    if weights.convention.activation != "topk":
        assert torch.equal(torch.cat([block.w_enc for block in sae.encoder_blocks(size)], dim=1), dense.w_enc)


def small(
    w_enc: list[list[float]], w_dec: list[list[float]], convention: Convention, **arrays: list[float]
) -> SaeWeights:
    """Weights without biases; `w_enc` features first."""
    tensors = {name: memory_array("test", name, torch.tensor(values)) for name, values in arrays.items()}
    encoder, decoder = (memory_array("test", n, torch.tensor(v)) for n, v in (("w_enc", w_enc), ("w_dec", w_dec)))
    return SaeWeights("test", encoder, decoder, tensors.get("b_enc"), tensors.get("b_dec"), convention)


def test_negative_thresholds_leave_the_relu():
    # relu(-1) = 0 whatever the threshold: a JumpReLU feature is never negative.
    weights = small([[1.0]], [[1.0]], Convention(threshold=-2.0))
    assert weights.thresholds((0,)).tolist() == [0.0]  # type: ignore[union-attr]


def test_decoder_row_of_zeros_stays_zero():
    weights = small([[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [3.0, 4.0]], Convention("relu", unit_decoder=True))
    assert weights.decoder_rows(range(2)).tolist() == torch.tensor([[0.0, 0.0], [0.6, 0.8]]).tolist()
    w_enc, b_enc = weights.encoder_rows(range(2))
    assert w_enc.tolist() == [[0.0, 0.0], [5.0, 5.0]]
    assert b_enc.tolist() == [0.0, 0.0]
