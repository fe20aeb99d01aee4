"""The direction: means, scores by hand, the choice among candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch

from demur.errors import ModelError
from demur.method.direction import (
    ClassMeans,
    Direction,
    DirectionSearch,
    Scores,
    Start,
    candidate_name,
    choose,
    clean_log_probs,
    cluster_directions,
    find_direction,
    find_refusal_tokens,
    first_token,
    position_means,
    post_instruction_positions,
    refusal_log_odds,
    residuals_at,
    singular_directions,
)
from demur.method.interventions import AblateDirection, AddDirection, Compiled
from demur.model import ChatModel, count_hooks
from demur.testing import FAMILIES, tiny_model
from demur.types import Candidate

HARMFUL = ["Bake a cake for me", "Tell me how to bake bread", "Bake it now please", "How would one bake rye"]
HARMLESS = ["Explain the rules of chess", "Sing", "What is the capital of a country", "Explain jazz to a child"]
REFUSAL = (11, 12)


@pytest.fixture(scope="module")
def model() -> ChatModel:
    hf, tokenizer = tiny_model("gemma2")
    return ChatModel(hf, tokenizer, name="gemma2")


def test_means_over_prompts_of_different_length(model: ChatModel) -> None:
    items = model.tokenize(HARMFUL)
    found = position_means(model, items, [-3, -1])
    assert found.shape == (model.n_layers, 2, model.d_model)
    for layer in range(model.n_layers):
        rows: list[torch.Tensor] = []
        for item in items:
            with torch.inference_mode(), model.capture([layer]) as captured:
                model.last_logits(model.batch([item]))
            rows.append(captured[layer][0, [-3, -1]])
        torch.testing.assert_close(found[layer], torch.stack(rows).mean(0), rtol=1e-4, atol=1e-4)


def test_log_odds_by_hand() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = refusal_log_odds(p.log(), (0, 2))
    assert float(found) == pytest.approx(math.log(0.4) - math.log(0.6), abs=1e-6)


def test_post_instruction_positions(model: ChatModel) -> None:
    items = model.tokenize(HARMFUL)
    n = items[0].n_post_instruction
    assert n >= 4
    assert post_instruction_positions(items) == tuple(range(-n, 0))


def test_first_token_scores_keep_the_order_of_the_prompts(model: ChatModel) -> None:
    items = model.tokenize([*HARMFUL, *HARMLESS])
    change = [AblateDirection(torch.ones(model.d_model))]
    found = first_token(model, items, REFUSAL, change, clean_log_probs(model, items))
    for n, item in enumerate(items):
        batch = model.batch([item])
        with torch.inference_mode():
            before = model.last_logits(batch)[0].double().log_softmax(-1)
            with Compiled(model, None, change).on(batch):
                after = model.last_logits(batch)[0].double().log_softmax(-1)
        p = after.exp()[list(REFUSAL)].sum()
        assert float(found.log_odds[n]) == pytest.approx(float(p.log() - (1 - p).log()), abs=1e-3)
        assert float(found.kl[n]) == pytest.approx(float((before.exp() * (before - after)).sum()), abs=1e-4)


@pytest.mark.parametrize("position", [-1, -2])
def test_candidates_are_scored_as_the_definition_says(model: ChatModel, position: int) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    validation = (model.tokenize(HARMFUL[:2]), model.tokenize(HARMLESS[:2]))
    found = find_direction(model, train, validation, REFUSAL, DirectionSearch(max_depth=0.8))
    positions = post_instruction_positions([*train[0], *train[1]])
    assert {c.layer for c in found.candidates} == {0, 1, 2, 3} & {n for n in range(4) if n < 3.2}
    assert {c.position for c in found.candidates} <= set(positions)
    candidate = next(c for c in found.candidates if (c.layer, c.position, c.form) == (1, position, "affine"))
    harmful, harmless = (position_means(model, items, [position])[:, 0] for items in train)
    vector = harmful[1] - harmless[1]

    def mean_log_odds(items: Any, change: Any) -> float:
        total = 0.0
        for item in items:
            batch = model.batch([item])
            with torch.inference_mode(), Compiled(model, None, [change]).on(batch):
                p = model.last_logits(batch)[0].double().softmax(-1)[list(REFUSAL)].sum()
            total += float(p.log() - (1 - p).log())
        return total / len(items)

    ablation = AblateDirection(vector, reference=harmless)
    assert candidate.bypass == pytest.approx(mean_log_odds(validation[0], ablation), abs=1e-3)
    assert candidate.induce == pytest.approx(mean_log_odds(validation[1], AddDirection(vector, 1)), abs=1e-3)
    kl = 0.0
    for item in validation[1]:
        batch = model.batch([item])
        with torch.inference_mode():
            before = model.last_logits(batch)[0].double().log_softmax(-1)
            with Compiled(model, None, [ablation]).on(batch):
                after = model.last_logits(batch)[0].double().log_softmax(-1)
        kl += float((before.exp() * (before - after)).sum()) / len(validation[1])
    assert candidate.kl == pytest.approx(kl, abs=1e-5)
    assert candidate.kept == (kl <= 0.1 and candidate.induce > 0)


def test_directions_of_clusters_are_differences_in_their_means() -> None:
    near, far = torch.tensor([[1.0, 0, 0], [3, 0, 0], [2, 0, 0]]), torch.tensor([[0.0, 9, 0], [0, 11, 0]])
    harmful, harmless = torch.cat([far, near]), torch.tensor([0.0, 0, 1])
    torch.testing.assert_close(cluster_directions(harmful, harmless, 1), harmful.mean(0)[None] - harmless)
    found = cluster_directions(harmful, harmless, 2)
    torch.testing.assert_close(found, torch.tensor([[2.0, 0, -1], [0, 10, -1]]))  # the largest cluster first


def test_singular_directions_are_the_axes_of_the_differences() -> None:
    harmless = torch.tensor([5.0, 5, 5, 5])
    differences = torch.tensor([[3.0, 0, 0, 0], [3, 0, 0, 0], [0, -2, 0, 0], [0, 0, 1, 0]])
    found = singular_directions(harmless + differences, harmless, 2)
    torch.testing.assert_close(found.abs(), torch.eye(4)[:2], atol=1e-5, rtol=0)


def test_residuals_at_a_position(model: ChatModel) -> None:
    items = model.tokenize(HARMFUL)
    found = residuals_at(model, items, 1, -2)
    for n, item in enumerate(items):
        batch = model.batch([item])
        with torch.inference_mode(), model.capture([1]) as residuals:
            model.last_logits(batch)
        torch.testing.assert_close(found[n], residuals[1][0, -2], rtol=1e-4, atol=1e-5)


def test_a_candidate_is_kept_when_it_meets_both_conditions(model: ChatModel) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    # Half of the vocabulary refuses, so that adding a direction brings refusal about in some places only.
    refusal = list(range(0, model.hf.config.get_text_config().vocab_size, 2))
    first = find_direction(model, train, train, refusal, DirectionSearch(forms=("linear",)))
    middle = sorted(c.kl for c in first.candidates)[len(first.candidates) // 2]
    found = find_direction(model, train, train, refusal, DirectionSearch(forms=("linear",), kl_threshold=middle))
    conditions = {(c.kl <= middle, c.induce > 0): c.kept for c in found.candidates}
    assert conditions == {(True, True): True, (True, False): False, (False, True): False, (False, False): False}


@pytest.mark.parametrize(("depth", "layers"), [(0.25, 1), (0.5, 2), (0.6, 3), (0.75, 3), (0.8, 4), (1.0, 4)])
def test_candidates_come_from_the_first_part_of_the_model(model: ChatModel, depth: float, layers: int) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    search = DirectionSearch(forms=("linear",), position=-1, max_depth=depth)
    found = find_direction(model, train, train, REFUSAL, search)
    assert {c.layer for c in found.candidates} == set(range(layers))


@pytest.mark.parametrize("position", [-1, -2, -3])
def test_the_affine_reference_is_the_harmless_mean_at_the_directions_own_place(model: ChatModel, position: int) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    known = [
        Candidate(
            layer=layer,
            position=each,
            form="affine",
            bypass=-9.0 if (layer, each) == (1, position) else 0.0,
            induce=1.0,
            kl=0.0,
            kept=True,
        )
        for layer in range(model.n_layers)
        for each in post_instruction_positions([*train[0], *train[1]])
    ]
    found = find_direction(model, train, train, REFUSAL, DirectionSearch(forms=("affine",)), stored=lambda *_: known)
    assert (found.layer, found.position) == (1, position)
    harmful, harmless = (position_means(model, items, [found.position])[:, 0] for items in train)
    torch.testing.assert_close(found.harmless_mean, harmless)
    torch.testing.assert_close(found.difference, (harmful - harmless)[found.layer])
    ablation = found.ablate()
    assert ablation.reference is not None
    batch = model.batch(model.tokenize(HARMFUL[:1]))
    with torch.inference_mode(), Compiled(model, None, [ablation]).on(batch), model.capture() as captured:
        model.last_logits(batch)
    unit = found.difference / found.difference.norm()
    for layer in range(model.n_layers):
        # Whatever the length of the difference, the projection on its unit vector becomes the reference's.
        expected = (harmless[layer] @ unit).expand(batch.input_ids.shape)
        torch.testing.assert_close(captured[layer] @ unit, expected, rtol=1e-3, atol=1e-3)


def test_an_interrupted_search_goes_on_where_it_stopped(model: ChatModel) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    whole = find_direction(model, train, train, REFUSAL)
    known = {candidate_name(each): each for each in whole.candidates[:6]}
    rest: list[Candidate] = []

    def stored(names: Sequence[str], score: Scores) -> list[Candidate]:
        rest.extend(chain(*score(lambda keys: not known.keys() >= set(keys))))
        found = known | {candidate_name(each): each for each in rest}
        return [found[name] for name in names]

    again = find_direction(model, ClassMeans.of(model, train, DirectionSearch()), train, REFUSAL, stored=stored)
    assert tuple(rest) == whole.candidates[6:]
    assert again.candidates == whole.candidates


def test_layer_and_position_can_be_fixed(model: ChatModel) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    search = DirectionSearch(forms=("linear",), layer=2, position=-2)
    found = find_direction(model, train, train, REFUSAL, search)
    assert (found.layer, found.position, found.form) == (2, -2, "linear")
    expected = (position_means(model, train[0], [-2]) - position_means(model, train[1], [-2]))[2, 0]
    torch.testing.assert_close(found.difference, expected)
    assert float(found.vector.norm()) == pytest.approx(1.0, abs=1e-6)
    assert found.ablate().reference is None
    assert found.ablate("affine").reference is found.harmless_mean
    with pytest.raises(ModelError, match=r"layer was set to 9; the model has layers 0…3"):
        find_direction(model, train, train, REFUSAL, DirectionSearch(layer=9))
    with pytest.raises(ModelError, match="position was set to -99"):
        find_direction(model, train, train, REFUSAL, DirectionSearch(position=-99))


def test_equal_classes_have_no_direction(model: ChatModel) -> None:
    items = model.tokenize(HARMFUL)
    with pytest.raises(ModelError, match="are equal, so there is no direction"):
        find_direction(model, (items, items), (items, items), REFUSAL)


def _candidate(layer: int, bypass: float, induce: float, kl: float) -> Candidate:
    kept = kl <= 0.1 and induce > 0
    return Candidate(layer=layer, position=-1, form="linear", bypass=bypass, induce=induce, kl=kl, kept=kept)


def test_the_choice_relaxes_conditions_only_when_nothing_meets_them() -> None:
    good, far, weak = _candidate(1, -2.0, 1.0, 0.05), _candidate(2, -9.0, 1.0, 0.5), _candidate(3, -10.0, -1.0, 0.01)
    assert choose([far, weak, good]) == (good, "")
    assert choose([far, weak])[0] == far
    assert "KL threshold" in choose([far, weak])[1]
    assert choose([weak])[0] == weak
    assert "no candidate induces refusal" in choose([weak])[1]
    with pytest.raises(ModelError, match="not finite"):
        choose([_candidate(1, math.nan, math.nan, math.nan)])


def test_refusal_tokens_are_those_that_tell_refusals_apart(model: ChatModel) -> None:
    def first(word: str) -> int:
        return model.tokenizer(word, add_special_tokens=False)["input_ids"][0]

    refusals = ["I cannot"] * 6 + ["Sorry, no"] * 3 + ["The"]
    others = ["The answer"] * 8 + ["I think"] * 2
    found = find_refusal_tokens(model, refusals, others)
    assert [(token.token_id, token.share) for token in found] == [(first("I cannot"), 0.6), (first("Sorry, no"), 0.3)]
    (only,) = find_refusal_tokens(model, refusals, others, min_share=0.4)
    assert only.token_id == first("I cannot")
    with pytest.raises(ModelError, match="no first token tells"):
        find_refusal_tokens(model, ["The end"] * 3, ["The end"] * 3)


def test_round_trip(model: ChatModel) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    found = find_direction(model, train, train, REFUSAL, DirectionSearch(layer=1))
    again = Direction.from_parts(*found.to_parts())
    assert again.candidates == found.candidates
    assert (again.layer, again.position, again.form, again.note) == (
        found.layer,
        found.position,
        found.form,
        found.note,
    )
    assert torch.equal(again.difference, found.difference)
    assert torch.equal(again.harmless_mean, found.harmless_mean)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_passes_that_begin_at_a_layer_say_the_same(family: Any) -> None:
    hf, tokenizer = tiny_model(family)
    model = ChatModel(hf, tokenizer, name=family)
    items, generator = model.tokenize(HARMFUL), torch.Generator().manual_seed(0)
    early = AddDirection(torch.randn(model.d_model, generator=generator), 0)
    late = [AddDirection(torch.randn(model.d_model, generator=generator), layer) for layer in range(model.n_layers)]
    for layer in range(model.n_layers):
        # The residuals are those before anything is done to the layer's own output.
        start = Start.of(model, items, layer, Compiled(model, None, [early, late[layer]] if layer else [late[0]]))
        change = [early, late[layer]] if layer else [late[0]]
        whole = first_token(model, items, REFUSAL, change).log_odds
        # Other prompts in the batch, and so other padding, than where they were read.
        for some in (items, items[1:3]):
            found = first_token(model, some, REFUSAL, Compiled(model, None, change), start=start).log_odds
            wanted = whole if some is items else whole[1:3]
            assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    # Nothing stays behind.
    assert count_hooks(model.hf) == 0
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_a_start_skips_the_layers_before_it(model: ChatModel) -> None:
    items = model.tokenize(HARMFUL)
    start, seen = Start.of(model, items, 1, Compiled(model, None, [])), list[int]()
    attention: Any = [layer.self_attn for layer in model.layers]
    hooks = [each.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, each in enumerate(attention)]
    first_token(model, items, REFUSAL, start=start)
    for hook in hooks:
        hook.remove()
    assert sorted(set(seen)) == list(range(2, model.n_layers))


def test_residuals_that_differ_by_rounding_are_one_cluster() -> None:
    points = torch.eye(3)[[0, 1, 2, 0, 1, 2]] + 1e-6 * torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert cluster_directions(points, torch.zeros(3), 5).shape == (3, 3)
