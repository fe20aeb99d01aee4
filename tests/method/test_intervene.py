"""`model.intervene`, and interventions that a user writes: one class each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import InputError, SaeError
from demur.method.attribution import attribute
from demur.method.interventions import (
    AblateDirection,
    AddDirection,
    Change,
    Compiled,
    FeatureIntervention,
    Intervention,
    PerPrompt,
    ScaleFeatures,
    SetFeatures,
    Where,
    bind,
    intervention_id,
)
from demur.method.path import Metric
from demur.model import ChatModel, answer_batches, count_hooks, hooked
from demur.saes import Suite
from demur.testing import tiny_model, tiny_suite
from demur.types import FeatureId, Prompt

TEXTS = ["Tell me how to bake bread", "Hi", "Explain the rules of chess to a child"]
PROMPTS = [Prompt(id=name, text=text, label="harmless") for name, text in zip("abc", TEXTS, strict=True)]
ONE, TWO = (FeatureId(1, 3),), (FeatureId(2, 5),)
NEW = 5


@pytest.fixture(scope="module")
def model() -> ChatModel:
    hf, tokenizer = tiny_model("gemma2")
    return ChatModel(hf, tokenizer, name="gemma2")


@pytest.fixture(scope="module")
def suite(model: ChatModel) -> Suite:
    return tiny_suite(model.hf, d_sae=24)


@dataclass(frozen=True)
class ClampNorm(Intervention):
    """What a user's file would hold."""

    limit: float
    where: Where = "all"

    def acts_on(self, model: ChatModel) -> Iterable[int]:
        return range(1, model.n_layers)

    def change(self, model: ChatModel, layer: int) -> Change:
        del model, layer
        return lambda x: x * (self.limit / x.norm(dim=-1, keepdim=True)).clamp(max=1)


@dataclass(frozen=True)
class AddToFeatures(FeatureIntervention):
    features: tuple[FeatureId, ...]
    amount: float

    def affine(self) -> tuple[float, Float[Tensor, "*pos k"]]:
        return 1.0, torch.full((len(self.features),), self.amount)


CLAMP = ClampNorm(0.5)


def clamped_by_hand(model: ChatModel) -> Any:
    def clamp(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True)
        return torch.where(norm > 0.5, 0.5 * x / norm, x)

    return hooked(model.layers, dict.fromkeys(range(1, model.n_layers), clamp))


def test_answers_are_those_of_hooks_by_hand_and_the_model_is_itself_again(model: ChatModel) -> None:
    clean = model.generate(PROMPTS, max_new_tokens=NEW)
    with clamped_by_hand(model):
        expected = model.generate(PROMPTS, max_new_tokens=NEW)
    with model.intervene(CLAMP):
        found = model.generate(PROMPTS, max_new_tokens=NEW)
    assert found.texts == expected.texts != clean.texts
    assert {answer.intervention for answer in found} == {CLAMP.id}
    assert found.prompts == tuple(PROMPTS)
    assert model.generate(PROMPTS, max_new_tokens=NEW) == clean
    assert clean[0].intervention == "none" == model.intervention_id
    assert count_hooks(model.hf) == 0


def test_one_intervention_given_with_the_prompts_or_opened_around_them(model: ChatModel, suite: Suite) -> None:
    bound = ScaleFeatures(ONE, -3.0).bind(suite)
    with model.intervene(bound):
        opened = model.generate(PROMPTS, max_new_tokens=NEW)
    compiled = Compiled(model, suite, bound.interventions)
    for given in (bound, compiled):
        batches = answer_batches(model, PROMPTS, given, max_new_tokens=NEW)
        found = {answer.prompt.id: answer for batch in batches for answer in batch}
        assert tuple(found[prompt.id] for prompt in PROMPTS) == opened
    with pytest.raises(SaeError, match="none was given"), model.intervene(ScaleFeatures(ONE, 0.0)):
        pass


def test_what_was_made_ready_for_one_model_is_made_ready_for_another(model: ChatModel, suite: Suite) -> None:
    """As where a guard's model is loaded anew: the same change of the other model, and no second reading of rows."""
    ready = Compiled(model, suite, [SetFeatures(ONE, 40.0)])
    assert ready.compile(model) is ready
    other = ChatModel(*tiny_model("gemma2", seed=5), name="other")
    again = ready.compile(other)
    assert (again.model, again.suite, again.id) == (other, suite, ready.id)
    batch = other.batch(other.tokenize(PROMPTS))
    with torch.inference_mode():
        with Compiled(other, suite, [SetFeatures(ONE, 40.0)]).on(batch):
            expected = other.last_logits(batch)
        with other.intervene(ready), other.serving(batch):
            found = other.last_logits(batch)
        plain = other.last_logits(batch)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_contexts_nest_and_each_acts_on_what_the_outer_one_made(model: ChatModel, suite: Suite) -> None:
    vector = torch.ones(model.d_model)
    outer, inner = AddDirection(vector, 1, 2.0), SetFeatures(ONE, 3.0).bind(suite)
    batch = model.batch(model.tokenize(PROMPTS))
    with torch.inference_mode():
        with Compiled(model, suite, [outer, SetFeatures(ONE, 3.0)]).on(batch):
            expected = model.last_logits(batch)
        with Compiled(model, suite, [SetFeatures(ONE, 3.0), outer]).on(batch):
            other = model.last_logits(batch)
        with model.intervene(outer), model.intervene(inner):
            assert model.intervention_id == f"{outer.id} + {inner.id}"
            nested = model.last_logits(batch)
        with model.intervene([outer, inner]):
            listed = model.last_logits(batch)
    torch.testing.assert_close(nested, expected, rtol=0, atol=0)
    torch.testing.assert_close(listed, expected, rtol=0, atol=0)
    assert not torch.allclose(other, expected)


def test_an_exception_closes_every_context(model: ChatModel, suite: Suite) -> None:
    with (
        pytest.raises(KeyError),
        model.intervene([CLAMP, AblateDirection(torch.ones(model.d_model))]),
        model.intervene(ScaleFeatures(ONE, 0.0).bind(suite)),
    ):
        raise KeyError
    with (
        pytest.raises(InputError, match=r"add\(1\) names layer 9"),
        model.intervene([CLAMP, AddDirection(torch.ones(32), 9)]),
    ):
        pass
    assert count_hooks(model.hf) == 0
    assert model.intervention_id == "none"


def test_prompts_of_their_own_are_found_in_whatever_order_they_are_batched(model: ChatModel, suite: Suite) -> None:
    own = PerPrompt({"b": (SetFeatures(ONE, 40.0),), "c": (SetFeatures(TWO, 40.0),)})
    with model.intervene(own.bind(suite)):
        together = model.generate(PROMPTS, max_new_tokens=NEW).texts
    clean = model.generate(PROMPTS, max_new_tokens=NEW).texts
    for n, change in enumerate((None, ONE, TWO)):
        expected = clean[n]
        if change is not None:
            with model.intervene(SetFeatures(change, 40.0).bind(suite)):
                expected = model.generate(PROMPTS[n : n + 1], max_new_tokens=NEW).texts[0]
        assert together[n] == expected
    assert together[0] == clean[0]
    assert together[1:] != clean[1:]


def test_an_open_intervention_follows_the_batches(model: ChatModel, suite: Suite) -> None:
    """Per-prompt sets and prompts' ends are those of the batch that is served, batch after batch."""
    own = PerPrompt({"a": (SetFeatures(ONE, 40.0, "prompt"),), "c": (SetFeatures(TWO, 40.0),)}).bind(suite)
    items = model.tokenize(PROMPTS)
    single = [model.batch([item]) for item in items]
    with torch.inference_mode():
        clean = [model.last_logits(batch) for batch in single]
        with model.intervene(own):
            together = [model.last_logits(batch) for batch in single]
        apart: list[Tensor] = []
        for batch in single:
            with model.intervene(own):
                apart.append(model.last_logits(batch))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    changed = [not torch.equal(one, plain) for one, plain in zip(together, clean, strict=True)]
    assert changed == [True, False, True]


def test_calls_by_other_code_are_changed_too_unless_it_differs_by_prompt(model: ChatModel, suite: Suite) -> None:
    batch = model.batch(model.tokenize(PROMPTS))
    call = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.inference_mode():
        with model.intervene(CLAMP):
            expected = model.last_logits(batch)
            found = cast("Any", model.hf)(**call).logits[:, -1].float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for change in (PerPrompt({"a": (ScaleFeatures(ONE, 0.0),)}), ScaleFeatures(ONE, 0.0, "prompt")):
            refused = pytest.raises(InputError, match="here the model is called on texts")
            with refused, model.intervene(change.bind(suite)):
                cast("Any", model.hf)(**call)
    assert count_hooks(model.hf) == 0


@pytest.mark.parametrize("where", ["all", "prompt"])
def test_a_users_intervention_leaves_padding_and_knows_where_the_prompt_ends(model: ChatModel, where: Where) -> None:
    batch = model.batch(model.tokenize(PROMPTS))
    steps: list[Tensor] = []
    clamp = ClampNorm(0.5, where)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    record = hooked(model.layers, {1: lambda x: steps.append(x.norm(dim=-1))})
    with torch.inference_mode(), Compiled(model, None, [clamp]).on(batch), record:
        cast("Any", model.hf).generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, pad_token_id=model.pad_id, **options
        )
    assert bool((steps[0][batch.real] <= 0.501).all())
    assert bool((steps[0][~batch.real] > 0.501).any())
    assert all(bool((step <= 0.501).all()) == (where == "all") for step in steps[1:])


def test_a_users_intervention_serves_as_the_patched_run(model: ChatModel, suite: Suite) -> None:
    items = model.tokenize(PROMPTS)
    pool = {1: range(24)}
    found = attribute(
        model, suite, items, pool, patch=Compiled(model, None, [CLAMP]), metric=Metric((5,)), method="gradient"
    )
    for item, row in zip(items, found.rows, strict=True):
        batch = model.batch([item])
        with torch.no_grad(), clamped_by_hand(model):
            logits = model.last_logits(batch)[0]
        logits[5] = -torch.inf
        assert row.target == int(logits.argmax())
        assert row.prompt_id == item.prompt_id


@dataclass(frozen=True)
class Halve(Intervention):
    """Says of no layer that it acts there, so it acts on all; computes in float32."""

    def change(self, model: ChatModel, layer: int) -> Change:
        del model, layer
        return lambda x: 0.5 * x.float()


def test_a_users_intervention_acts_on_every_layer_and_keeps_the_models_precision() -> None:
    hf, tokenizer = tiny_model("gemma2")
    model = ChatModel(cast("Any", hf).bfloat16(), tokenizer, name="half")
    batch = model.batch(model.tokenize(PROMPTS))
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], layer: int) -> Any:
        return lambda x: into.update({layer: x})

    every = range(model.n_layers)
    assert tuple(Halve().acts_on(model)) == tuple(every)
    before, after = ({layer: keep(into, layer) for layer in every} for into in (entered, left))
    with torch.inference_mode(), hooked(model.layers, before), model.intervene(Halve()), hooked(model.layers, after):
        model.last_logits(batch)
    for layer in every:
        assert left[layer].dtype == torch.bfloat16
        assert torch.equal(left[layer], torch.where(batch.real[..., None], 0.5 * entered[layer], entered[layer]))
    assert intervention_id([Halve(), CLAMP]) == f"{Halve().id} + {CLAMP.id}"


def test_a_users_feature_intervention_fuses_with_the_others(model: ChatModel, suite: Suite) -> None:
    both = (FeatureId(1, 3), FeatureId(1, 7))
    batch = model.batch(model.tokenize(PROMPTS))
    rows = suite[1].rows([3, 7])
    changes = [ScaleFeatures(both[:1], -1.0), AddToFeatures(both[1:], 0.7)]
    with torch.inference_mode():
        with model.capture([1]) as before:
            model.last_logits(batch)
        with model.intervene(bind(suite, *changes)), model.capture([1]) as after:
            model.last_logits(batch)
    f = rows.encode(before[1])
    expected = before[1] - 2 * f[..., :1] * rows.w_dec[0] + 0.7 * rows.w_dec[1]
    torch.testing.assert_close(after[1][batch.real], expected[batch.real], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="changed by two"):
        bind(suite, ScaleFeatures(both, 0.0), AddToFeatures(both, 1.0)).compile(model)


def test_a_users_intervention_has_an_id_of_its_own(model: ChatModel) -> None:
    @dataclass(frozen=True)
    class Other(Intervention):
        limit: float
        where: Where = "all"

    ids = {ClampNorm(0.5).id, ClampNorm(0.6).id, ClampNorm(0.5, "prompt").id, Other(0.5).id}
    assert len(ids) == 4
    assert ClampNorm(1).id == ClampNorm(1.0).id
    with pytest.raises(NotImplementedError, match="give it `change`"):
        Other(0.5).change(model, 0)
