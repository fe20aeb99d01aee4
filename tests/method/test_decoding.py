"""Greedy decoding with drafts, and with rows that leave: the texts are those of one prompt alone, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from transformers import GenerationConfig

from demur.method.interventions import AblateDirection, HoldFeatures, Intervention, PerPrompt, ScaleFeatures, bind
from demur.model import ChatModel, answer_batches, decode_greedily
from demur.testing import FAMILIES, tiny_model, tiny_suite
from demur.types import FeatureId, Prompt

TEXTS = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child", "Sing", "What is a sparrow?"]
PROMPTS = [Prompt(id=str(n), text=text, label="harmless") for n, text in enumerate(TEXTS)]
NEW = 12
FEATURES = (FeatureId(0, 5), FeatureId(1, 3))


def loaded(family: Any) -> ChatModel:
    hf, tokenizer = tiny_model(family)
    return ChatModel(hf, tokenizer, name=family)


def tokens_of(model: ChatModel, prompt: Prompt | str, change: Intervention | None = None) -> list[int]:
    """`generate` of transformers on one prompt."""
    batch = model.batch([model.chat.tokenize(prompt)])
    settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=list(model.eos_ids), pad_token_id=model.pad_id)
    bound = [] if change is None else [bind(tiny_suite(cast("Any", model.hf)), change)]
    with torch.inference_mode(), model.intervene(bound), model.serving(batch), own_settings(model, settings):
        found = cast("Any", model.hf).generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return found[0, batch.input_ids.shape[1] :].tolist()


@contextmanager
def own_settings(model: ChatModel, settings: GenerationConfig) -> Iterator[None]:
    holder = cast("Any", model.hf)
    before, holder.generation_config = holder.generation_config, settings
    yield
    holder.generation_config = before


def answers(model: ChatModel, change: Intervention | None = None, drafts: Any = None) -> dict[str, str]:
    bound = None if change is None else bind(tiny_suite(cast("Any", model.hf)), change)
    batches = answer_batches(model, PROMPTS, bound, max_new_tokens=NEW, drafts=drafts)
    return {answer.prompt.text: answer.text for batch in batches for answer in batch}


def spoiled(tokens: list[int], place: int) -> list[int]:
    """A draft that goes wrong at one place."""
    return [token + (n == place) for n, token in enumerate(tokens)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_drafts_change_no_text_and_save_passes(family: Any) -> None:
    """Right drafts, drafts that go wrong at each place, drafts that are too long, and none."""
    model = loaded(family)
    own = {text: tokens_of(model, text) for text in TEXTS}
    plain = {text: model.decode([t for t in tokens if t not in model.eos_ids]) for text, tokens in own.items()}
    passes: list[int] = []
    model.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    assert answers(model) == plain
    without = len(passes)
    passes.clear()
    assert answers(model, drafts={text: [tokens] for text, tokens in own.items()}) == plain
    # The window of some of the small models is shorter than an answer.
    window = model.hf.config.get_text_config().sliding_window if family.startswith("gemma") else None
    assert window or len(passes) <= 3 < without
    for place in range(NEW):
        wrong = {text: [spoiled(tokens, place), [*spoiled(tokens, place), 7, 7, 7]] for text, tokens in own.items()}
        assert answers(model, drafts=wrong) == plain


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_rows_end_at_different_places(family: Any) -> None:
    """What ends a turn is set so that answers end early and late; rows that have ended leave the batch."""
    model = loaded(family)
    own = {text: tokens_of(model, text) for text in TEXTS}
    ends = [own[TEXTS[0]][1], own[TEXTS[1]][3], own[TEXTS[2]][0]]
    cast("Any", model.hf.generation_config).eos_token_id = ends
    expected = {}
    for text, tokens in own.items():
        place = next((n for n, token in enumerate(tokens) if token in ends), None)
        expected[text] = model.decode(tokens[:place])
    rows: list[int] = []
    model.hf.register_forward_pre_hook(lambda _m, _a, options: rows.append(len(options["input_ids"])), with_kwargs=True)
    assert answers(model) == expected
    assert min(rows) < len(TEXTS)
    for place in range(4):
        drafts = {text: [spoiled(tokens, place), tokens[: place + 2]] for text, tokens in own.items()}
        assert answers(model, drafts=drafts) == expected


@pytest.mark.parametrize("family", ["gemma2", "llama3"])
def test_what_differs_by_prompt_follows_its_row(family: Any) -> None:
    """A feature held, another scaled, a direction taken out, each on some prompts only, while other rows leave."""
    model = loaded(family)
    lengths = {p.id: len(model.chat.tokenize(p)) for p in PROMPTS}
    values = torch.arange(lengths["2"] * 2).reshape(-1, 2).float()
    change = PerPrompt({
        "0": (ScaleFeatures(FEATURES, -4.0),),
        "2": (HoldFeatures(FEATURES, values, torch.tensor([9.0, 3.0])),),
        "3": (AblateDirection(torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))),),
    })  # fmt: skip
    own = {p.text: tokens_of(model, p, change) for p in PROMPTS}
    clean = {text: tokens_of(model, text) for text in TEXTS}
    assert own != clean
    cast("Any", model.hf.generation_config).eos_token_id = [own[TEXTS[1]][1], own[TEXTS[4]][2]]
    expected: dict[str, str] = {}
    for text, tokens in own.items():
        place = next((n for n, token in enumerate(tokens) if token in model.eos_ids), None)
        expected[text] = model.decode(tokens[:place])
    assert answers(model, change) == expected
    assert answers(model, change, {text: [clean[text], spoiled(own[text], 5)] for text in TEXTS}) == expected


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama3", "qwen3"])
def test_prompts_of_other_lengths_are_read_apart(family: Any) -> None:
    """Keys and values of prompts that were read in several passes, in any order, serve one batch of answers; what
    differs by prompt follows its row."""
    model = loaded(family)
    model.hf.config.get_text_config().sliding_window = 512
    texts = ["Sing", "Bread and butter " * 30, "Hi", "Butter and bread " * 28, "What is a sparrow?"]
    prompts = [Prompt(id=str(n), text=text, label="harmless") for n, text in enumerate(texts)]
    change = PerPrompt({
        "0": (ScaleFeatures(FEATURES, -4.0),),
        "3": (AblateDirection(torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))),),
    })  # fmt: skip
    own = {p.text: tokens_of(model, p, change) for p in prompts}
    bound = bind(tiny_suite(cast("Any", model.hf)), change).compile(model)
    drafts = {text: [spoiled(tokens, 5)] for text, tokens in own.items()}
    seen: list[torch.Size] = []
    model.hf.register_forward_pre_hook(
        lambda _m, _a, options: seen.append(options["input_ids"].shape), with_kwargs=True
    )
    found = {
        answer.prompt.text: answer.text
        for batch in answer_batches(model, prompts, bound, max_new_tokens=NEW, drafts=drafts)
        for answer in batch
    }
    assert found == {t: model.decode([n for n in tokens if n not in model.eos_ids]) for t, tokens in own.items()}
    long, short = ([len(model.chat.tokenize(texts[n])) for n in numbers] for numbers in ((1, 3), (0, 2, 4)))
    assert seen[:3] == [(2, max(long)), (3, max(short)), (5, seen[2][1])]
    # Rows of a batch in another order than that of their lengths.
    batch = model.batch(model.tokenize(prompts))
    with torch.inference_mode(), model.installed([bound]):
        rows = decode_greedily(model, batch, NEW)
    assert [model.decode([n for n in row if n not in model.eos_ids]) for row in rows] == [found[t] for t in texts]


def test_slots_that_no_row_keeps_are_given_back() -> None:
    """Where every guess is wrong, the cache is as long as what was written."""
    model = loaded("llama3")
    own = {text: tokens_of(model, text) for text in TEXTS}
    cast("Any", model.hf.generation_config).eos_token_id = [-1]
    slots: list[int] = []
    model.hf.register_forward_pre_hook(
        lambda _m, _a, options: slots.append(options["attention_mask"].shape[1] - options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    answers(model, drafts={text: [[tokens[0], *(t + 1 for t in tokens[1:])]] for text, tokens in own.items()})
    longest = max(len(model.chat.tokenize(text)) for text in TEXTS)
    assert slots == [0, *range(longest, longest + NEW - 1)]


def test_no_drafts_beyond_a_window() -> None:
    """A window of attention counts slots: with dropped guesses among them it would reach less far."""
    model = loaded("gemma2")
    window = max(len(model.chat.tokenize(text)) for text in TEXTS) + 4
    config = model.hf.config.get_text_config()
    assert "sliding_attention" in config.layer_types
    config.sliding_window = window
    own = {text: tokens_of(model, text) for text in TEXTS}
    plain = {text: model.decode([t for t in tokens if t not in model.eos_ids]) for text, tokens in own.items()}
    for place in range(1, NEW, 3):
        assert answers(model, drafts={text: [spoiled(own[text], place)] for text in TEXTS}) == plain
