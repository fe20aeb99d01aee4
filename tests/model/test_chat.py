"""Chat rendering: regions, one BOS, pinned dates, left padding."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError, ModelError
from demur.model import PINNED_DATE, SCORED_REGIONS, ChatFormat, ChatModel, Region
from demur.testing import FAMILIES, tiny_model
from demur.types import Prompt

MESSAGE = "Tell me how to bake bread"


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> ChatModel:
    hf, tokenizer = tiny_model(request.param)
    return ChatModel(hf, tokenizer, name=request.param)


def test_exactly_one_bos(model: ChatModel) -> None:
    ids = model.chat.tokenize(MESSAGE).ids
    bos = model.tokenizer.bos_token_id
    if model.name.startswith("qwen"):
        assert bos is None or bos not in ids
    else:
        # The tokenizer alone would put a second one before the template's.
        rendered, *_ = model.chat.text(MESSAGE)
        assert model.tokenizer(rendered)["input_ids"][:2] == [bos, bos]
        assert ids[0] == bos
        assert bos not in ids[1:]


def test_regions_cover_the_template(model: ChatModel) -> None:
    rendered = model.chat.tokenize(MESSAGE, response="Take flour")
    text = {
        region: model.tokenizer.decode([i for i, r in zip(rendered.ids, rendered.regions, strict=True) if r == region])
        for region in Region
    }
    assert text[Region.PAD] == ""
    assert text[Region.INSTRUCTION] == MESSAGE
    assert text[Region.RESPONSE] == "Take flour"
    whole, start, end = model.chat.text(MESSAGE)
    assert text[Region.POST_INSTRUCTION] == whole[end:]
    assert text[Region.SPECIAL] == whole[:start]
    assert sorted(rendered.regions) == list(rendered.regions), "regions come in the order of the conversation"


@pytest.mark.parametrize("message", [MESSAGE, "naïve… 🙂 (1, 2)", "  led by spaces and ended  "])
def test_tokens_end_at_their_last_character(model: ChatModel, message: str) -> None:
    ends, item = model.chat.ends(message), model.chat.tokenize(message)
    assert len(ends) == item.regions.count(Region.INSTRUCTION)
    assert list(ends) == sorted(ends)
    words = [token for token, region in zip(item.ids, item.regions, strict=True) if region == Region.INSTRUCTION]
    for count, end in enumerate(ends, start=1):
        said = str(model.tokenizer.decode(words[:count]))
        # A token may hold a part of a character only.
        if "\ufffd" not in said:
            assert message[: end + 1].strip() == said.strip()


def test_post_instruction_tokens_do_not_depend_on_the_message(model: ChatModel) -> None:
    counts = {model.chat.tokenize(text).n_post_instruction for text in ("a", MESSAGE, "x y z?", "(1, 2)", "naïve… 🙂")}
    assert len(counts) == 1
    assert counts.pop() >= 1


def test_thinking_is_off_where_the_template_knows_it() -> None:
    hf, tokenizer = tiny_model("qwen3")
    text, _, end = ChatModel(hf, tokenizer, name="qwen3").chat.text(MESSAGE)
    assert "<think>\n\n</think>" in text[end:]


def test_the_date_is_pinned() -> None:
    _, tokenizer = tiny_model("llama3")
    chat = ChatFormat(tokenizer, name="llama3")
    today = chat.text(MESSAGE)[0]
    assert PINNED_DATE.strftime("%d %b %Y") in today
    assert datetime.date.today().strftime("%d %b %Y") not in today
    # A template that asks for the time itself is answered with the pinned date as well.
    tokenizer.chat_template = "{{ strftime_now('%Y') }}/{{ strftime_now(\"%m\") }} {{ messages[0]['content'] }}"
    text = ChatFormat(tokenizer, name="llama3").text(MESSAGE)[0]
    assert text == f"{PINNED_DATE.year}/{PINNED_DATE.month:02} {MESSAGE}"


def test_left_padding_with_explicit_positions(model: ChatModel) -> None:
    texts = {"long": MESSAGE, "longer": MESSAGE + " in a very small and rather old oven"}
    items = model.tokenize([Prompt(id=name, text=text) for name, text in texts.items()])
    batch = model.batch(items)
    short = batch.real[0]
    assert not short[0]
    assert bool(short[-1])
    assert batch.position_ids[0][short].tolist() == list(range(len(items[0])))
    assert batch.regions[0][~short].unique().tolist() == [Region.PAD]
    assert batch.prompt_ids == ("long", "longer")
    assert not batch.within(SCORED_REGIONS)[~batch.real].any()


def test_batched_equals_single(model: ChatModel) -> None:
    items = model.tokenize([MESSAGE, "Hi", MESSAGE + " in a very small and rather old oven, with rye"])
    with torch.inference_mode():
        together = model.last_logits(model.batch(items))
        alone = torch.cat([model.last_logits(model.batch([item])) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_row_of_a_batch_is_the_prompt_alone(model: ChatModel) -> None:
    items = model.tokenize(["Hi", MESSAGE])
    row = model.batch(items).cut([0])
    assert row.input_ids.tolist() == [list(items[0].ids)]
    assert row.position_ids.tolist() == [list(range(len(items[0])))]


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_any_message_is_found_in_its_prompt(text: str) -> None:
    chat = _CHAT()
    if not text.strip() or "<" in text:
        return
    whole, start, end = chat.text(text)
    assert whole[start:end].strip() == text.strip()
    rendered = chat.tokenize(text)
    assert Region.INSTRUCTION in rendered.regions
    assert len(rendered.ids) == len(rendered.regions)


def _CHAT(cache: dict[str, ChatFormat] = {}) -> ChatFormat:  # noqa: B006
    if not cache:
        cache["chat"] = ChatFormat(tiny_model("gemma2")[1], name="gemma2")
    return cache["chat"]


def _format(template: str | None) -> ChatFormat:
    tokenizer: Any = tiny_model("gemma2")[1]
    tokenizer.chat_template = template
    return ChatFormat(tokenizer, name="some-model")


def test_no_chat_template_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"some-model has no chat template.*base model"):
        _format(None)


def test_a_template_that_alters_messages_is_an_error() -> None:
    chat = _format("{{ bos_token }}{{ messages[0]['content'] | upper }} now")
    with pytest.raises(ModelError, match="does not show the user's message exactly once"):
        chat.text("word")
    chat = _format("{{ bos_token }}{{ messages[0]['content'] | replace('word', 'WORD') }} now")
    with pytest.raises(ModelError, match="alters the message 'a word'"):
        chat.text("a word")


def test_a_template_that_fails_says_so() -> None:
    chat = _format("{{ raise_exception('no system role') }}")
    with pytest.raises(ModelError, match=r"chat template of some-model failed.*no system role"):
        chat.text("word")


def test_a_prompt_longer_than_the_context_is_named() -> None:
    hf, tokenizer = tiny_model("gemma2")
    model = ChatModel(hf, tokenizer, name="m")
    assert model.max_context is not None
    long = "bread " * model.max_context
    with pytest.raises(
        InputError, match=r"prompt file:12 is \d+ tokens long plus 8 new tokens, but the model's context"
    ):
        model.tokenize([Prompt(id="file:11", text="short"), Prompt(id="file:12", text=long)], new_tokens=8)
