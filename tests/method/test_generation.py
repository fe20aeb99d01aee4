"""Generation: greedy answers, order, batches, what the checkpoint's own settings may not do."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from demur.errors import InputError
from demur.method.interventions import Compiled, ScaleFeatures
from demur.model import Budgets, ChatModel, answer_batches
from demur.testing import FAMILIES, tiny_model, tiny_suite
from demur.types import FeatureId, Prompt

TEXTS = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child", "Sing"]
PROMPTS = [Prompt(id=str(n), text=text, label="harmless") for n, text in enumerate(TEXTS)]
NEW = 6


def by_hand(model: ChatModel, text: str) -> tuple[str, bool]:
    """Greedy decoding without a cache, one prompt, one token at a time."""
    ids = list(model.chat.tokenize(text).ids)
    start = len(ids)
    for _ in range(NEW):
        with torch.inference_mode():
            token = int(cast("Any", model.hf)(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in model.eos_ids:
            return model.decode(ids[start:]), True
        ids.append(token)
    return model.decode(ids[start:]), False


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_answers_are_the_greedy_ones_in_the_order_of_the_prompts(family: Any) -> None:
    hf, tokenizer = tiny_model(family)
    model = ChatModel(hf, tokenizer, name=family)
    model.budgets = Budgets(100, 100)
    found = model.generate(PROMPTS, max_new_tokens=NEW)
    assert [answer.prompt.id for answer in found] == [prompt.id for prompt in PROMPTS]
    assert [(answer.text, answer.finished) for answer in found] == [by_hand(model, text) for text in TEXTS]
    assert {answer.intervention for answer in found} == {"none"}


def test_the_checkpoints_own_settings_stay_out_and_stay() -> None:
    hf, tokenizer = tiny_model("qwen2.5")
    model = ChatModel(hf, tokenizer, name="m")
    plain = [answer.text for answer in model.generate(PROMPTS, max_new_tokens=NEW)]
    settings = cast("Any", hf.generation_config)
    first = [int(tokenizer(text, add_special_tokens=False)["input_ids"][0]) for text in plain if text]
    settings.suppress_tokens = first
    settings.encoder_repetition_penalty = 3.0
    settings.repetition_penalty = 9.0
    settings.do_sample, settings.temperature = True, 5.0
    settings.cache_implementation = "static"
    assert [answer.text for answer in model.generate(PROMPTS, max_new_tokens=NEW)] == plain
    assert hf.generation_config is settings


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    hf, tokenizer = tiny_model("qwen3")
    model = ChatModel(hf, tokenizer, name="m")

    def sample(seed: int) -> list[str]:
        return [a.text for a in model.generate(PROMPTS, max_new_tokens=NEW, temperature=3.0, seed=seed)]

    state = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_is_from_the_whole_distribution() -> None:
    """At a very high temperature every token is as likely as any other: few of the drawn ones are among the best."""
    hf, tokenizer = tiny_model("qwen3")
    model = ChatModel(hf, tokenizer, name="m")
    item = model.tokenize(TEXTS[:1])
    with torch.inference_mode():
        best = set(model.last_logits(model.batch(item))[0].topk(50).indices.tolist())
    size = hf.config.get_text_config().vocab_size
    prompts = [Prompt(id=str(n), text=TEXTS[0]) for n in range(200)]
    found: list[int] = []
    generate_tokens = cast("Any", hf).generate

    def recorded(**options: Any) -> Any:
        tokens = generate_tokens(**options)
        found.extend(tokens[:, options["input_ids"].shape[1]].tolist())
        return tokens

    cast("Any", hf).generate = recorded
    model.generate(prompts, max_new_tokens=1, temperature=1e4, seed=1)
    assert len(found) == 200
    share = sum(token in best for token in found) / 200
    assert share == pytest.approx(50 / size, abs=4 * (0.25 / 200) ** 0.5)
    assert 50 / size < 0.5


@pytest.mark.parametrize("family", ["gemma2", "llama3"])
def test_an_answer_ends_where_the_model_ends_its_turn(family: Any) -> None:
    """Whichever of several end tokens it writes; the end itself is no part of the answer."""
    hf, tokenizer = tiny_model(family)
    model = ChatModel(hf, tokenizer, name="m")
    item = model.tokenize(TEXTS[:1])[0]
    ids = list(item.ids)
    for _ in range(NEW):
        with torch.inference_mode():
            ids.append(int(cast("Any", hf)(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = ids[len(item) :]
    place = next(n for n in range(1, NEW) if answer[n] not in answer[:n])
    cast("Any", hf.generation_config).eos_token_id = [2, answer[place]]
    (found,) = model.generate(TEXTS[:1], max_new_tokens=NEW)
    assert found.finished
    assert found.text == model.decode(answer[:place])
    (cut,) = model.generate(TEXTS[:1], max_new_tokens=place)
    assert not cut.finished
    assert cut.text == found.text


def test_batches_that_are_done_are_left_out() -> None:
    hf, tokenizer = tiny_model("gemma2")
    model = ChatModel(hf, tokenizer, name="m")
    model.budgets = Budgets(15, 15)
    change = Compiled(model, tiny_suite(hf), [ScaleFeatures((FeatureId(1, 3),), -3.0)])
    parts = list(answer_batches(model, PROMPTS, change, max_new_tokens=NEW))
    assert len(parts) > 1
    first = {answer.prompt.id for answer in parts[0]}
    assert (
        list(answer_batches(model, PROMPTS, change, max_new_tokens=NEW, take=lambda keys: not first >= set(keys)))
        == parts[1:]
    )
    assert {answer.intervention for part in parts for answer in part} == {change.id}


def test_a_prompt_that_leaves_no_room_for_the_answer_is_named() -> None:
    hf, tokenizer = tiny_model("gemma2")
    model = ChatModel(hf, tokenizer, name="m")
    assert model.max_context is not None
    with pytest.raises(InputError, match=r"prompt 0 is \d+ tokens long plus"):
        model.generate(PROMPTS, max_new_tokens=model.max_context)
