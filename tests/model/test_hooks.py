"""Hooks: nesting, exceptions, nothing left behind, other people's hooks untouched."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from demur.errors import ModelError
from demur.model import Batch, ChatModel, Cursor, count_hooks, find_layers, hooked, track
from demur.testing import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def model() -> ChatModel:
    hf, tokenizer = tiny_model("gemma2")
    return ChatModel(hf, tokenizer, name="gemma2")


@pytest.fixture(scope="module")
def batch(model: ChatModel) -> Batch:
    return model.batch(model.tokenize(["Hi", "Tell me how to bake bread"]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_captured_residuals_are_the_hidden_states(family: Any) -> None:
    hf, tokenizer = tiny_model(family)
    model = ChatModel(hf, tokenizer, name=family)
    batch = model.batch(model.tokenize(["Hi", "Tell me how to bake bread"]))
    with torch.inference_mode(), model.capture() as captured:
        output = model.hf(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            output_hidden_states=True,
            use_cache=False,
        )
    assert torch.stack(list(captured.values())).shape == (model.n_layers, *batch.input_ids.shape, model.d_model)
    for layer in range(model.n_layers - 1):
        torch.testing.assert_close(captured[layer], output.hidden_states[layer + 1], rtol=0, atol=0)
    # The last entry of hidden_states is after the final norm, so it is not the last residual.
    assert not torch.allclose(captured[model.n_layers - 1], output.hidden_states[-1])


def test_a_capture_outside_an_edit_sees_what_enters_it_and_one_inside_what_leaves(
    model: ChatModel, batch: Batch
) -> None:
    def double(x: torch.Tensor, _cursor: Cursor) -> torch.Tensor:
        return 2 * x

    with (
        torch.inference_mode(),
        model.capture([1]) as entering,
        model.edited({1: [double]}),
        model.capture([1]) as leaving,
    ):
        model.last_logits(batch)
    torch.testing.assert_close(leaving[1], 2 * entering[1], rtol=0, atol=0)
    assert count_hooks(model.hf) == 0


def test_edits_of_one_layer_apply_in_order(model: ChatModel, batch: Batch) -> None:
    def add(x: torch.Tensor, _cursor: Cursor) -> torch.Tensor:
        return x + 1

    def double(x: torch.Tensor, _cursor: Cursor) -> torch.Tensor:
        return 2 * x

    with torch.inference_mode():
        with model.capture([0]) as plain:
            model.last_logits(batch)
        with model.edited({0: [add, double]}), model.capture([0]) as changed:
            model.last_logits(batch)
    torch.testing.assert_close(changed[0], 2 * (plain[0] + 1), rtol=0, atol=0)


def test_an_exception_inside_leaves_no_hook(model: ChatModel, batch: Batch) -> None:
    class Stop(Exception):
        pass

    def stop(_x: torch.Tensor, _cursor: Cursor) -> torch.Tensor:
        raise Stop

    with pytest.raises(Stop), model.capture(), model.edited({0: [stop]}), torch.inference_mode():
        model.last_logits(batch)
    assert count_hooks(model.hf) == 0


def test_a_layer_that_does_not_exist_leaves_no_hook(model: ChatModel) -> None:
    with pytest.raises(IndexError), hooked(model.layers, {0: lambda _: None, 99: lambda _: None}):
        pass
    assert count_hooks(model.hf) == 0


def test_other_hooks_stay(model: ChatModel, batch: Batch) -> None:
    calls: list[int] = []
    handle = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode(), model.capture():
        model.last_logits(batch)
    with torch.inference_mode():
        model.last_logits(batch)
    handle.remove()
    assert calls == [1, 1]


def test_no_edits_install_nothing(model: ChatModel) -> None:
    with model.edited({}), model.edited({2: []}):
        assert count_hooks(model.hf) == 0


def test_the_cursor_follows_generation(model: ChatModel, batch: Batch) -> None:
    seen: list[tuple[int, int, bool]] = []
    with (
        torch.inference_mode(),
        track(model.hf) as cursor,
        hooked(model.layers, {0: lambda _: seen.append((cursor.start, cursor.length, cursor.real is None))}),
    ):
        cast("Any", model.hf).generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=model.pad_id,
        )
    width = batch.input_ids.shape[1]
    # The prompt holds padding; afterwards every current token is real.
    assert seen == [(0, width, False), (width, 1, True), (width + 1, 1, True)]


def test_a_prepared_mask_is_refused(model: ChatModel, batch: Batch) -> None:
    with pytest.raises(ModelError, match="two-dimensional attention mask"), track(model.hf):
        model.hf(input_ids=batch.input_ids, attention_mask=torch.ones(2, 1, 4, 4))


def test_layers_are_found_in_every_family() -> None:
    for family in sorted(FAMILIES):
        hf, _ = tiny_model(family, n_layers=3)
        layers = find_layers(hf, 3)
        assert len(layers) == 3
        assert all("DecoderLayer" in type(layer).__name__ for layer in layers)


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    both = nn.ModuleDict({name: nn.ModuleList([nn.Linear(1, 1)] * 2) for name in ("one", "two")})
    with pytest.raises(ModelError, match="found one, two"):
        find_layers(both, 2)
    with pytest.raises(ModelError, match="found none"):
        find_layers(both, 3)


def test_layer_outputs_of_both_kinds() -> None:
    x = torch.ones(1, 2, 3)
    seen: list[torch.Tensor] = []

    class Old(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "cache"

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    with pytest.raises(ModelError, match="returned dict"), hooked([odd := Odd()], {0: lambda _: None}):
        odd(x)
    layer = Old()
    with hooked([layer], {0: lambda x: seen.append(x) or x + 1}):
        out = layer(x)
    assert out[1] == "cache"
    torch.testing.assert_close(out[0], x + 1)
    assert torch.equal(seen[0], x)


def test_a_compiled_model_is_refused() -> None:
    hf, tokenizer = tiny_model("gemma2")
    # What `compile()` does to a module, without importing the compiler.
    find_layers(hf, 4)[2]._compiled_call_impl = lambda *_: None
    with pytest.raises(ModelError, match=r"compiled with torch.compile.*layers\.2"):
        ChatModel(hf, tokenizer, name="m")


def test_gemma_3_in_float16_is_refused() -> None:
    hf, tokenizer = tiny_model("gemma3")
    with pytest.raises(ModelError, match=r"Gemma 3.*float16.*bfloat16"):
        ChatModel(hf.half(), tokenizer, name="m")


def test_soft_capping_without_its_kernel_is_refused() -> None:
    hf, tokenizer = tiny_model("gemma2")
    hf.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="caps its attention logits"):
        ChatModel(hf, tokenizer, name="m")


@pytest.mark.parametrize("rows", [1, 3])
def test_the_output_embedding_gets_its_states_as_one_block(rows: int) -> None:
    hf, tokenizer = tiny_model("gemma2")
    model = ChatModel(hf, tokenizer, name="tiny")
    batch = model.batch(model.tokenize(["one word", "two or more words", "a third"][:rows]))
    seen: list[tuple[int, ...]] = []
    head = cast("nn.Module", hf.get_output_embeddings())
    with torch.inference_mode():
        # What comes after the last position's slice must not show in the strides, at batch 1 neither.
        expected = hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, -1].float()
        before = count_hooks(hf)
        handle = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].stride()))
        found = model.last_logits(batch)
        model.generate(["one word", "another"], max_new_tokens=2)
        handle.remove()
    assert all(strides == (model.d_model, model.d_model, 1) for strides in seen)
    assert len(seen) == 3
    assert count_hooks(hf) == before
    torch.testing.assert_close(found, expected)


def _mixture_of_experts() -> PreTrainedModel:
    """A model whose output holds more than hidden states: the router's choices."""
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2}
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 8}
    tokenizer = tiny_model("qwen3")[1]
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **heads))


@pytest.mark.parametrize("family", [*FAMILIES, "mixture of experts"])
def test_the_head_alone_gives_the_models_own_logits(family: Any) -> None:
    """Caps and scales of logits included, and an intervention on the last layer acts once."""
    hf, tokenizer = tiny_model(family) if family in FAMILIES else (_mixture_of_experts(), tiny_model("qwen3")[1])
    model = ChatModel(hf, tokenizer, name="tiny")
    batch = model.batch(model.tokenize(["one word", "two or more words"]))
    push = torch.linspace(-1, 1, model.d_model)
    before = count_hooks(hf)
    with hooked(model.layers, {model.n_layers - 1: lambda residual: residual + push}), torch.inference_mode():
        expected = hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        states = model.final_states(batch)
        found = model.head(states[batch.real])
    torch.testing.assert_close(found, expected[batch.real], rtol=1e-4, atol=1e-4)
    assert count_hooks(hf) == before
    with torch.inference_mode():  # The pass is whole again.
        again = hf(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
        assert not torch.allclose(again, expected)
        torch.testing.assert_close(model.last_logits(batch), again[:, -1], rtol=1e-4, atol=1e-4)
