"""The plan's arithmetic, against figures worked out by hand."""

from __future__ import annotations

import pytest

from demur.plan import (
    Machine,
    ModelShape,
    SaeShape,
    Workload,
    answers_written,
    attribution_flops,
    benchmark_stages,
    dictionary_flops,
    forward_flops,
    gradient_step_flops,
    memory,
    stages,
)
from demur.studies.benchmark.config import BenchmarkConfig
from demur.studies.config import PromptSource, StudyConfig

# Per layer: q and o 2304 × 2048, k and v 2304 × 1024, gate, up and down 2304 × 9216; 26 layers. In all
# 2.614e9 parameters, with an embedding of 256,000 × 2304, which is the output matrix too.
GEMMA_2_2B = ModelShape(
    n_layers=26,
    d_model=2304,
    vocab=256_000,
    parameters=2_614_341_888,
    block_weights=26 * (2 * 2304 * 2048 + 2 * 2304 * 1024 + 3 * 2304 * 9216),
    attention_width=2048,
    kv_width=1024,
    d_ff=9216,
)
LLAMA_31_8B = ModelShape(
    n_layers=32,
    d_model=4096,
    vocab=128_256,
    parameters=8_030_261_248,
    block_weights=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336),
    attention_width=4096,
    kv_width=1024,
    d_ff=14_336,
)
GEMMA_SAES = SaeShape(layers=tuple(range(26)), d_sae=65_536)
PROMPTS = (PromptSource(source="any"),)


def config(**options: object) -> StudyConfig:
    return StudyConfig.model_validate({"model": "m", "harmful": PROMPTS, "harmless": PROMPTS, **options})


@pytest.mark.parametrize(
    ("model", "blocks", "with_logits"), [(GEMMA_2_2B, 4.05e9, 5.23e9), (LLAMA_31_8B, 13.96e9, 15.01e9)]
)
def test_forward_pass_of_known_models(model: ModelShape, blocks: float, with_logits: float) -> None:
    assert forward_flops(model, 1, 0) == pytest.approx(blocks, rel=2e-3)
    assert forward_flops(model, 1, 1) == pytest.approx(with_logits, rel=2e-3)


def test_gradient_step_is_two_forwards_with_last_logits_only() -> None:
    # 2 × (4.049 + 1.180 / 40) GFLOP per token at 40 tokens.
    assert gradient_step_flops(GEMMA_2_2B, 40, 1) / 40 == pytest.approx(8.157e9, rel=1e-3)


def test_attribution_is_two_runs_and_ten_steps() -> None:
    # 2 × 4.078 + 10 × 8.157 = 89.7 GFLOP per token.
    assert attribution_flops(GEMMA_2_2B, 40, 1, 10) / 40 == pytest.approx(89.7e9, rel=1e-3)


def test_dense_encoding_is_half_of_encode_and_decode() -> None:
    # 2 × 2304 × 65,536 × 26 = 7.85 GFLOP per token.
    assert dictionary_flops(GEMMA_2_2B, GEMMA_SAES, 1) == pytest.approx(7.852e9, rel=1e-3)


def test_answers_of_the_default_study() -> None:
    # Baseline 2 × (128 + 32 + 32 + 100) = 584. Tuning 32 × (3 × 2 + 4) = 320. Test: features and one random
    # set over 3 + 4 strengths and the side effects, 16 sets, and 5 with the direction: 100 × 21.
    assert answers_written(config()) == 584 + 320 + 2100
    assert answers_written(config(suppress=(0.0,), induce=(1.0,))) == 584 + 32 * 3 + 100 * 11


def work(**changes: object) -> Workload:
    values: dict[str, object] = {
        "config": config(),
        "model": GEMMA_2_2B,
        "saes": GEMMA_SAES,
        "value_bytes": 2,
        "prompt_tokens": 40,
    }
    return Workload.model_validate(values | changes)


def test_memory_of_gemma_2_2b_in_bfloat16() -> None:
    held = memory(work(batch_tokens=1000))
    assert held.weights == 5_228_683_776
    # 260 features, encoder and decoder row of 2304 float32 each.
    assert held.rows == 260 * 2 * 2304 * 4
    assert held.dictionary == 65_536 * 2304 * 4
    # Per token and layer 4 × 2304 + 2 × 2048 + 2 × 1024 + 3 × 9216 = 43,008 values of 2 bytes.
    assert held.activations == 1000 * 26 * 43_008 * 2
    assert held.peak == held.weights + held.rows + held.activations


def test_topk_saes_hold_their_encoders() -> None:
    lean, whole = (memory(work(saes=GEMMA_SAES.model_copy(update={"whole_encoder": whole}))) for whole in (False, True))
    assert whole.rows - lean.rows == 26 * 65_536 * 2304 * 4


def test_a_small_batch_peaks_while_a_dictionary_is_read() -> None:
    held = memory(work(batch_tokens=10))
    assert held.peak == held.weights + held.dictionary


TOY = ModelShape(
    n_layers=10,
    d_model=10,
    vocab=100,
    parameters=10_000,
    block_weights=1000,
    attention_width=10,
    kv_width=10,
    d_ff=40,
)
TOY_WORK = Workload(
    config=config(
        n_direction=4,
        n_selection=2,
        n_tuning=2,
        n_test=2,
        n_exact=2,
        k0=3,
        estimator="ig",
        steps=5,
        max_new_tokens=11,
        suppress=(0.0,),
        induce=(1.0,),
    ),
    model=TOY,
    saes=SaeShape(layers=(1, 2), d_sae=50),
    value_bytes=4,
    prompt_tokens=10,
    template_positions=3,
    batch_tokens=84,
)


def test_every_stage_of_a_toy_study_by_hand() -> None:
    # A token costs 2000, a logit position 2000; so a prompt of ten tokens costs 22,000 and a new token 4000.
    found = {stage.name: stage for stage in stages(TOY_WORK, Machine(flops=1e6, bandwidth=1e9))}
    assert found["baseline"].flops == 20 * (22_000 + 10 * 4000)
    # 8 prompts for the means; (8 layers × 3 positions × (1 + 2 × 2) + 1 clean) × 2 prompts.
    assert found["direction"].flops == (8 + 121 * 2) * 22_000
    assert found["pool"].flops == 2 * 10 * 50 * 2
    assert found["attribution"].flops == 2 * (2 + 2 * 5) * 22_000
    # 6 features on 2 prompts; estimators of 1, 5 and 5 steps: 4 + 12 + 12 passes on 2 prompts.
    assert found["exact patching"].flops == (12 + 28 * 2) * 22_000
    # Firing rates on both classes; peaks on harmful prompts, of F* alone.
    assert found["activations"].flops == 6 * 22_000 + 40 * 2 * 10 * 50 * 2
    # Tuning 2 × (2 + 1) answers, test 2 × (2 × (1 + 1 + 1) + 5).
    assert found["validation"].flops == (6 + 22) * (22_000 + 10 * 4000)
    # Half of a million operations per second.
    assert found["direction"].seconds == pytest.approx(250 * 22_000 / 5e5)


def test_writing_is_bound_by_reading_weights_where_memory_is_slow() -> None:
    # 20 answers in 8 sets of 2 or 4, batches of up to 84 // 21 = 4: 8 batches × 10 steps × 40,000 bytes.
    (baseline, *_) = stages(TOY_WORK, Machine(flops=1e12, bandwidth=1000))
    assert baseline.traffic == 8 * 10 * 40_000
    assert baseline.seconds == pytest.approx(3200.0, rel=1e-3)


def test_a_fixed_direction_is_searched_in_one_place() -> None:
    fixed = TOY_WORK.config.model_copy(
        update={"direction_layer": 3, "direction_position": -1, "direction_form": "linear"}
    )
    found = stages(TOY_WORK.model_copy(update={"config": fixed}), Machine(flops=1e6, bandwidth=1e9))
    # 8 prompts for the means; 3 passes and the clean one over 2 prompts.
    assert found[1].flops == (8 + 4 * 2) * 22_000


def test_calls_of_layers_rule_a_machine_that_is_slow_to_start_them() -> None:
    costs = {each.name: each for each in stages(TOY_WORK, Machine(flops=1e15, bandwidth=1e15, layer_call=0.5))}
    # 8 batches, each the prompt's pass and 10 steps, through 10 layers.
    assert costs["baseline"].seconds == pytest.approx(8 * 11 * 10 * 0.5)
    # The means: 8 prompts of 10 tokens in one batch of 84; 121 passes over 2 prompts.
    assert costs["direction"].seconds == pytest.approx((1 + 121) * 10 * 0.5)
    # Two ends, and five steps of a forward and a backward pass.
    assert costs["attribution"].seconds == pytest.approx((2 + 5 * 3) * 10 * 0.5)


def test_memory_counts_what_the_libraries_hold() -> None:
    bare = memory(work())
    held = memory(work(), Machine(flops=1, bandwidth=1, resident=7_000))
    assert held.peak == bare.peak + 7_000


def test_answers_of_a_toy_benchmark_by_hand() -> None:
    options = {
        "methods": ("cossim+ap-local", "cossim", "random", "direction"),
        "suppress": (0.0, -1.0),
        "random_seeds": 3,
        "sizes": (1, 2, 50),
        "knowledge": False,
    }
    bench = BenchmarkConfig.model_validate(TOY_WORK.config.model_dump() | options)
    costs = benchmark_stages(
        TOY_WORK.model_copy(update={"config": bench}), Machine(flops=1e6, bandwidth=1e9), over_refusal=4, texts=0
    )
    found = {each.name: each.flops for each in costs}
    answer = 22_000 + 10 * 4000
    # F*, cossim and the direction: 2 + 2 + 1 changes, on both classes of 2 tuning prompts; their losses on 2 answers of
    # 10 + 11 tokens, logits at the last token and at 11 more.
    scored = 2 * (21 * 2000 + 2000 + 11 * 2000)
    assert found["tuning"] == 5 * 4 * answer + 5 * scored
    # F* and cossim at 2 factors, 3 random sets at 2, the direction, and local sets: 12 sets of answers to 2 prompts.
    # Local sets are attributed with 5 steps; random sets need firing rates on 4 prompts.
    local = 2 * (2 + 2 * 5) * 22_000
    rates = 4 * 22_000 + 40 * 2 * 10 * 50 * 2
    assert found["suppression"] == 12 * 2 * answer + local + rates
    # v = 1 for F*, cossim and 3 random sets, four multiples of the direction: tuned without the random sets.
    assert found["induction"] == (2 + 4) * 2 * answer + (5 + 4) * 2 * answer
    # F*, cossim, 3 random sets, direction on harmless prompts; the same and the clean model on 4 others.
    assert found["side effects"] == 6 * 2 * answer + 7 * 4 * answer
    # The pool holds 6 features, so sizes 1 and 2 are measured.
    assert found["sizes of F*"] == 2 * 2 * answer + 2 * scored
    # 11 changes and none: losses, and two passes for the divergence.
    assert found["damage"] == 12 * (scored + 2 * 2 * 22_000)
    assert "search" not in found
