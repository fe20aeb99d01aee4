"""What tokens give to features, on the planted model and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from demur.errors import InputError
from demur.method.activations import feature_activations, over_regions
from demur.method.tokens import token_effects
from demur.model import Budgets, ChatModel, Items, Region, TokenizedPrompt, hooked
from demur.stats import spearman
from demur.testing import Planted, planted

BESIDE = "The chef baked bread near the garden. "


@pytest.fixture(scope="module")
def made() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def model(made: Planted) -> ChatModel:
    return ChatModel(made.model, made.tokenizer, name="planted")


def refusal(made: Planted, model: ChatModel, items: Items) -> np.ndarray:
    """Sum of the refusal features' means over the template's tokens."""
    values = feature_activations(model, made.suite, items, sorted(made.truth.refusal))
    return over_regions(items, values, [Region.POST_INSTRUCTION], "mean").sum(1)


def test_scores_add_up_to_what_the_words_do_together(made: Planted, model: ChatModel) -> None:
    """The oracle: the same words with the mean embedding in their place, run through the model."""
    prompt = made.harmful.prompts[0]
    (item,) = model.tokenize([prompt])
    (scores,) = token_effects(model, made.suite, [item], sorted(made.truth.refusal), steps=200)
    words = torch.tensor(item.regions) == Region.INSTRUCTION
    assert scores[~words].tolist() == [0.0] * int((~words).sum())
    inputs: Any = model.hf.get_input_embeddings()

    def neutral(output: torch.Tensor) -> torch.Tensor:
        return torch.where(words[:, None], inputs.weight.mean(0), output)

    with hooked([inputs], {0: neutral}):
        without = refusal(made, model, [item])[0]
    # No gradient sees the jump at a threshold, 0.1, of each of the three features.
    assert float(scores.sum()) == pytest.approx(refusal(made, model, [item])[0] - without - 0.3, rel=0.02)
    assert float(scores.sum()) > 1.0


def test_harm_words_give_and_harmless_words_take(made: Planted, model: ChatModel) -> None:
    """In the planted model harmless content words dilute harm; other words do nothing."""
    text = BESIDE + made.harmful.prompts[0].text
    items = model.tokenize([text])
    (scores,) = token_effects(model, made.suite, items, sorted(made.truth.refusal))
    tokens = [str(model.tokenizer.decode([token])).strip() for token in items[0].ids]
    known = {word: float(score) for word, score in zip(tokens, scores, strict=True) if score}
    assert {word for word, _ in sorted(known.items(), key=lambda each: -each[1])[:2]} == {"steal", "vault"}
    assert known["bread"] < 0
    words = [n for n, region in enumerate(items[0].regions) if region == Region.INSTRUCTION]
    less = [
        TokenizedPrompt(str(n), *(tuple(v for k, v in enumerate(each) if k != n) for each in (item.ids, item.regions)))
        for item in items
        for n in words
    ]
    left_out = refusal(made, model, items)[0] - refusal(made, model, less)
    assert spearman(np.round([float(scores[n]) for n in words], 3), np.round(left_out, 3)) > 0.95


def test_only_what_varies_has_a_score(made: Planted, model: ChatModel) -> None:
    items = model.tokenize([BESIDE + made.harmful.prompts[0].text, made.harmful.prompts[1].text])
    varied = {item.prompt_id: torch.zeros(len(item), dtype=torch.bool) for item in items}
    place = [str(model.tokenizer.decode([token])).strip() for token in items[0].ids].index("bread")
    varied["0"][place] = True
    both = token_effects(model, made.suite, items, sorted(made.truth.refusal), varied=varied)
    assert both[0].nonzero()[:, 0].tolist() == [place]
    assert not both[1].any()
    # The same alone as in a batch with padding.
    (alone,) = token_effects(model, made.suite, items[:1], sorted(made.truth.refusal), varied=varied)
    assert alone.tolist() == pytest.approx(both[0].tolist(), abs=1e-5)


def test_the_gradient_is_that_of_the_activation(made: Planted, model: ChatModel) -> None:
    """By finite differences: a small step of one token towards the mean embedding."""
    prompt, step = made.harmful.prompts[0], 1e-3
    (item,) = model.tokenize([prompt])
    (scores,) = token_effects(model, made.suite, [item], sorted(made.truth.refusal), method="gradient")
    place = int(scores.abs().argmax())
    inputs: Any = model.hf.get_input_embeddings()

    def nudge(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, place] -= step * (output[0, place] - inputs.weight.mean(0))
        return output

    with hooked([inputs], {0: nudge}):
        after = refusal(made, model, [item])[0]
    assert float(scores[place]) == pytest.approx((refusal(made, model, [item])[0] - after) / step, rel=0.05)


def test_too_few_steps(made: Planted, model: ChatModel) -> None:
    with pytest.raises(InputError, match="at least 1 step"):
        token_effects(model, made.suite, model.tokenize(["a"]), sorted(made.truth.refusal), steps=0)


def test_ten_steps_of_the_path_unless_said(made: Planted, model: ChatModel) -> None:
    items, features = model.tokenize(made.harmful.prompts[:1]), sorted(made.truth.refusal)
    ways: list[dict[str, Any]] = [{}, {"method": "ig", "steps": 10}, {"method": "ig", "steps": 11}]
    (plain,), (known,), (more,) = (token_effects(model, made.suite, items, features, **how) for how in ways)
    assert torch.equal(plain, known)
    assert not torch.equal(plain, more)


def test_scores_stay_with_their_prompts_whatever_the_batches(made: Planted, model: ChatModel) -> None:
    items = model.tokenize([made.harmful.prompts[0].text, "Hi"])
    before, model.budgets = model.budgets, Budgets(1, 1)
    try:
        found = token_effects(model, made.suite, items, sorted(made.truth.refusal))
    finally:
        model.budgets = before
    assert [len(each) for each in found] == [len(item) for item in items]
    assert found[0].abs().max() > 10 * found[1].abs().max()
    together = token_effects(model, made.suite, items, sorted(made.truth.refusal))
    for one, other in zip(found, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
