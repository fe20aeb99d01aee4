"""Batches: grouping by length, halving when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import ModelError
from demur.method.attribution import attribute
from demur.method.interventions import AblateDirection, Compiled
from demur.method.path import Metric
from demur.model import Batch, ChatModel, by_length, halving, next_batch, peak_memory
from demur.testing import tiny_model, tiny_suite


def batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    left, found = by_length(lengths), []
    while left:
        found.append(next_batch(lengths, left, limit))
        left = left[len(found[-1]) :]
    return found


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_item_once_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = batches(lengths, limit)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= limit


def test_batches_fill_up() -> None:
    assert batches([5, 5, 5, 2, 2], 10) == [[0, 1], [2, 3], [4]]


def test_a_batch_ends_where_its_padding_would_cost_more_than_a_pass() -> None:
    lengths = [10, 9, 9, 8, 2, 2]
    assert next_batch(lengths, range(6), 1000) == [0, 1, 2, 3, 4, 5]
    assert next_batch(lengths, range(6), 1000, padding=4) == [0, 1, 2, 3]
    assert next_batch(lengths, range(6), 1000, padding=3) == [0, 1, 2]
    assert next_batch(lengths, range(6), 20, padding=4) == [0, 1]
    assert next_batch(lengths, [4, 5], 1, padding=0) == [4]


def test_conversations_of_other_lengths_get_passes_of_their_own() -> None:
    model = ChatModel(*tiny_model("llama3"), name="tiny")
    items = model.tokenize(["Hi", "Bread and butter " * 30, "Sing"])
    found = list(model.over_batches(items, lambda batch: tuple(batch.input_ids.shape)))
    assert found == [((1,), (1, len(items[1]))), ((0, 2), (2, len(items[2])))]


def test_running_out_of_memory_halves_the_batch() -> None:
    tried: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        tried.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(items)

    assert [x for part in halving(list(range(5)), run, lambda: False) for x in part] == [0, 1, 2, 3, 4]
    assert tried == [5, 3, 2, 1, 2]


def test_a_single_prompt_is_tried_again_as_long_as_something_can_be_lowered() -> None:
    packed = [8]

    def run(_items: Sequence[int]) -> int:
        if packed[0] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return packed[0]

    def shrink() -> bool:
        before, packed[0] = packed[0], max(3 if stuck else 1, packed[0] // 2)
        return packed[0] < before

    stuck = False
    assert list(halving([0], run, shrink)) == [2]
    packed[0], stuck = 8, True
    with pytest.raises(ModelError, match="memory ran out on a single prompt"):
        list(halving([0], run, shrink))


def test_other_errors_pass() -> None:
    def run(_items: Sequence[int]) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(halving([0, 1], run, lambda: True))


@pytest.mark.parametrize("method", ["exact", "ig", "gradient"])
def test_attribution_finds_its_way_under_a_tight_memory(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass of more than so many tokens fails; the values are those of a machine without that limit."""
    hf, tokenizer = tiny_model("gemma2")
    texts = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child"]
    pool = {0: range(8), 2: range(8)}

    def attributed(model: ChatModel) -> Any:
        patch = Compiled(model, None, [AblateDirection(torch.ones(model.d_model))])
        suite = tiny_suite(hf, d_sae=24)
        return attribute(
            model,
            suite,
            model.tokenize(texts),
            pool,
            patch=patch,
            metric=Metric((5,)),
            method=method,
            steps=4,
        ).totals

    expected = attributed(ChatModel(hf, tokenizer, name="m"))
    model = ChatModel(hf, tokenizer, name="m")
    longest = max(len(item) for item in model.tokenize(texts))
    plain = ChatModel.last_logits

    def limited(self: ChatModel, batch: Batch) -> Any:
        if batch.input_ids.numel() > 2 * longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch)

    monkeypatch.setattr(ChatModel, "last_logits", limited)
    torch.testing.assert_close(attributed(model), expected, rtol=1e-3, atol=1e-5)
    assert model.budgets.plain < ChatModel(hf, tokenizer, name="m").budgets.plain


def test_places_say_where_results_belong_and_skipping_leaves_batches_as_they_were() -> None:
    hf, tokenizer = tiny_model("qwen3")
    model = ChatModel(hf, tokenizer, name="m", max_batch_tokens=60)
    items = model.tokenize([("word " * n).strip() for n in (1, 9, 2, 8, 3, 7)])

    def lengths(batch: Batch) -> list[int]:
        return batch.attention_mask.sum(1).tolist()

    parts = list(model.over_batches(items, lengths))
    assert len(parts) > 1
    for rows, found in parts:
        assert [len(items[row]) for row in rows] == found
    first = {items[place].prompt_id for place in parts[0][0]}
    rest = [places for places, _ in model.over_batches(items, lengths, take=lambda keys: not first >= set(keys))]
    assert rest == [rows for rows, _ in parts[1:]]


def test_peak_memory_of_a_process_covers_what_it_has_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(50_000_000)  # 200 MB
    after = peak_memory(torch.device("cpu"))
    del held
    assert after >= 200_000_000
    assert after >= before
    assert peak_memory(torch.device("cpu")) >= after
