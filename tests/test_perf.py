"""The benchmarks' arms compute the same, at toy shape. Nothing is timed here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "perf"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of the benchmarks folder by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def setup(benchmark: Any) -> Any:
    common = benchmark("_common")
    return common.build(common.SHAPES["toy"], device="cpu", dtype=torch.float32, n_prompts=4, n_tokens=20)


def test_lean_attribution_is_the_dense_arms(benchmark: Any, setup: Any) -> None:
    arms = benchmark("attribution").Arms(setup, steps=4)
    found = arms.agreement()
    assert found["relative_error"] < 1e-5
    assert found["same_top"] == 20
    assert found["share_not_zero"] > 0.1
    assert not any(p.requires_grad or p.grad is not None for p in setup.model.hf.parameters())


def test_a_dense_arm_that_computes_something_else_is_noticed(benchmark: Any, setup: Any) -> None:
    attribution, common = benchmark("attribution"), benchmark("_common")
    arms = attribution.Arms(setup, steps=4)
    exact = arms.dense(frozen=True)
    arms.dense = lambda **_: [scores * (1.01 if layer == 1 else 1.0) for layer, scores in enumerate(exact)]
    with pytest.raises(common.Disagreement, match="differ by"):
        arms.agreement()


def test_weight_gradients_are_computed_only_when_parameters_are_not_frozen(benchmark: Any, setup: Any) -> None:
    attribution = benchmark("attribution")
    arms = attribution.Arms(setup, steps=1)
    touched: set[str] = set()
    parameters = [*setup.model.hf.named_parameters(), *((f"sae{n}", s.w_dec) for n, s in enumerate(setup.saes))]
    for name, parameter in parameters:
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: touched.add(name))
    arms.dense(frozen=True)
    assert touched == set()
    arms.dense(frozen=False)
    assert touched == {name for name, _ in parameters}


def test_generation_arms_agree(benchmark: Any, setup: Any) -> None:
    generation = benchmark("generation")
    arms = generation.Arms(setup, new_tokens=6)
    assert len({feature.layer for feature in arms.features}) == setup.shape.n_layers
    found = arms.agreement(4)
    assert found["logit_error"] < 1e-5
    assert found["same_tokens_as_dense"] == 1.0


def test_a_clamp_that_changes_something_else_is_noticed(
    benchmark: Any, setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, common = benchmark("generation"), benchmark("_common")
    arms = generation.Arms(setup, new_tokens=2)
    monkeypatch.setattr(generation, "FACTOR", -2.0)
    with pytest.raises(common.Disagreement, match="dense clamp"):
        arms.agreement(2)


def test_full_shapes_have_the_sizes_of_the_models_they_are_named_after(benchmark: Any) -> None:
    common = benchmark("_common")
    sizes = {"gemma-2-2b": 2_614_341_888, "llama-3.1-8b": 8_030_261_248}
    for name, expected in sizes.items():
        with torch.device("meta"):
            model = common._model(common.SHAPES[name], torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_ratios_are_taken_within_a_round(benchmark: Any) -> None:
    found = benchmark("_common").ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
