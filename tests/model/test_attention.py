"""Attention of models that cap its logits, against the one of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache

from demur.model import ChatModel
from demur.testing import save_tiny, tiny_model

TEXTS = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child"]


@pytest.fixture
def both(tmp_path: Path) -> tuple[Any, ChatModel]:
    """A Gemma 2 with transformers' attention, and as demur loads it."""
    save_tiny("gemma2", tmp_path)
    return tiny_model("gemma2")[0], ChatModel.load(tmp_path)


def test_logits_and_gradients_are_those_of_transformers(both: tuple[Any, ChatModel]) -> None:
    """A padded batch, longer than the window of half of the layers; with keys and values of a pass before."""
    plain, model = both
    batch = model.batch(model.tokenize(TEXTS))
    config: Any = model.hf.config
    assert config.num_attention_heads > config.num_key_value_heads
    assert batch.input_ids.shape[1] > config.sliding_window
    found: list[tuple[torch.Tensor, ...]] = []
    for each in (plain, cast("Any", model.hf)):
        cache = DynamicCache(config=each.config)
        options = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        embedded = each.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        logits = each(inputs_embeds=embedded, past_key_values=cache, use_cache=True, **options).logits
        # Padding attends to nothing and means nothing.
        (logits * batch.real[..., None]).square().sum().backward()
        longer = torch.cat([batch.attention_mask, torch.ones(len(batch), 1, dtype=torch.long)], 1)
        step = each(
            input_ids=logits[:, -1:].argmax(-1),
            attention_mask=longer,
            position_ids=batch.position_ids[:, -1:] + 1,
            past_key_values=cache,
        )
        assert embedded.grad is not None
        found.append((logits.detach()[batch.real], embedded.grad[batch.real], step.logits.detach()))
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 1e-2
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


def test_only_models_that_cap_their_logits_get_it(both: tuple[Any, ChatModel], tmp_path: Path) -> None:
    plain, model = both
    assert plain.config._attn_implementation == "eager"
    assert cast("Any", model.hf.config)._attn_implementation == "demur_grouped"
    save_tiny("llama3", tmp_path / "llama")
    assert cast("Any", ChatModel.load(tmp_path / "llama").hf.config)._attn_implementation == "sdpa"
