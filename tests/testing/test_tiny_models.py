"""The tiny models have the traits of the real families that code must cope with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from demur.errors import InputError
from demur.testing import FAMILIES, SLIDING_WINDOW, Family, save_tiny, tiny_model

PROMPTS = (
    "Tell me how to bake bread.",
    "Curly ’quotes’, ümlaut, 漢字, 🙂\n\n  two  spaces\tand 12345",
    "Write a story about a train that is always late and never ever on time.",
    "Hi",
)
BOS = {
    "gemma2": "<bos>",
    "gemma3": "<bos>",
    "gemma3_multimodal": "<bos>",
    "llama3": "<|begin_of_text|>",
    "qwen2.5": None,
    "qwen3": None,
}
RENDERED = {
    "gemma2": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "gemma3": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "gemma3_multimodal": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
}

every_family = pytest.mark.parametrize("family", FAMILIES)


def _render(family: Family, messages: list[dict[str, str]], **options: Any) -> str:
    _, tokenizer = tiny_model(family)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert isinstance(text, str)
    return text


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _layers(model: Any) -> Any:
    return model.get_decoder().layers


def _last_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@every_family
def test_rendered_prompt_is_the_familys(family: Family) -> None:
    assert _render(family, _user("Hi"), date_string="26 Jul 2024", enable_thinking=False) == RENDERED[family]


@every_family
def test_any_text_survives_encoding(family: Family) -> None:
    _, tokenizer = tiny_model(family)
    for text in PROMPTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@every_family
def test_special_tokens_of_the_template_are_single_tokens(family: Family) -> None:
    _, tokenizer = tiny_model(family)
    ids = tokenizer(RENDERED[family], add_special_tokens=False)["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    for marker in ("<bos>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>", "<|im_start|>", "<think>"):
        assert names.count(marker) == RENDERED[family].count(marker)


@every_family
def test_encoding_a_rendered_prompt_by_default_doubles_bos(family: Family) -> None:
    _, tokenizer = tiny_model(family)
    assert tokenizer.bos_token == BOS[family]
    ids = tokenizer(RENDERED[family])["input_ids"]
    if tokenizer.bos_token is None:
        assert ids == tokenizer(RENDERED[family], add_special_tokens=False)["input_ids"]
    else:
        assert ids[:2] == [tokenizer.bos_token_id] * 2
        assert ids.count(tokenizer.bos_token_id) == 2


def test_llama_writes_todays_date_unless_given_one() -> None:
    assert "Today Date: 26 Jul 2024" not in _render("llama3", _user("Hi"))
    assert "Today Date: 01 Feb 2025" in _render("llama3", _user("Hi"), date_string="01 Feb 2025")


def test_gemma2_refuses_a_system_message_and_gemma3_prepends_it() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *_user(" Hi ")]
    with pytest.raises(Exception, match="System role not supported"):
        _render("gemma2", messages)
    assert _render("gemma3", messages).startswith("<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n")


def test_qwen3_thinks_unless_told_not_to() -> None:
    assert "<think>" not in _render("qwen3", _user("Hi"))


@every_family
def test_padding_is_the_familys(family: Family) -> None:
    _, tokenizer = tiny_model(family)
    assert tokenizer.padding_side == ("left" if family.startswith("gemma") else "right")
    assert (tokenizer.pad_token is None) == (family == "llama3")


@every_family
def test_prompts_get_different_spread_out_logits(family: Family) -> None:
    model, tokenizer = tiny_model(family)
    logits = [
        _last_logits(model, tokenizer(_render(family, _user(text)), add_special_tokens=False)["input_ids"])
        for text in PROMPTS
    ]
    assert len({int(row.argmax()) for row in logits}) >= 3
    assert all(1.0 < float(row[: len(tokenizer)].std()) < 6.0 for row in logits)
    assert all(int(row.argmax()) < len(tokenizer) for row in logits)


@every_family
def test_every_block_matters(family: Family) -> None:
    model, tokenizer = tiny_model(family)
    ids = tokenizer(PROMPTS[2])["input_ids"]
    whole = _last_logits(model, ids)
    for layer in _layers(model):
        for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
            kept = block.weight.detach().clone()
            block.weight.data.zero_()
            assert float((_last_logits(model, ids) - whole).abs().max()) > 0.5
            block.weight.data.copy_(kept)


@every_family
def test_same_seed_same_weights_and_global_random_state_untouched(family: Family) -> None:
    state = torch.get_rng_state()
    first, _ = tiny_model(family)
    assert torch.equal(torch.get_rng_state(), state)
    second, _ = tiny_model(family)
    other, _ = tiny_model(family, seed=1)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@every_family
def test_shape_is_as_asked(family: Family) -> None:
    model, _ = tiny_model(family, n_layers=2, d_model=48, context=64)
    config = model.config.get_text_config()
    assert len(_layers(model)) == 2
    assert (config.hidden_size, config.max_position_embeddings) == (48, 64)
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@every_family
def test_saved_folder_loads_through_the_auto_classes(family: Family, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family, seed=3)
    folder = save_tiny(family, tmp_path / "tiny", seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    reloaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert reloaded.padding_side == tokenizer.padding_side
    ids = reloaded(RENDERED[family])["input_ids"]
    assert ids == tokenizer(RENDERED[family])["input_ids"]
    assert reloaded.apply_chat_template(_user("Hi"), tokenize=False) == tokenizer.apply_chat_template(
        _user("Hi"), tokenize=False
    )
    torch.testing.assert_close(_last_logits(loaded, ids), _last_logits(model, ids))
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


@every_family
def test_generates_greedily(family: Family) -> None:
    model, tokenizer = tiny_model(family)
    ids = torch.tensor([tokenizer(RENDERED[family], add_special_tokens=False)["input_ids"]])
    sampling: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty"))
    generate: Any = model.generate
    with torch.no_grad():
        answer = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **sampling)
    assert int(answer[0, ids.shape[1]]) == int(_last_logits(model, ids[0].tolist()).argmax())


def test_gemma2_caps_logits_softly_and_attends_eagerly() -> None:
    model, _ = tiny_model("gemma2")
    assert model.config._attn_implementation == "eager"
    assert (model.config.final_logit_softcapping, model.config.attn_logit_softcapping) == (30.0, 50.0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3_multimodal"])
def test_gemma_layers_slide(family: Family) -> None:
    model, _ = tiny_model(family, n_layers=4)
    config = model.config.get_text_config()
    assert config.sliding_window == SLIDING_WINDOW
    assert {"sliding_attention", "full_attention"} == set(config.layer_types)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_qwen_logits_are_longer_than_the_vocabulary(family: Family) -> None:
    model, tokenizer = tiny_model(family)
    assert _last_logits(model, [1, 2, 3]).shape[0] > len(tokenizer)


def test_multimodal_layers_sit_inside_the_language_model() -> None:
    model, _ = tiny_model("gemma3_multimodal", n_layers=3)
    assert _layers(model) is cast("Any", model).model.language_model.layers
    assert len(_layers(model)) == 3
    assert any("vision" in name for name, _ in model.named_parameters())


def test_unknown_family_and_odd_width_are_refused() -> None:
    # Under run-time type checking the annotation refuses first.
    with pytest.raises((InputError, TypeError), match=r"(?s)gpt2.*gemma2"):
        tiny_model("gpt2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="36"):
        tiny_model("gemma2", d_model=36)
