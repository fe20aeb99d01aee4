"""Losses, divergences and preferences against one unpadded pass at a time, written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from demur.errors import InputError
from demur.method.direction import clean_log_probs
from demur.method.interventions import AblateDirection, Compiled, PerPrompt, ScaleFeatures
from demur.method.likelihood import (
    answer_effects,
    answer_starts,
    answer_token_losses,
    answers_to_score,
    preference,
    response_kl,
    texts_to_score,
    token_losses,
)
from demur.model import Budgets, ChatModel, Region, TokenizedPrompt, count_hooks
from demur.saes import Suite
from demur.testing import tiny_model, tiny_suite
from demur.types import Answer, FeatureId, Prompt, as_prompts

PROMPTS = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child"]
ANSWERS = [
    Answer(prompt=prompt, text=text)
    for prompt, text in zip(
        as_prompts(PROMPTS), ["Mix flour and water", "Hello to you", "Each side moves in turn"], strict=True
    )
]
NAMES = ["0", "1", "2"]
FEATURES = (FeatureId(0, 3), FeatureId(1, 7), FeatureId(1, 2))


@pytest.fixture(scope="module", params=["gemma2", "llama3"])
def model(request: pytest.FixtureRequest) -> ChatModel:
    hf, tokenizer = tiny_model(request.param)
    return ChatModel(hf, tokenizer, name=request.param)


@pytest.fixture(scope="module")
def suite(model: ChatModel) -> Suite:
    return tiny_suite(model.hf, d_sae=24)


def alone(model: ChatModel, item: TokenizedPrompt, change: Compiled | None = None) -> Tensor:
    """Log-probabilities at every position of one conversation, by the plain Hugging Face call."""
    batch = model.batch([item])
    context = change.on(batch) if change is not None else torch.no_grad()
    with torch.no_grad(), context:
        return model.hf(torch.tensor([item.ids])).logits[0].float().log_softmax(-1)


def by_hand(model: ChatModel, item: TokenizedPrompt, change: Compiled | None = None) -> tuple[float, int]:
    logs = alone(model, item, change)
    places = [n for n, region in enumerate(item.regions) if region == Region.RESPONSE]
    return -sum(float(logs[n - 1, item.ids[n]]) for n in places), len(places)


def test_starts_by_hand(model: ChatModel) -> None:
    rows = [alone(model, item)[-1].double().exp() for item in model.tokenize(PROMPTS)]
    firsts = [model.tokenizer(each.text, add_special_tokens=False)["input_ids"][0] for each in ANSWERS]
    found = answer_starts(model, ANSWERS)
    mean = torch.stack(rows).mean(0)
    torch.testing.assert_close(found.losses.double(), -mean.log(), rtol=1e-3, atol=1e-3)
    for n, token in enumerate(firsts):
        others = torch.stack([row for k, row in enumerate(rows) if k != n]).mean(0)
        assert found.own[n] == pytest.approx(float(-others[token].log()), rel=1e-3)
        assert found.of(model, ANSWERS)[n] == pytest.approx(float(-mean[token].log()), rel=1e-3)
    assert found.of(model, [ANSWERS[0].model_copy(update={"text": ""})]) == [0.0]


def test_losses_of_answers_count_their_tokens_and_nothing_else(model: ChatModel) -> None:
    items = answers_to_score(model, ANSWERS)
    found = token_losses(model, items)
    assert [loss.prompt_id for loss in found] == NAMES
    for item, loss in zip(items, found, strict=True):
        nats, tokens = by_hand(model, item)
        assert loss.tokens == tokens == item.regions.count(Region.RESPONSE) > 0
        assert loss.nats == pytest.approx(nats, rel=1e-4)


def test_batches_of_any_size_give_the_same_losses(model: ChatModel) -> None:
    items = answers_to_score(model, ANSWERS)
    before = model.budgets
    whole = token_losses(model, items)
    try:
        model.budgets = Budgets(1, 1)
        single = token_losses(model, items)
    finally:
        model.budgets = before
    assert [loss.nats for loss in single] == pytest.approx([loss.nats for loss in whole], rel=1e-4)


def test_losses_under_interventions_shared_and_one_for_each_prompt(model: ChatModel, suite: Suite) -> None:
    items = answers_to_score(model, ANSWERS)
    plain = token_losses(model, items)
    shared = Compiled(model, suite, [ScaleFeatures(FEATURES, -3.0)])
    local = Compiled(model, suite, [PerPrompt({"1": (ScaleFeatures(FEATURES, -3.0),)})])
    for change in (shared, local):
        for item, loss, before in zip(items, token_losses(model, items, change), plain, strict=True):
            assert loss.nats == pytest.approx(by_hand(model, item, change)[0], rel=1e-3)
            touched = change is shared or loss.prompt_id == "1"
            assert (abs(loss.nats - before.nats) > 1e-3) == touched
    assert count_hooks(model.hf) == 0


def test_a_text_begins_with_one_bos_and_every_other_token_counts(model: ChatModel) -> None:
    (item,) = texts_to_score(model, ["Mix flour and water and bake bread"], max_tokens=5)
    bos = model.tokenizer.bos_token_id
    assert item.ids.count(bos) == 1
    assert item.ids[0] == bos
    assert len(item) == 6
    (loss,) = token_losses(model, [item])
    logs = alone(model, item)
    assert loss.tokens == 5
    assert loss.nats == pytest.approx(-sum(float(logs[n - 1, item.ids[n]]) for n in range(1, 6)), rel=1e-4)


def test_a_text_is_cut_after_as_many_tokens_and_its_own_bos_is_left_out(model: ChatModel) -> None:
    text = "Mix flour and water"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = model.chat.bos_id
    assert bos is not None
    twice = str(model.tokenizer.decode([bos])) * 2 + text
    found = texts_to_score(model, [Prompt(id="a", text=text), Prompt(id="b", text=twice)], max_tokens=len(ids))
    assert [(item.prompt_id, item.ids) for item in found] == [("a", (bos, *ids)), ("b", (bos, *ids))]
    assert found[0].regions == (Region.SPECIAL, *[Region.RESPONSE] * len(ids))
    (cut,) = texts_to_score(model, [text], max_tokens=1)
    assert cut.ids == (bos, ids[0])


def test_without_a_bos_the_first_token_of_a_text_is_not_counted() -> None:
    model = ChatModel(*tiny_model("qwen3"), name="no BOS")
    assert model.chat.bos_id is None
    ids = tuple(model.tokenizer("Mix flour", add_special_tokens=False)["input_ids"])
    (item,) = texts_to_score(model, ["Mix flour"], max_tokens=99)
    assert (item.ids, item.regions) == (ids, (Region.SPECIAL, *[Region.RESPONSE] * (len(ids) - 1)))
    with pytest.raises(InputError, match="has no token to predict"):
        texts_to_score(model, ["Mix flour"], max_tokens=1)


def test_losses_of_each_token_and_progress(model: ChatModel) -> None:
    answers = [*ANSWERS, ANSWERS[0].model_copy(update={"text": ""})]
    items, told = answers_to_score(model, answers), list[tuple[int, int]]()
    change = Compiled(model, None, [AblateDirection(torch.ones(model.d_model))])

    def tell(done: int, of: int) -> None:
        told.append((done, of))

    plain, model.budgets = model.budgets, Budgets(1, 1)
    try:
        found = answer_token_losses(model, answers, tell)
        token_losses(model, items, progress=tell)
        response_kl(model, items, change, tell)
    finally:
        model.budgets = plain
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] * 3
    for item, losses in zip(items, found, strict=True):
        logs = alone(model, item)
        places = [n for n, region in enumerate(item.regions) if region == Region.RESPONSE]
        assert losses == pytest.approx([-float(logs[n - 1, item.ids[n]]) for n in places], rel=1e-3, abs=1e-4)
    assert found[3] == ()


def test_one_answer_alone_begins_as_no_other_does(model: ChatModel) -> None:
    """There is no other prompt to compare with: the loss is that of a chance of 1e-30, not infinite or an error."""
    found = answer_starts(model, ANSWERS[:1])
    assert found.own == pytest.approx((math.log(1e30),))
    empty = answer_starts(model, [ANSWERS[0].model_copy(update={"text": ""}), ANSWERS[1]])
    assert len(empty.own) == 2


def test_starts_do_not_depend_on_batches(model: ChatModel) -> None:
    whole, plain = answer_starts(model, ANSWERS), model.budgets
    model.budgets = Budgets(1, 1)
    try:
        apart = answer_starts(model, ANSWERS)
    finally:
        model.budgets = plain
    assert apart.own == pytest.approx(whole.own, rel=1e-4)
    torch.testing.assert_close(apart.losses, whole.losses, rtol=1e-4, atol=1e-4)


def test_divergences_are_summed_over_the_answers_tokens(model: ChatModel) -> None:
    items = answers_to_score(model, ANSWERS)
    change = Compiled(model, None, [AblateDirection(torch.linspace(-1, 1, model.d_model))])
    for item, found in zip(items, response_kl(model, items, change), strict=True):
        before, after = alone(model, item), alone(model, item, change)
        places = [n - 1 for n, region in enumerate(item.regions) if region == Region.RESPONSE]
        expected = (before.exp() * (before - after)).sum(-1)[places].sum()
        assert found.nats == pytest.approx(float(expected), rel=1e-2)
        assert (found.prompt_id, found.tokens) == (item.prompt_id, len(places))
        assert found.nats > 1e-3


def test_preference_under_a_change(model: ChatModel) -> None:
    items = model.tokenize(PROMPTS)
    change = Compiled(model, None, [AblateDirection(torch.linspace(-1, 1, model.d_model))])
    for item, odds, clean in zip(
        items, preference(model, items, [4, 9], [7], change), preference(model, items, [4, 9], [7]), strict=True
    ):
        p = alone(model, item, change)[-1].exp()
        assert odds == pytest.approx(float(((p[4] + p[9]) / p[7]).log()), abs=1e-3)
        assert abs(odds - clean) > 1e-3


def test_a_text_without_tokens_is_named(model: ChatModel) -> None:
    with pytest.raises(InputError, match=r"text 1 .* has no token"):
        texts_to_score(model, ["bread", ""], max_tokens=4)


def test_effects_on_answers_are_their_loss_and_the_divergence_of_their_first_token(model: ChatModel) -> None:
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    change = Compiled(model, None, [AblateDirection(vector)])
    prompts = model.tokenize(PROMPTS)
    texts = ["Mix flour", "no", "bake bread and water"]
    items = [model.chat.tokenize(prompt, text) for prompt, text in zip(as_prompts(PROMPTS), texts, strict=True)]
    clean = clean_log_probs(model, prompts)
    found = answer_effects(model, items, change, clean)
    for item, effect, loss in zip(prompts, found, token_losses(model, items, change), strict=True):
        before, after = alone(model, item)[-1], alone(model, item, change)[-1]
        assert effect.kl == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-2, abs=1e-6)
        assert effect.kl > 0
        assert (effect.prompt_id, effect.nats, effect.tokens) == (loss.prompt_id, loss.nats, loss.tokens)
    nothing = answer_effects(model, items, Compiled(model, None, ()), clean)
    assert [each.kl for each in nothing] == pytest.approx([0.0] * 3, abs=1e-5)


def test_preference_is_the_log_odds_of_two_sets_of_tokens(model: ChatModel) -> None:
    items = model.tokenize(PROMPTS)
    for item, odds in zip(items, preference(model, items, [4, 9], [7]), strict=True):
        p = alone(model, item)[-1].exp()
        assert odds == pytest.approx(float(((p[4] + p[9]) / p[7]).log()), abs=1e-4)


def test_a_large_vocabulary_never_has_logits_of_a_whole_answer() -> None:
    hf, tokenizer = tiny_model("llama3")
    hf.resize_token_embeddings(2**18, mean_resizing=False)
    model, seen = ChatModel(hf, tokenizer, name="tiny"), list[int]()
    items = answers_to_score(
        model, [ANSWERS[0].model_copy(update={"text": "Mix flour and water and salt, and wait. " * 2})]
    )
    expected, tokens = by_hand(model, items[0])
    head: Any = hf.get_output_embeddings()
    change = Compiled(model, tiny_suite(hf, d_sae=24), [ScaleFeatures(FEATURES, -3.0)])
    with head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.numel())):
        found = token_losses(model, items)
        response_kl(model, items, change)
    assert found[0].nats == pytest.approx(expected, rel=1e-4)
    # 8 MiB of float32 for each row of a batch, here one: 8 tokens at a time.
    assert max(seen) == 8 * 2**18
    assert sum(seen) == 3 * tokens * 2**18
    seen.clear()
    with head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.numel())):
        token_losses(model, items * 2)
    assert max(seen) == 16 * 2**18
    assert sum(seen) == 2 * tokens * 2**18
