"""Interventions against the dense form: encode everything, clamp, decode, add the error back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from demur.errors import InputError, SaeError
from demur.method.interventions import (
    AblateDirection,
    AddDirection,
    Change,
    Compiled,
    HoldFeatures,
    Intervention,
    PerPrompt,
    ScaleFeatures,
    ScaleFrom,
    SetFeatures,
    Where,
    conditional,
    intervention_id,
)
from demur.model import Batch, ChatModel, Region, count_hooks, hooked
from demur.saes import Suite
from demur.testing import FAMILIES, tiny_model, tiny_suite
from demur.types import FeatureId, Prompt

TEXTS = ["Hi", "Tell me how to bake bread", "Explain the rules of chess to a child"]
IDS = ["0", "1", "2"]
D_SAE = 24

Activation = Literal["jumprelu", "relu", "topk"]
_CACHE: dict[str, tuple[ChatModel, Suite]] = {}


def setup(activation: Activation = "jumprelu", family: Any = "gemma2") -> tuple[ChatModel, Suite]:
    key = f"{family}/{activation}"
    if key not in _CACHE:
        hf, tokenizer = tiny_model(family)
        suite = tiny_suite(hf, d_sae=D_SAE, activation=activation)
        _CACHE[key] = ChatModel(hf, tokenizer, name=family), suite
    return _CACHE[key]


def batch_of(model: ChatModel, texts: Sequence[str] = TEXTS) -> Batch:
    return model.batch(model.tokenize(texts))


def logits(model: ChatModel, batch: Batch) -> Tensor:
    output = model.hf(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return output.logits[batch.real]


def dense(suite: Suite, layer: int, change: Any, real: Tensor) -> Any:
    """Hook of the reference: dense encode, clamp, decode, error added back; padding left alone."""
    sae = suite[layer].dense()

    def run(x: Tensor) -> Tensor:
        f = sae.encode(x)
        error = x - sae.decode(f)
        return torch.where(real[..., None], sae.decode(change(f)) + error, x)

    return run


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


features = st.lists(st.tuples(st.integers(0, 3), st.integers(0, D_SAE - 1)), min_size=1, max_size=12, unique=True).map(
    lambda found: tuple(FeatureId(*each) for each in found)
)


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "topk"])
@settings(max_examples=8)
@given(chosen=features, factor=st.sampled_from([0.0, -1.0, -3.0, 0.5, 2.0]), value=st.floats(0, 5))
def test_scale_and_set_equal_the_dense_clamp(
    activation: Activation, chosen: tuple[FeatureId, ...], factor: float, value: float
) -> None:
    model, suite = setup(activation)
    batch = batch_of(model)
    half = len(chosen) // 2
    scaled, fixed = chosen[:half], chosen[half:]

    def clamp(layer: int) -> Any:
        def change(f: Tensor) -> Tensor:
            f = f.clone()
            for feature in scaled:
                if feature.layer == layer:
                    f[..., feature.index] *= factor
            for feature in fixed:
                if feature.layer == layer:
                    f[..., feature.index] = value
            return f

        return change

    layers = {feature.layer for feature in chosen}
    with torch.inference_mode():
        reference = {layer: dense(suite, layer, clamp(layer), batch.real) for layer in layers}
        with hooked(model.layers, reference):
            expected = logits(model, batch)
        changes = [ScaleFeatures(scaled, factor), SetFeatures(fixed, value)]
        with Compiled(model, suite, changes).on(batch):
            found = logits(model, batch)
    close(found, expected)


@settings(max_examples=8)
@given(chosen=features, seed=st.integers(0, 1000), by_position=st.booleans())
def test_hold_equals_the_dense_clamp_at_each_position(
    chosen: tuple[FeatureId, ...], seed: int, by_position: bool
) -> None:
    model, suite = setup()
    batch = batch_of(model)
    generator = torch.Generator().manual_seed(seed)
    lengths = batch.attention_mask.sum(1).tolist()
    values = [torch.rand((n, len(chosen)) if by_position else (len(chosen),), generator=generator) * 3 for n in lengths]
    width = batch.input_ids.shape[1]

    def clamp(layer: int) -> Any:
        def change(f: Tensor) -> Tensor:
            f = f.clone()
            for row, held in enumerate(values):
                for column, feature in enumerate(chosen):
                    if feature.layer == layer:
                        f[row, width - lengths[row] :, feature.index] = held[..., column]
            return f

        return change

    layers = {feature.layer for feature in chosen}
    with torch.inference_mode():
        with hooked(model.layers, {layer: dense(suite, layer, clamp(layer), batch.real) for layer in layers}):
            expected = logits(model, batch)
        held = PerPrompt({IDS[n]: (HoldFeatures(chosen, v),) for n, v in enumerate(values)})
        with Compiled(model, suite, [held]).on(batch):
            found = logits(model, batch)
    close(found, expected)


def test_scaling_by_hand() -> None:
    model, suite = setup()
    batch = batch_of(model)
    rows = suite[1].rows([3])
    with torch.inference_mode():
        with model.capture([1]) as before:
            model.last_logits(batch)
        with Compiled(model, suite, [ScaleFeatures((FeatureId(1, 3),), -3.0)]).on(batch), model.capture([1]) as after:
            model.last_logits(batch)
    x = before[1]
    f = (x @ rows.w_enc + rows.b_enc)[..., 0]
    assert rows.threshold is not None
    f = torch.where(f > rows.threshold, f, 0.0)
    expected = x + (-3.0 - 1.0) * f[..., None] * rows.w_dec[0]
    torch.testing.assert_close(after[1][batch.real], expected[batch.real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1][~batch.real], x[~batch.real], rtol=0, atol=0)
    assert bool((f[batch.real] > 0).any())


@settings(max_examples=8)
@given(chosen=features, seed=st.integers(0, 1000), by_position=st.booleans(), on=st.booleans())
def test_what_is_held_is_released_after_the_prompt_or_held_on(
    chosen: tuple[FeatureId, ...], seed: int, by_position: bool, on: bool
) -> None:
    """One pass over prompts of different lengths and the tokens after them, one feature beside them scaled at all."""
    model, suite = setup()
    batch = batch_of(model)
    scaled = next(FeatureId(1, n) for n in range(D_SAE) if FeatureId(1, n) not in chosen)
    generator = torch.Generator().manual_seed(seed)
    lengths, width, more = batch.attention_mask.sum(1).tolist(), batch.input_ids.shape[1], 3
    values = [torch.rand((n, len(chosen)) if by_position else (len(chosen),), generator=generator) * 3 for n in lengths]
    after = [torch.rand(len(chosen), generator=generator) * 3 for _ in lengths]
    answer = torch.randint(5, 50, (len(TEXTS), more), generator=generator)
    ids, mask = (
        torch.cat([batch.input_ids, answer], 1),
        torch.nn.functional.pad(batch.attention_mask, (0, more), value=1),
    )
    places = torch.cat([batch.position_ids, batch.position_ids[:, -1:] + torch.arange(1, more + 1)], 1)

    def run() -> Tensor:
        asked: Any = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": False}
        return model.hf(**asked).logits[mask.bool()]

    def clamp(layer: int) -> Any:
        def change(f: Tensor) -> Tensor:
            f = f.clone()
            if scaled.layer == layer:
                f[..., scaled.index] *= -2.0
            for row, held in enumerate(values):
                for column, feature in enumerate(chosen):
                    if feature.layer == layer:
                        f[row, width - lengths[row] : width, feature.index] = held[..., column]
                        if on:
                            f[row, width:, feature.index] = after[row][column]
            return f

        return change

    layers = {feature.layer for feature in (*chosen, scaled)}
    holds = (HoldFeatures(chosen, v, a if on else None) for v, a in zip(values, after, strict=True))
    changes = [ScaleFeatures((scaled,), -2.0), PerPrompt({IDS[n]: (hold,) for n, hold in enumerate(holds)})]
    with torch.inference_mode():
        with hooked(model.layers, {layer: dense(suite, layer, clamp(layer), mask.bool()) for layer in layers}):
            expected = run()
        with Compiled(model, suite, changes).on(batch):
            found = run()
    close(found, expected)


def passed(model: ChatModel, batch: Batch, more: int, change: Compiled | None, layer: int = 1) -> Tensor:
    """What leaves a layer in one pass over a batch of prompts and `more` tokens of answers to them."""
    ids = torch.cat([batch.input_ids, torch.full((len(batch), more), 9)], 1)
    mask = torch.nn.functional.pad(batch.attention_mask, (0, more), value=1)
    places = torch.cat([batch.position_ids, batch.position_ids[:, -1:] + torch.arange(1, more + 1)], 1)
    acting = (change or Compiled(model, None, [])).on(batch)
    with torch.inference_mode(), acting, model.capture([layer]) as captured:
        cast("Any", model.hf)(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
    return captured[layer]


def test_values_may_be_held_on_the_answer_alone() -> None:
    """Free on the prompt (nan), at its last token too, and held from there on."""
    model, suite = setup()
    batch = batch_of(model)
    feature, width = FeatureId(1, 3), batch.input_ids.shape[1]
    for shape in ((1,), (int(batch.attention_mask[0].sum()), 1)):
        hold = HoldFeatures((feature,), torch.full(shape, torch.nan), torch.tensor([2.5]))
        before = passed(model, batch, 3, None)
        after = passed(model, batch, 3, Compiled(model, suite, [PerPrompt({IDS[0]: (hold,)})]))
        expected, rows = before.clone(), suite[1].rows([3])
        expected[0, width:] += (2.5 - rows.encode(before[0, width:])) @ rows.w_dec
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(after[0, width:], before[0, width:])


def test_each_feature_is_scaled_from_its_own_start() -> None:
    change = ScaleFrom((FeatureId(0, 1), FeatureId(2, 0), FeatureId(0, 4)), -2.0, (0, 2, 3), 4)
    scale, shift = change.affine()
    assert scale.tolist() == [[-2, 1, 1], [-2, 1, 1], [-2, -2, 1], [-2, -2, -2]]
    assert shift.tolist() == [0, 0, 0]
    assert change.label == "scale-from(-2)x3"


@dataclass(frozen=True)
class Shift(Intervention):
    """What a user's file would hold: some regions of layer 1 are moved."""

    regions: tuple[Region, ...] | None
    where: Where = "all"

    def acts_on(self, model: ChatModel) -> tuple[int, ...]:
        del model
        return (1,)

    def change(self, model: ChatModel, layer: int) -> Change:
        del model, layer
        return lambda residual: residual + 1


@pytest.mark.parametrize("where", ["all", "prompt"])
@pytest.mark.parametrize("regions", [(Region.INSTRUCTION,), (Region.POST_INSTRUCTION, Region.RESPONSE), None])
def test_a_change_of_some_regions_stays_in_them(where: Where, regions: tuple[Region, ...] | None) -> None:
    """In prompts of different lengths and the answers after them, of which generated tokens are a part; padding, and
    what stands before the user's words, are not."""
    model, _ = setup()
    batch, more = batch_of(model), 2
    inside = batch.real if regions is None else batch.within(regions)
    answer = where == "all" and (regions is None or Region.RESPONSE in regions)
    expected = torch.nn.functional.pad(inside, (0, more), value=answer)
    moved = passed(model, batch, more, Compiled(model, None, [Shift(regions, where)])) - passed(
        model, batch, more, None
    )
    assert torch.equal(moved.abs().sum(-1) > 0.5, expected)


def test_values_held_after_the_prompt_name_their_size() -> None:
    with pytest.raises(InputError, match=r"after the prompt have shape \(3,\); expected \[1\]"):
        HoldFeatures((FeatureId(0, 1),), torch.zeros(1), torch.zeros(3))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_to_do_changes_no_bit(family: Any) -> None:
    model, suite = setup(family=family)
    batch = batch_of(model)
    empty: list[Sequence[Intervention]] = [(), [ScaleFeatures((), -3.0)], [PerPrompt({})]]
    with torch.inference_mode():
        plain = logits(model, batch)
        for changes in empty:
            with Compiled(model, suite, changes).on(batch):
                assert count_hooks(model.hf) == 0
                assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_batched_equals_single_under_intervention(family: Any) -> None:
    model, suite = setup(family=family)
    local = PerPrompt({"a": (ScaleFeatures((FeatureId(0, 1),), -2.0),), "c": (SetFeatures((FeatureId(2, 5),), 3.0),)})
    compiled = Compiled(model, suite, [ScaleFeatures((FeatureId(1, 3), FeatureId(3, 2)), -3.0), local])
    items = model.tokenize(TEXTS)
    with torch.inference_mode():
        batch = model.batch(items)
        with compiled.on(batch):
            together = model.last_logits(batch)
        for row, item in enumerate(items):
            single = model.batch([item])
            with compiled.on(single):
                torch.testing.assert_close(model.last_logits(single)[0], together[row], rtol=1e-4, atol=1e-4)


def test_per_prompt_sets_follow_their_prompts() -> None:
    """After sorting by length rows stand in another order than the caller's."""
    model, suite = setup()
    sets = {prompt: (ScaleFeatures((FeatureId(1, n), FeatureId(2, n + 1)), -3.0),) for n, prompt in enumerate(IDS)}
    items = model.tokenize(TEXTS)
    model.max_batch_tokens = 2 * max(map(len, items))
    alone: dict[str, Tensor] = {}
    with torch.inference_mode():
        for prompt, item in zip(IDS, items, strict=True):
            single = model.batch([item])
            with Compiled(model, suite, sets[prompt]).on(single):
                alone[prompt] = model.last_logits(single)[0]
        for order in ([0, 1, 2], [2, 0, 1]):
            batch = model.batch([items[n] for n in order])
            with Compiled(model, suite, [PerPrompt(sets)]).on(batch):
                found = model.last_logits(batch)
            for row, n in enumerate(order):
                torch.testing.assert_close(found[row], alone[IDS[n]], rtol=1e-4, atol=1e-4)


def test_prompt_only_changes_stop_where_the_answer_begins() -> None:
    model, suite = setup()
    batch = batch_of(model)
    seen: dict[str, list[Tensor]] = {}
    for where in ("all", "prompt"):
        compiled = Compiled(model, suite, [SetFeatures((FeatureId(1, 3),), 50.0, where)])
        moved = seen[where] = []
        entering: list[Tensor] = []
        before = {1: lambda x, store=entering: store.append(x)}
        after = {1: lambda x, store=moved, first=entering: store.append((x - first[-1]).abs().sum(-1))}
        with torch.inference_mode(), hooked(model.layers, before), compiled.on(batch), hooked(model.layers, after):
            cast("Any", model.hf).generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=3,
                min_new_tokens=3,
                do_sample=False,
                pad_token_id=model.pad_id,
            )
    for steps in seen.values():
        assert len(steps) == 3
        assert bool((steps[0][batch.real] > 0).all())
        assert bool((steps[0][~batch.real] == 0).all())
    assert all(bool((step > 0).all()) for step in seen["all"][1:])
    assert all(bool((step == 0).all()) for step in seen["prompt"][1:])


def test_a_pass_that_crosses_from_prompt_to_answer() -> None:
    """Teacher forcing: the batch that is served is the prompt; the pass holds the answer's tokens as well."""
    model, suite = setup()
    prompt = model.batch(model.tokenize(["Hi"]))
    longer = model.batch([model.chat.tokenize("Hi", response="Bake bread for a child")])
    width = prompt.input_ids.shape[1]
    for change in (
        SetFeatures((FeatureId(1, 3),), 50.0, "prompt"),
        AddDirection(torch.ones(model.d_model), 1, 1.0, "prompt"),
    ):
        with torch.inference_mode():
            with model.capture([1]) as before:
                model.last_logits(longer)
            with Compiled(model, suite, [change]).on(prompt), model.capture([1]) as after:
                logits(model, longer)
        moved = (after[1] - before[1]).abs().sum(-1)[0] > 0
        assert moved.tolist() == [True] * width + [False] * (len(moved) - width)


def test_directions_by_hand() -> None:
    model, _ = setup()
    batch = batch_of(model)
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(model.d_model, generator=generator)
    reference = torch.randn(model.n_layers, model.d_model, generator=generator)
    unit = vector / vector.norm()
    with torch.inference_mode():
        for change, expected in (
            (AblateDirection(vector), torch.zeros(model.n_layers)),
            (AblateDirection(vector, reference=reference), reference @ unit),
        ):
            with Compiled(model, None, [change]).on(batch), model.capture() as captured:
                model.last_logits(batch)
            for layer in range(model.n_layers):
                found = captured[layer][batch.real] @ unit
                torch.testing.assert_close(found, expected[layer].expand(len(found)), rtol=1e-4, atol=1e-4)
        with model.capture([2]) as before:
            model.last_logits(batch)
        with Compiled(model, None, [AddDirection(vector, 2, -2.0)]).on(batch), model.capture([2]) as after:
            model.last_logits(batch)
    torch.testing.assert_close((after[2] - before[2])[batch.real], (-2.0 * vector).expand(int(batch.real.sum()), -1))


@pytest.mark.parametrize("affine", [False, True])
def test_a_subspace_is_taken_out_by_the_projection_on_it(affine: bool) -> None:
    model, _ = setup()
    batch = batch_of(model)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3, model.d_model, generator=generator)
    dependent = torch.cat([rows, rows[:1] - 2 * rows[1:2]])  # spans no more than the rows do
    reference = torch.randn(model.n_layers, model.d_model, generator=generator) if affine else None
    change = AblateDirection(dependent, layers=(1,), reference=reference)
    with torch.inference_mode():
        with model.capture([1]) as before:
            model.last_logits(batch)
        with Compiled(model, None, [change]).on(batch), model.capture([1]) as after:
            model.last_logits(batch)
    x, found = before[1][batch.real].double(), after[1][batch.real].double()
    span = rows.double()
    onto = span.T @ torch.linalg.inv(span @ span.T) @ span
    kept = torch.zeros(model.d_model).double() if reference is None else reference[1].double()
    torch.testing.assert_close(found, x - (x - kept) @ onto, rtol=1e-4, atol=1e-4)


def test_several_interventions_on_one_layer_compose() -> None:
    """Features first read one residual together; a direction then acts on what comes out."""
    model, suite = setup()
    batch = batch_of(model)
    one, two = FeatureId(1, 3), FeatureId(1, 8)
    vector = torch.ones(model.d_model)
    parts = [ScaleFeatures((one,), -3.0), SetFeatures((two,), 2.0)]
    with torch.inference_mode():
        with Compiled(model, suite, parts).on(batch), model.capture([1]) as together:
            model.last_logits(batch)
        with Compiled(model, suite, parts[::-1]).on(batch), model.capture([1]) as swapped:
            model.last_logits(batch)
        with Compiled(model, suite, [*parts, AblateDirection(vector)]).on(batch), model.capture([1]) as ablated:
            model.last_logits(batch)
    torch.testing.assert_close(together[1], swapped[1])
    assert float((ablated[1][batch.real] @ vector).abs().max()) < 1e-3
    assert float((together[1][batch.real] @ vector).abs().max()) > 1e-2


def test_an_exception_under_intervention_leaves_no_hook() -> None:
    model, suite = setup()
    batch = batch_of(model)
    compiled = Compiled(model, suite, [ScaleFeatures((FeatureId(1, 3),), 0.0)])
    with pytest.raises(KeyError), compiled.on(batch), compiled.on(batch):
        raise KeyError
    assert count_hooks(model.hf) == 0


def test_bfloat16_models_are_read_in_float32() -> None:
    hf, tokenizer = tiny_model("gemma2")
    suite = tiny_suite(hf, d_sae=D_SAE)
    model = ChatModel(hf.bfloat16(), tokenizer, name="m")
    batch = batch_of(model)
    rows = suite[1].rows([3])
    with torch.inference_mode():
        with model.capture([1]) as before:
            model.last_logits(batch)
        with Compiled(model, suite, [SetFeatures((FeatureId(1, 3),), 2.0)]).on(batch), model.capture([1]) as after:
            model.last_logits(batch)
    x = before[1]
    delta = (2.0 - rows.encode(x)) @ rows.w_dec
    expected = x + delta.bfloat16()
    assert after[1].dtype == torch.bfloat16
    torch.testing.assert_close(after[1][batch.real], expected[batch.real], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [2, 6])
def test_padding_is_left_alone_in_every_part_of_a_prompt(cut: int) -> None:
    model, suite = setup()
    batch = batch_of(model)
    assert int((~batch.real[0]).sum()) > cut + 2
    hf = cast("Any", model.hf)

    def residuals(change: SetFeatures | None) -> Tensor:
        parts: list[Tensor] = []
        cache: Any = None
        record = hooked(model.layers, {1: lambda x: parts.append(x.clone())})
        changes = [] if change is None else [change]
        with torch.inference_mode(), Compiled(model, suite, changes).on(batch), record:
            for part in (slice(0, cut), slice(cut, None)):
                end = batch.input_ids[:, part].shape[1] + part.start
                cache = hf(
                    batch.input_ids[:, part],
                    attention_mask=batch.attention_mask[:, :end],
                    position_ids=batch.position_ids[:, part],
                    past_key_values=cache,
                    use_cache=True,
                ).past_key_values
        return torch.cat(parts, 1)

    moved = (residuals(SetFeatures((FeatureId(1, 3),), 50.0)) - residuals(None)).abs().sum(-1) > 0
    assert torch.equal(moved, batch.real)


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_held_values_stay_with_their_tokens_when_the_prompt_comes_in_parts(cut: int) -> None:
    """As with a cache that is filled piece by piece: the second pass begins beyond the first slots."""
    model, suite = setup()
    batch = batch_of(model, TEXTS[1:2])
    width = batch.input_ids.shape[1]
    values = torch.rand(width, 2, generator=torch.Generator().manual_seed(4)) * 9
    held = PerPrompt({"0": (HoldFeatures((FeatureId(1, 3), FeatureId(2, 5)), values),)})
    hf = cast("Any", model.hf)
    with torch.inference_mode(), Compiled(model, suite, [held]).on(batch):
        whole = hf(batch.input_ids, attention_mask=batch.attention_mask, use_cache=True).logits
        first = hf(batch.input_ids[:, :cut], attention_mask=batch.attention_mask[:, :cut], use_cache=True)
        rest = hf(
            batch.input_ids[:, cut:],
            attention_mask=batch.attention_mask,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_names_tell_interventions_apart() -> None:
    one, two = (FeatureId(1, 3),), (FeatureId(1, 4),)
    vector = torch.ones(4)
    every: list[Intervention] = [
        ScaleFeatures(one, -3.0),
        ScaleFeatures(two, -3.0),
        ScaleFeatures(one, -1.0),
        ScaleFeatures(one, -3.0, "prompt"),
        SetFeatures(one, -3.0),
        SetFeatures(one, (-3.5,)),
        HoldFeatures(one, torch.tensor([1.0])),
        HoldFeatures(one, torch.tensor([2.0])),
        PerPrompt({"a": (ScaleFeatures(one, -3.0),)}),
        PerPrompt({"b": (ScaleFeatures(one, -3.0),)}),
        AblateDirection(vector),
        AblateDirection(vector, layers=(1,)),
        AblateDirection(vector, reference=torch.ones(2, 4)),
        AblateDirection(vector, reference=torch.zeros(2, 4)),
        AblateDirection(vector, where="prompt"),
        AddDirection(vector, 1),
        AddDirection(vector, 2),
        AddDirection(vector, 1, 2.0),
        AddDirection(vector, 1, where="prompt"),
        SetFeatures(one, -3.0, "prompt"),
        PerPrompt({"a": (ScaleFeatures(one, -3.0, "prompt"),)}),
    ]
    assert len({each.id for each in every}) == len(every)
    assert ScaleFeatures(one, -3.0).id == ScaleFeatures((FeatureId(1, 3),), -3).id
    assert intervention_id(()) == "none"


def test_bad_interventions_are_named() -> None:
    model, suite = setup()
    one = (FeatureId(1, 3),)
    with pytest.raises(InputError, match="feature 1:3 is changed by two interventions"):
        Compiled(model, suite, [ScaleFeatures(one, 0.0), SetFeatures(one, 1.0)])
    with pytest.raises(InputError, match="feature 1:3 is changed by two interventions"):
        Compiled(model, suite, [ScaleFeatures(one, 0.0), PerPrompt({"a": (SetFeatures(one, 1.0),)})])
    with pytest.raises(InputError, match="feature 9:3 names layer 9; the model has layers 0…3"):
        Compiled(model, suite, [ScaleFeatures((FeatureId(9, 3),), 0.0)])
    with pytest.raises(SaeError, match=f"features 0 to {D_SAE - 1}, not {D_SAE}"):
        Compiled(model, suite, [ScaleFeatures((FeatureId(1, D_SAE),), 0.0)])
    with pytest.raises(SaeError, match="none was given"):
        Compiled(model, None, [ScaleFeatures(one, 0.0)])
    with pytest.raises(InputError, match="inside PerPrompt"):
        Compiled(model, suite, [HoldFeatures(one, torch.ones(1))])
    with pytest.raises(InputError, match="2 values were given for 1 features"):
        SetFeatures(one, (1.0, 2.0))
    with pytest.raises(InputError, match=r"held values have shape \(2,\)"):
        HoldFeatures(one, torch.ones(2))
    with pytest.raises(InputError, match="names layer 7"):
        Compiled(model, None, [AddDirection(torch.ones(model.d_model), 7)])
    with pytest.raises(InputError, match="the model's width is 32"):
        Compiled(model, None, [AblateDirection(torch.ones(5))])
    held = PerPrompt({"0": (HoldFeatures(one, torch.ones(3, 1)),)})
    with (
        pytest.raises(InputError, match="values for 3 tokens are held on a prompt of"),
        Compiled(model, suite, [held]).on(batch_of(model)),
    ):
        model.last_logits(batch_of(model))
    # Two prompts may change one feature, each in its own way.
    Compiled(model, suite, [PerPrompt({"a": (ScaleFeatures(one, 0.0),), "b": (SetFeatures(one, 1.0),)})])


def test_features_are_held_only_where_a_value_is_given() -> None:
    model, suite = setup()
    batch = batch_of(model)
    row, length = 1, int(batch.attention_mask[1].sum())
    feature, other, token = FeatureId(1, 3), FeatureId(1, 7), 4
    values = torch.full((length, 2), torch.nan)
    values[token, 0] = 2.5
    held = PerPrompt({IDS[row]: (HoldFeatures((feature, other), values),)})
    with torch.inference_mode():
        with model.capture([1]) as before:
            model.last_logits(batch)
        with Compiled(model, suite, [held]).on(batch), model.capture([1]) as after:
            model.last_logits(batch)
    rows = suite[1].rows([feature.index])
    expected = before[1].clone()
    place = batch.input_ids.shape[1] - length + token
    x = before[1][row, place]
    expected[row, place] = x + (2.5 - rows.encode(x)[0]) * rows.w_dec[0]
    assert not torch.equal(expected, before[1])
    torch.testing.assert_close(after[1], expected, rtol=1e-5, atol=1e-5)


def test_holding_some_tokens_of_one_prompt_leaves_scaling_of_all_in_place() -> None:
    model, suite = setup()
    batch = batch_of(model)
    scaled, held, length = FeatureId(1, 3), FeatureId(1, 7), int(batch.attention_mask[0].sum())
    values = torch.full((length, 1), torch.nan)
    scale = ScaleFeatures((scaled,), -2.0)
    with torch.inference_mode():
        with Compiled(model, suite, [scale]).on(batch):
            expected = model.last_logits(batch)
        change = Compiled(model, suite, [scale, PerPrompt({IDS[0]: (HoldFeatures((held,), values),)})])
        with change.on(batch):
            found = model.last_logits(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- changes of some prompts only ----------------------------------------------------------------------------------


def test_a_conditional_change_is_the_change_on_its_prompts_and_nothing_on_the_others() -> None:
    """Of features and of the residual alike, in one batch of prompts of different lengths."""
    model, suite = setup()
    prompts = [Prompt(id=name, text=text) for name, text in zip(IDS, TEXTS, strict=True)]
    batch = model.batch(model.tokenize(prompts))
    push = AddDirection(torch.ones(model.d_model), 1, 3.0)
    pull = AblateDirection(torch.ones(model.d_model))
    scale = ScaleFeatures((FeatureId(1, 3), FeatureId(2, 5)), -3.0)
    with torch.inference_mode():
        clean = model.last_logits(batch)
        for change in ((push,), (pull,), (scale,), (scale, push)):
            with Compiled(model, suite, change).on(batch):
                always = model.last_logits(batch)
            own = conditional(change, prompts, [True, False, True])
            assert own.label == "conditional"
            with Compiled(model, suite, [own]).on(batch):
                found = model.last_logits(batch)
            assert not torch.equal(always[1], clean[1])
            torch.testing.assert_close(found[1], clean[1], rtol=0, atol=0)
            torch.testing.assert_close(found[[0, 2]], always[[0, 2]], rtol=1e-5, atol=1e-5)


def test_each_residual_change_acts_on_the_prompts_that_name_it() -> None:
    """Equal changes are one, whoever made them; those of features are none."""
    push, again, pull = (AddDirection(torch.ones(4), 1, size) for size in (3.0, 3.0, -1.0))
    scale = ScaleFeatures((FeatureId(1, 3),), 0.0)
    own = PerPrompt({"a": (push, scale), "b": (pull,), "c": (scale, pull, again), "d": (scale,), "e": ()})
    assert own.of_residual() == [(push, frozenset("ac")), (pull, frozenset("bc"))]
    assert [own.features_of(prompt) for prompt in "abcdef"] == [[scale], [], [scale], [scale], [], []]


def test_a_conditional_change_goes_on_while_answers_are_written() -> None:
    model, _ = setup()
    prompts = [Prompt(id=name, text=text) for name, text in zip(IDS, TEXTS, strict=True)]
    push = AddDirection(torch.linspace(-1, 1, model.d_model), 1, 30.0)
    clean = model.generate(prompts, max_new_tokens=6).texts
    with model.intervene(push):
        always = model.generate(prompts, max_new_tokens=6).texts
    with model.intervene(conditional(push, prompts, [False, True, True]).bind()):
        found = model.generate(prompts, max_new_tokens=6).texts
    assert found == (clean[0], *always[1:])
    assert clean[1:] != always[1:]


def test_a_conditional_change_needs_a_truth_value_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="shorter"):
        conditional(ScaleFeatures((), 0.0), [Prompt(id="a", text="x"), Prompt(id="b", text="y")], [True])
    nested = PerPrompt({"a": (PerPrompt({}),)})
    with pytest.raises(InputError, match="inside another one"):
        nested.of_residual()


@pytest.mark.parametrize("change", ["features", "residual"])
def test_a_change_of_the_prompt_leaves_given_answers_alone(change: str) -> None:
    """The answer's tokens keep their residuals where only they could change: after the layer itself."""
    model, suite = setup()
    layer = 1
    made: Any = {
        "features": SetFeatures((FeatureId(layer, 3),), 40.0, "prompt"),
        "residual": AddDirection(torch.ones(model.d_model), layer, 5.0, "prompt"),
    }[change]
    items = [model.chat.tokenize(Prompt(id=str(n), text=t), "An answer.") for n, t in enumerate(TEXTS[:2])]
    batch = model.batch(items)
    with torch.inference_mode(), model.capture([layer]) as before:
        model.last_logits(batch)
        clean = before[layer].clone()
    with torch.inference_mode(), Compiled(model, suite, [made]).on(batch), model.capture([layer]) as after:
        model.last_logits(batch)
        changed = (after[layer] != clean).any(-1)
    answer = batch.within((Region.RESPONSE,))
    assert answer.any()
    assert not changed[answer].any()
    assert changed[batch.real & ~answer].all()
