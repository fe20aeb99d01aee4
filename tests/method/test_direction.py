"""The direction: means, scores by hand, the choice among candidates."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
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
from demur.model import ChatModel, Region, count_hooks
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


def test_a_refusal_token_is_as_frequent_as_asked_and_as_much_likelier_in_refusals(model: ChatModel) -> None:
    """Exactly at either limit it counts; answers without a token count in no share."""
    refusals = ["I cannot"] * 1 + ["Sorry"] * 19
    assert len(find_refusal_tokens(model, [*refusals, "", ""])) == 2
    assert len(find_refusal_tokens(model, [*refusals, "Sorry"])) == 1
    some, others = ["I cannot"] * 2 + ["Sorry"] * 3, ["I think"] * 1 + ["Yes"] * 4
    assert [token.share for token in find_refusal_tokens(model, some, others)] == [0.6, 0.4]
    assert [token.share for token in find_refusal_tokens(model, some, ["I think", "I do", "Yes", "Yes"])] == [0.6]
    assert [token.share for token in find_refusal_tokens(model, some, others, lift=2.1)] == [0.6]
    (sorry, _) = find_refusal_tokens(model, some)
    assert sorry.text == model.tokenizer.decode([sorry.token_id])
    assert sorry.token_id == model.tokenizer("Sorry", add_special_tokens=False)["input_ids"][0]
    for nothing in ([], [""]):
        with pytest.raises(ModelError, match=f"the model's {len(nothing)} refusals from its 5 other answers"):
            find_refusal_tokens(model, nothing, others)


def test_equal_candidates_are_ordered_and_those_without_a_score_left_out() -> None:
    def made(layer: int, position: int, form: Any, bypass: float = -1.0) -> Candidate:
        return Candidate(layer=layer, position=position, form=form, bypass=bypass, induce=1.0, kl=0.0, kept=True)

    first = made(1, -3, "affine")
    rest = [made(1, -3, "linear"), made(1, -2, "affine"), made(2, -4, "affine"), made(0, -9, "affine", -0.5)]
    broken = [made(0, -9, "affine", math.nan), made(0, -9, "affine", -math.inf)]
    assert choose([*rest[::-1], first, *broken]) == (first, "")
    for n in range(1, len(rest)):
        assert choose(rest[n:][::-1])[0] == rest[n]


def test_positions_are_those_that_every_prompt_has(model: ChatModel) -> None:
    (item,) = model.tokenize(HARMFUL[:1])
    n = item.n_post_instruction
    fewer = replace(item, regions=(*item.regions[:-1], int(Region.INSTRUCTION)))
    none = replace(item, regions=tuple(int(Region.INSTRUCTION) for _ in item.regions))
    assert post_instruction_positions([item, fewer]) == tuple(range(-n + 1, 0))
    assert post_instruction_positions([item, none]) == (-1,)


def test_the_first_place_is_that_of_the_shortest_prompt_and_holds_no_direction(model: ChatModel) -> None:
    """Every prompt begins with the same token, where nothing separates; beyond it there is no place."""
    (item,) = model.tokenize(["Sing"])
    train = ([item], [replace(item, ids=(*item.ids[:4], 9, *item.ids[5:]))])
    longer, shortest = (train[0], model.tokenize(HARMLESS[3:])), len(item)
    with pytest.raises(ModelError, match="are equal, so there is no direction"):
        find_direction(model, train, train, REFUSAL, DirectionSearch(position=-shortest))
    assert ClassMeans.of(model, longer, DirectionSearch(position=-shortest)).positions == (-shortest,)
    for position in (-shortest - 1, 0):
        with pytest.raises(ModelError, match=f"set to {position}; .* and -{shortest} the first of the shortest"):
            find_direction(model, longer, longer, REFUSAL, DirectionSearch(position=position))


def test_candidates_are_named_place_by_place(model: ChatModel) -> None:
    """Those of one place follow each other, and places where the classes do not differ at all are left out."""
    means = ClassMeans((-2, -1), torch.ones(4, 2, model.d_model), torch.zeros(4, 2, model.d_model))
    means.harmful[0, 0] = means.harmful[2] = 0.0
    asked: list[str] = []

    def stored(names: Sequence[str], _: Scores) -> list[Candidate]:
        asked.extend(names)
        return [Candidate(layer=1, position=-2, form="linear", bypass=0.0, induce=1.0, kl=0.0, kept=True)]

    items = model.tokenize(HARMFUL)
    found = find_direction(model, means, (items, items), REFUSAL, DirectionSearch(max_depth=1.0), stored=stored)
    places = ["0:-1", "1:-2", "1:-1", "3:-2", "3:-1"]
    assert asked == [f"{place}:{form}" for place in places for form in ("linear", "affine")]
    assert candidate_name(found.candidates[0]) == "1:-2:linear"
    assert (found.layer, found.position, found.form, found.note) == (1, -2, "linear", "")
    with pytest.raises(ModelError, match="not finite: the weights hold NaN"):
        find_direction(model, ClassMeans((-1,), *(math.nan * each for each in (means.harmful, means.harmless))),
                       (items, items), REFUSAL)  # fmt: skip


def test_without_a_reference_nothing_diverges(model: ChatModel) -> None:
    found = first_token(model, model.tokenize(HARMFUL), REFUSAL, [AddDirection(torch.ones(model.d_model), 1)])
    assert found.kl.tolist() == [0.0] * len(HARMFUL)


def test_added_directions_keep_their_length_and_say_where() -> None:
    found = Direction(2, -1, "linear", torch.tensor([3.0, 4]), torch.zeros(4, 2))
    assert found.vector.tolist() == pytest.approx([0.6, 0.8])
    plain, asked = found.add(), found.add(-2.0, "prompt")
    for change, coefficient, where in ((plain, 1.0, "all"), (asked, -2.0, "prompt")):
        assert (change.layer, change.coefficient, change.where) == (2, coefficient, where)
        assert change.vector.tolist() == [3, 4]
    assert (found.note, found.candidates) == ("", ())
    assert found.ablate("affine").vector.tolist() == pytest.approx([0.6, 0.8])


def test_class_means_are_read_back(model: ChatModel) -> None:
    train = (model.tokenize(HARMFUL), model.tokenize(HARMLESS))
    found = ClassMeans.of(model, train, DirectionSearch())
    assert found.positions == post_instruction_positions([*train[0], *train[1]])
    tensors, meta = found.to_parts()
    again = ClassMeans.from_parts(tensors, json.loads(json.dumps(meta)))
    assert again.positions == found.positions
    assert torch.equal(again.difference, found.harmful - found.harmless)
    assert torch.equal(again.harmless, found.harmless)


def test_clusters_are_the_same_at_each_call() -> None:
    cloud, nothing = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(3)
    first, seeded, other = (cluster_directions(cloud, nothing, 6, **how) for how in ({}, {"seed": 0}, {"seed": 1}))
    assert torch.equal(first, seeded)
    assert not torch.allclose(first, other)


def test_clusters_differ_by_more_than_a_ten_thousandth() -> None:
    """Of the largest residual's length, here 10: points .0005 apart are one, points .002 apart are two."""
    for gap, clusters in ((0.0005, 2), (0.002, 3)):
        points = torch.tensor([[10.0, 0, 0], [0, 1, 0], [0, 1, gap]], dtype=torch.float64)
        assert cluster_directions(points, torch.zeros(3, dtype=torch.float64), 5).shape == (clusters, 3)


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
