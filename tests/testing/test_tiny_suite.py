"""Random SAEs fit the tiny models and fire at a sensible rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from demur.testing import FAMILIES, Family, tiny_model, tiny_suite

TEXT = "Tell me how to plan a quiet garden in the spring, and write a letter about it to a friend."


def _residuals(model: Any, tokenizer: Any) -> list[Tensor]:
    caught: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: caught.append(out)) for layer in model.get_decoder().layers
    ]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["jumprelu", "relu", "topk"])
def test_fits_the_model_and_fires_now_and_then(family: Family, activation: Any) -> None:
    model, tokenizer = tiny_model(family)
    suite = tiny_suite(model, activation=activation)
    suite.check(d_model=32, n_layers=4)
    assert suite.layers == (0, 1, 2, 3)
    for layer, residual in enumerate(_residuals(model, tokenizer)):
        sae = suite[layer].dense()
        active = sae.encode(residual[0, 1:]) > 0
        assert suite[layer].spec.activation == activation
        assert 0.02 < float(active.float().mean()) < 0.35
        assert int(active.any(0).sum()) > 20
        torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(64))


def test_seed_and_width() -> None:
    model, _ = tiny_model("gemma2")
    assert tiny_suite(model).identity == tiny_suite(model).identity
    assert tiny_suite(model).identity != tiny_suite(model, seed=1).identity
    assert {spec.d_sae for spec in tiny_suite(model, d_sae=20).specs} == {20}


def test_leaves_no_hook_behind() -> None:
    model, _ = tiny_model("llama3")
    tiny_suite(model)
    assert not any(module._forward_hooks for module in model.modules())
