"""The variants of the performance scripts compute the same, at toy shape. Nothing is timed here."""

from __future__ import annotations

import pytest
import torch

from perf import attribution, common, generation, stages


@pytest.fixture
def setup() -> common.Setup:
    return common.build(common.SHAPES["toy"], device="cpu", dtype=torch.float32, n_prompts=4, n_tokens=20)


def test_lean_attribution_is_the_dense_variants(setup: common.Setup) -> None:
    variants = attribution.Variants(setup, steps=4)
    found = variants.agreement()
    assert found["relative_error"] < 1e-5
    assert found["same_top"] == 20
    assert found["share_not_zero"] > 0.1
    assert not any(p.requires_grad or p.grad is not None for p in setup.model.hf.parameters())


def test_a_dense_variant_that_computes_something_else_is_noticed(setup: common.Setup) -> None:
    variants = attribution.Variants(setup, steps=4)
    exact = variants.dense(frozen=True)
    variants.dense = lambda **_: [scores * (1.01 if layer == 1 else 1.0) for layer, scores in enumerate(exact)]
    with pytest.raises(common.Disagreement, match="differ by"):
        variants.agreement()


def test_weight_gradients_are_computed_only_when_parameters_are_not_frozen(setup: common.Setup) -> None:
    variants = attribution.Variants(setup, steps=1)
    touched: set[str] = set()
    parameters = [*setup.model.hf.named_parameters(), *((f"sae{n}", s.w_dec) for n, s in enumerate(setup.saes))]
    for name, parameter in parameters:
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: touched.add(name))
    variants.dense(frozen=True)
    assert touched == set()
    variants.dense(frozen=False)
    assert touched == {name for name, _ in parameters}


def test_generation_variants_agree(setup: common.Setup) -> None:
    variants = generation.Variants(setup, new_tokens=6)
    assert len({feature.layer for feature in variants.features}) == setup.shape.n_layers
    found = variants.agreement(4)
    assert found["logit_error"] < 1e-5
    assert found["same_tokens_as_dense"] == 1.0


def test_a_clamp_that_changes_something_else_is_noticed(setup: common.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = generation.Variants(setup, new_tokens=2)
    monkeypatch.setattr(generation, "FACTOR", -2.0)
    with pytest.raises(common.Disagreement, match="dense clamp"):
        variants.agreement(2)


def test_full_shapes_have_the_sizes_of_the_models_they_are_named_after() -> None:
    sizes = {"gemma-2-2b": 2_614_341_888, "llama-3.1-8b": 8_030_261_248}
    for name, expected in sizes.items():
        with torch.device("meta"):
            model = common.random_model(common.SHAPES[name], torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_ratios_are_taken_within_a_round() -> None:
    found = common.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)


def test_operations_of_matrix_products_are_counted_forward_backward_and_in_inference_mode() -> None:
    layer, x = torch.nn.Linear(16, 32, bias=False), torch.randn(3, 5, 16)
    product = 2 * (3 * 5) * 16 * 32

    def gradient() -> None:
        point = x.clone().requires_grad_()
        torch.autograd.grad(layer(point).sum(), [point])

    def inference() -> None:
        with torch.inference_mode():
            layer(x)

    layer.requires_grad_(False)
    assert stages.flops_of(lambda: layer(x)) == product
    assert stages.flops_of(inference) == product
    assert stages.flops_of(gradient) == 2 * product
    assert stages.flops_of(lambda: x + x) == 0
