"""`Compiled.everywhere`: for code that calls the model itself, without a batch. Compared with `Compiled.on`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from demur.errors import InputError
from demur.method.interventions import (
    AblateDirection,
    AddDirection,
    Compiled,
    HoldFeatures,
    Intervention,
    PerPrompt,
    ScaleFeatures,
    SetFeatures,
)
from demur.model import ChatModel, count_hooks
from demur.saes import Suite
from demur.testing import FAMILIES, tiny_model, tiny_suite
from demur.types import FeatureId

TEXTS = ["Hi", "Tell me how to bake bread", "Explain the rules of chess to a child"]
ONE = (FeatureId(1, 3),)


def setup(family: Any = "gemma2") -> tuple[ChatModel, Suite]:
    hf, tokenizer = tiny_model(family)
    return ChatModel(hf, tokenizer, name=family), tiny_suite(hf, d_sae=24)


def changes(model: ChatModel) -> list[Intervention]:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    features = tuple(FeatureId(layer, index) for layer in range(model.n_layers) for index in (1, 5, 9))
    reference = torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(2))
    return [
        ScaleFeatures(features, -2.0),
        SetFeatures((FeatureId(2, 7),), 3.0),
        AblateDirection(vector, reference=reference),
        AddDirection(vector, 1, 0.5),
    ]


def logits(model: ChatModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return cast("Any", model.hf)(ids, attention_mask=mask).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_changes_what_a_batch_of_the_same_texts_changes(family: Any) -> None:
    model, suite = setup(family)
    compiled = Compiled(model, suite, changes(model))
    batch = model.batch(model.tokenize(TEXTS))
    with torch.inference_mode():
        plain = model.last_logits(batch)
        with compiled.on(batch):
            expected = model.last_logits(batch)
        with compiled.everywhere():
            found = model.last_logits(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found - plain).abs().max() > 0.1
    assert count_hooks(model.hf) == 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("masked", [True, False])
def test_rows_padded_on_the_right_give_what_single_rows_do(family: Any, masked: bool) -> None:
    """As harnesses do when they score given answers: without a mask, or with one."""
    model, suite = setup(family)
    compiled = Compiled(model, suite, changes(model))
    rows = [torch.tensor(item.ids) for item in model.tokenize(TEXTS)]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        mask[n, : len(row)] = 1
    with compiled.everywhere():
        together = logits(model, ids, mask if masked else None)
        for n, row in enumerate(rows):
            single = logits(model, row[None])[0]
            torch.testing.assert_close(together[n, : len(row)], single, rtol=1e-4, atol=1e-4)


def test_padding_that_the_mask_tells_is_left_alone() -> None:
    model, suite = setup()
    ids = torch.tensor([[0, 0, 9, 8, 7], [9, 8, 7, 6, 0], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    compiled = Compiled(model, suite, [SetFeatures(ONE, 50.0)])
    with model.capture([1]) as before:
        logits(model, ids, mask)
    with compiled.everywhere(), model.capture([1]) as after:
        logits(model, ids, mask)
    moved = (after[1] - before[1]).abs().sum(-1) > 0
    assert torch.equal(moved, mask.bool())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_equal_those_written_without_a_cache(family: Any) -> None:
    """Left-padded prompts of two lengths, several `generate` calls in one context; each decode step is changed."""
    model, suite = setup(family)
    compiled = Compiled(model, suite, changes(model))
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": model.pad_id}
    options |= {"repetition_penalty": 1.0}

    def by_hand(ids: Sequence[int]) -> list[int]:
        ids = list(ids)
        for _ in range(5):
            row = logits(model, torch.tensor([ids]))[0, -1]
            row[list(model.eos_ids)] = -torch.inf  # as min_new_tokens does
            ids.append(int(row.argmax()))
        return ids[-5:]

    items = model.tokenize(TEXTS)
    with torch.inference_mode(), compiled.everywhere():
        for group in ([0, 2], [1]):
            batch = model.batch([items[n] for n in group])
            tokens = cast("Any", model.hf).generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options
            )
            found = tokens[:, batch.input_ids.shape[1] :].tolist()
            assert found == [by_hand(items[n].ids) for n in group]


def test_nothing_to_do_installs_no_hook() -> None:
    model, suite = setup()
    empty: list[list[Intervention]] = [[], [ScaleFeatures((), -3.0)]]
    for none in empty:
        with Compiled(model, suite, none).everywhere():
            assert count_hooks(model.hf) == 0


def test_an_exception_leaves_no_hook() -> None:
    model, suite = setup()
    with pytest.raises(KeyError), Compiled(model, suite, changes(model)).everywhere():
        raise KeyError
    assert count_hooks(model.hf) == 0


def test_what_needs_a_batch_is_refused() -> None:
    model, suite = setup()
    vector = torch.ones(model.d_model)
    stops = [
        ScaleFeatures(ONE, 0.0, "prompt"),
        SetFeatures(ONE, 1.0, "prompt"),
        AblateDirection(vector, where="prompt"),
        AddDirection(vector, 1, where="prompt"),
    ]
    for change in stops:
        with (
            pytest.raises(InputError, match=r'stops where the prompt ends.*give it with where="all"'),
            Compiled(model, suite, [AblateDirection(vector), change]).everywhere(),
        ):
            pass
    for change in (ScaleFeatures(ONE, 0.0), HoldFeatures(ONE, torch.ones(1))):
        with (
            pytest.raises(InputError, match=r"local@.* changes single prompts"),
            Compiled(model, suite, [PerPrompt({"a": (change,)})]).everywhere(),
        ):
            pass
    assert count_hooks(model.hf) == 0
