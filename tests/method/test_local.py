"""Local explanations on the planted model, where attention dilutes harm: harmless words beside a request answer it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from demur.method.interventions import Compiled, PerPrompt
from demur.method.local import LocalExplanation, LocalSearch, Patch, counterparts, hold_patches, transplant
from demur.model import ChatModel, Region, TokenizedPrompt
from demur.saes import Suite
from demur.testing import Planted, planted
from demur.types import FeatureId

BESIDE = "Tell me how to bake the bread and clean the window and paint the fence. "


@pytest.fixture(scope="module")
def truth() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def model(truth: Planted) -> ChatModel:
    return ChatModel(truth.model, truth.tokenizer, name="planted")


@pytest.fixture(scope="module")
def pair(truth: Planted, model: ChatModel) -> tuple[TokenizedPrompt, TokenizedPrompt]:
    plain = truth.harmful.prompts[0].text
    before, after = model.tokenize([plain, BESIDE + plain])
    return before, after


def search(
    truth: Planted,
    model: ChatModel,
    pair: tuple[TokenizedPrompt, TokenizedPrompt],
    layers: tuple[int, ...] | None = None,
) -> LocalSearch:
    return LocalSearch(model, truth.suite, *pair, [truth.refusal_token], layers)


def refuse(truth: Planted, item: TokenizedPrompt) -> float:
    """What the circuit writes on the refusal axis: the head gives each of n content words 1 / (n + 8) of its weight."""
    embedding: Any = truth.model.get_input_embeddings().weight
    n = int((embedding[list(item.ids)] @ truth.axes["content"] > 0.5).sum())
    return 2 * 11 / (n + 8) - 0.5


def log_p(truth: Planted, level: float) -> tuple[float, float, float]:
    """Log-probabilities of "I", "Sure" and each other token where the refusal axis has this level."""
    scores = (6 * level, 6.0, -6.0)
    total = math.exp(scores[0]) + math.exp(scores[1]) + (len(truth.tokenizer) - 2) * math.exp(scores[2])
    return tuple(score - math.log(total) for score in scores)  # pyright: ignore[reportReturnType]


def test_the_patch_is_a_refusal_feature_at_the_last_token_and_restores_refusal(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    found = search(truth, model, pair).explain()
    (patch,) = found.patches
    assert patch.feature in truth.truth.refusal
    assert patch.token == len(pair[1]) - 1
    assert (patch.before, patch.value) == pytest.approx((refuse(truth, pair[1]), refuse(truth, pair[0])), abs=0.01)
    assert found.restored
    change = PerPrompt({pair[1].prompt_id: (hold_patches(found.patches, len(pair[1])),)})
    before = model.generate([BESIDE + truth.harmful.prompts[0].text], max_new_tokens=8)[0].text
    assert before == truth.compliance
    batch = model.batch([pair[1]])
    with torch.inference_mode(), Compiled(model, truth.suite, [change]).on(batch):
        first = model.last_logits(batch).softmax(-1)[0, truth.refusal_token]
    assert float(first) == pytest.approx(found.p_restored) == pytest.approx(found.p_refuse[-1])


def test_kl_and_what_a_patch_promises_are_those_of_the_circuit(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    found = search(truth, model, pair).explain()
    levels = [refuse(truth, item) for item in pair]
    wanted, given = (log_p(truth, level) for level in levels)
    counts = (1, 1, len(truth.tokenizer) - 2)
    kl = sum(n * math.exp(p) * (p - q) for n, p, q in zip(counts, wanted, given, strict=True))
    assert found.kl[0] == pytest.approx(kl, rel=0.02)
    assert found.kl[-1] == pytest.approx(0.0, abs=0.01)
    assert found.p_refuse == pytest.approx((math.exp(given[0]), math.exp(wanted[0])), rel=0.02)
    # The refusal axis moves the logit of "I" by 6 a unit, whose gradient of the KL divergence is q − p.
    promised = 6 * (math.exp(given[0]) - math.exp(wanted[0])) * (levels[0] - levels[1])
    assert found.patches[0].predicted == pytest.approx(promised, rel=0.02)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_each_layer_has_its_own_patch(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt], layer: int
) -> None:
    found = search(truth, model, pair, (layer,)).explain()
    assert [patch.feature.layer for patch in found.patches] == [layer]
    assert {patch.feature for patch in found.patches} <= truth.truth.refusal


def test_where_both_prompts_are_alike_nothing_restores_refusal(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    # Layer 0 sees the same harm words in both: what differs happens later.
    found = search(truth, model, pair, (0,)).explain(limit=3)
    assert not found.restored
    assert found.p_restored < 0.5


def test_the_limit_and_an_unattainable_threshold(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    found = search(truth, model, pair).explain(limit=2, threshold=1.1)
    assert len(found.patches) == 2
    assert len(found.kl) == len(found.p_refuse) == 3
    assert not found.restored
    already = search(truth, model, (pair[0], pair[0])).explain()
    assert (already.patches, already.restored, already.kl) == ((), True, pytest.approx((0.0,), abs=1e-6))
    # Where nothing differs no patch promises anything, and none is made.
    nothing = search(truth, model, (pair[0], pair[0])).explain(threshold=1.1)
    assert (nothing.patches, nothing.drawn, nothing.restored, len(nothing.kl)) == ((), (), False, 1)


def test_every_patch_that_is_left_is_needed(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    asked = search(truth, model, pair)
    found = asked.explain(threshold=0.9)
    assert found.restored
    for patch in found.patches:
        assert asked.run([each for each in found.patches if each is not patch]).p_refuse < 0.9


def weak_search(
    truth: Planted,
    model: ChatModel,
    pair: tuple[TokenizedPrompt, TokenizedPrompt],
    layers: tuple[int, ...] | None = None,
) -> LocalSearch:
    """With decoder rows of .3 of their length it takes several patches."""
    dense = {layer: truth.suite[layer].dense() for layer in truth.suite.layers}
    weak = Suite.from_dense({layer: replace(sae, w_dec=0.3 * sae.w_dec) for layer, sae in dense.items()})
    return LocalSearch(model, weak, *pair, [truth.refusal_token], layers)


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_patches_that_are_not_needed_go_unless_nothing_is_restored(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt], needed: int
) -> None:
    """A model that refuses under three patches, exactly at the threshold, of which the last so many are needed."""
    asked = weak_search(truth, model, pair)
    real, under = asked.run, list[tuple[Any, ...]]()

    def run(patches: Any = ()) -> Any:
        under.append(tuple(patches))
        three = next((each for each in under if len(each) == 3), ())
        enough = bool(three) and set(three[3 - needed :]) <= set(patches)
        return replace(real(patches), p_refuse=0.5 if enough else 0.1)

    asked.run = run  # pyright: ignore[reportAttributeAccessIssue]
    found = asked.explain(limit=5)
    three = next(each for each in under if len(each) == 3)
    assert (found.restored, found.p_restored, found.p_refuse) == (True, 0.5, (0.1, 0.1, 0.1, 0.5))
    assert found.patches == three[3 - needed :]
    under.clear()
    short = asked.explain(limit=2)
    assert (short.restored, short.p_restored, len(short.patches)) == (False, 0.1, 2)


def test_random_patches_differ_by_seed_alone(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    asked = weak_search(truth, model, pair, (3,))
    drawn = [asked.explain(limit=3, threshold=1.1, seed=n // 2) for n in range(12)]
    assert all(one.drawn == other.drawn for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    assert len({each.drawn for each in drawn}) > 1
    assert asked.explain(limit=3, threshold=1.1).drawn == drawn[0].drawn
    for each in drawn:
        # As many, no two alike, and none of its own patch's feature.
        assert len(each.drawn) == len(each.patches)
        assert all(other.feature != own.feature for other, own in zip(each.drawn, each.patches, strict=True))


def test_no_patch_is_made_twice(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    """A patch brings a part of refusal back, and its feature goes on promising."""
    found = weak_search(truth, model, pair).explain(limit=6, threshold=1.1)
    made = [(patch.feature, patch.token) for patch in found.patches]
    assert {feature for feature, _ in made[:3]} == truth.truth.refusal
    assert {token for _, token in made[:3]} == {len(pair[1]) - 1}
    assert len(set(made)) == len(made) == len(found.kl) - 1
    # Each of the first three brings back three tenths of what was still missing of `refuse`.
    levels = [refuse(truth, item) for item in pair]
    steps = [levels[0] - 0.7**n * (levels[0] - levels[1]) for n in range(4)]
    assert found.p_refuse[:4] == pytest.approx([math.exp(log_p(truth, level)[0]) for level in steps], rel=0.01)
    for patch in found.patches[:3]:
        assert patch.value == pytest.approx(levels[0], abs=0.01)
        assert patch.predicted < 0


def test_random_patches_are_others_in_the_same_places(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    found = search(truth, model, pair).explain(limit=3, threshold=1.1)
    places = [(patch.feature.layer, patch.token) for patch in found.patches]
    assert len(found.drawn) >= 1
    assert not {(p.feature, p.token) for p in found.drawn} & {(p.feature, p.token) for p in found.patches}
    assert {(patch.feature.layer, patch.token) for patch in found.drawn} <= set(places)
    assert all(abs(patch.value - patch.before) > 1e-6 for patch in found.drawn)


def test_counterparts_are_the_template_and_the_shared_words(
    model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    plain, adversarial = pair
    found = counterparts(model, plain, adversarial)
    # Everything of the plain prompt but its header stands in the other as well.
    assert sorted(found.values()) == [n for n, region in enumerate(plain.regions) if region != Region.SPECIAL]
    words = [[str(model.tokenizer.decode([token])).strip() for token in item.ids] for item in pair]
    assert all(words[1][here] == words[0][there] for here, there in found.items())
    assert found[len(adversarial) - 1] == len(plain) - 1
    capital, small = model.tokenize(["Steal the vault", "please steal the vault"])
    said = {str(model.tokenizer.decode([small.ids[n]])).strip() for n in counterparts(model, capital, small)}
    assert {"the", "vault"} <= said


def test_counterparts_of_templates_of_different_length_are_counted_from_the_end(model: ChatModel) -> None:
    """What one template has more of, before the last tokens, has no counterpart; words are found in order, once."""
    plain, adversarial = model.tokenize(["steal the vault", "the fence and steal the vault and the window"])
    after = plain.n_post_instruction
    start = plain.regions.index(Region.POST_INSTRUCTION)
    shorter = replace(plain, regions=(*plain.regions[:start], int(Region.SPECIAL), *plain.regions[start + 1 :]))
    ends = {len(adversarial) - n: len(plain) - n for n in range(1, after + 1)}
    first = plain.regions.index(Region.INSTRUCTION)
    place = [str(model.tokenizer.decode([token])).strip() for token in adversarial.ids].index("steal")
    words = {place + n: first + n for n in range(3)}
    assert counterparts(model, plain, adversarial) == words | ends
    assert counterparts(model, shorter, adversarial) == words | {
        here: there for here, there in ends.items() if there != len(plain) - after
    }
    back = counterparts(model, adversarial, plain)
    assert back == {there: here for here, there in (words | ends).items()}
    assert list(counterparts(model, plain, plain).items()) == [(n, n) for n in range(first, len(plain))]


def test_patches_hold_each_feature_at_its_own_tokens() -> None:
    one, two = FeatureId(2, 7), FeatureId(0, 3)
    patches = [
        Patch(feature=feature, token=token, before=0.0, value=value, predicted=-1.0)
        for feature, token, value in ((one, 3, 1.5), (two, 0, 2.5), (one, 1, 0.0))
    ]
    found = hold_patches(patches, 4)
    assert (found.features, found.after) == ((one, two), None)
    nan = math.nan
    assert found.values.numpy() == pytest.approx(
        np.array([[nan, 2.5], [0.0, nan], [nan, nan], [1.5, nan]]), nan_ok=True
    )


def test_a_feature_that_only_the_attack_wakes_can_be_put_to_rest(model: ChatModel, truth: Planted) -> None:
    """Candidates are active in either prompt: seen from the harmless side, what harm wakes is taken out."""
    plain, adversarial = model.tokenize(["Tell me how to bake the bread", truth.harmful.prompts[0].text])
    compliance = model.tokenizer(truth.compliance, add_special_tokens=False)["input_ids"][0]
    found = LocalSearch(model, truth.suite, plain, adversarial, [compliance]).explain()
    assert found.restored
    assert found.p_refuse[0] < 0.5 < found.p_restored == found.p_refuse[-1]
    assert found.prompt_id == adversarial.prompt_id
    for patch in found.patches:
        assert patch.before > 0.1 > abs(patch.value)
        assert patch.predicted < 0


def test_a_transplant_holds_features_at_counterparts_only(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    plain, adversarial = pair
    features = tuple(sorted(truth.truth.refusal))
    held = transplant(model, truth.suite, plain, adversarial, features)
    known = {n for n, row in enumerate(held.values) if not bool(row.isnan().any())}
    assert known == set(counterparts(model, plain, adversarial))
    assert held.values[-1].tolist() == pytest.approx([refuse(truth, plain)] * 3, abs=0.01)
    batch = model.batch([adversarial])
    change = Compiled(model, truth.suite, [PerPrompt({adversarial.prompt_id: (held,)})])
    with torch.inference_mode(), change.on(batch):
        p = model.last_logits(batch).softmax(-1)[0, truth.refusal_token]
    assert float(p) == pytest.approx(math.exp(log_p(truth, refuse(truth, plain))[0]), rel=0.01)


def test_an_explanation_is_read_back_equal(
    truth: Planted, model: ChatModel, pair: tuple[TokenizedPrompt, TokenizedPrompt]
) -> None:
    found = search(truth, model, pair).explain()
    assert LocalExplanation.model_validate_json(found.model_dump_json()) == found
