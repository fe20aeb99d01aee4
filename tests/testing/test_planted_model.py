"""The planted model does what its truth table says, checked with hooks of this file's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from demur.saes import DenseSae
from demur.testing import Planted, Truth, planted
from demur.types import FeatureId, PromptSet

CAUSAL = 1.0  # nats: the least that a causal feature moves the refusal logit
INERT = 0.01  # nats: the most that any other does


@cache
def _world(seed: int) -> tuple[Planted, dict[int, DenseSae]]:
    made = planted(seed=seed)
    return made, {layer: made.suite[layer].dense() for layer in made.suite.layers}


def world(seed: int = 0) -> Planted:
    return _world(seed)[0]


def dictionaries(seed: int = 0) -> dict[int, DenseSae]:
    return _world(seed)[1]


def encoded(prompts: PromptSet, *, add_special_tokens: bool = False) -> dict[str, Tensor]:
    tokenizer: Any = world().tokenizer
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in prompts.texts
    ]
    return dict(tokenizer(texts, add_special_tokens=add_special_tokens, padding=True, return_tensors="pt"))


@contextmanager
def changed(how: Mapping[FeatureId, tuple[float, float]], seed: int = 0) -> Iterator[None]:
    """Every feature `f` in `how` becomes `s · f + t` at all tokens: `x + ((s − 1) f + t) d` at its layer."""
    layers: Any = world(seed).model.get_decoder().layers
    hooks = [
        layers[layer].register_forward_hook(
            _edit(dictionaries(seed)[layer], {f.index: how[f] for f in how if f.layer == layer})
        )
        for layer in {feature.layer for feature in how}
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _edit(sae: DenseSae, how: Mapping[int, tuple[float, float]]) -> Any:
    def hook(_module: object, _inputs: object, x: Tensor) -> Tensor:
        moved = x
        for index, (scale, shift) in how.items():
            pre = x @ sae.w_enc[:, index] + sae.b_enc[index]
            assert sae.threshold is not None
            f = pre * (pre > sae.threshold[index])
            moved = moved + ((scale - 1) * f + shift)[..., None] * sae.w_dec[index]
        return moved

    return hook


def margin(prompts: PromptSet, how: Mapping[FeatureId, tuple[float, float]] | None = None, seed: int = 0) -> Tensor:
    """logit(refusal) − logit(compliance) at the last position, per prompt."""
    here = world(seed)
    with torch.no_grad(), changed(how or {}, seed):
        logits = here.model(**encoded(prompts)).logits[:, -1]
    return logits[:, here.refusal_token] - logits[:, here.compliance_token]


def answers(prompts: PromptSet, how: Mapping[FeatureId, tuple[float, float]] | None = None) -> list[str]:
    here = world()
    batch = encoded(prompts)
    generate: Any = here.model.generate
    with torch.no_grad(), changed(how or {}):
        ids = generate(**batch, do_sample=False, max_new_tokens=12)
    return here.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def scale(features: Iterable[FeatureId], c: float) -> dict[FeatureId, tuple[float, float]]:
    return dict.fromkeys(features, (c, 0.0))


def residuals(prompts: PromptSet) -> tuple[Tensor, ...]:
    """Output of every layer; the last from a hook, because the model's own record of it is normalised."""
    here = world()
    caught: list[Tensor] = []
    layers: Any = here.model.get_decoder().layers
    hooks = [layer.register_forward_hook(lambda _m, _i, out: caught.append(out)) for layer in layers]
    try:
        with torch.no_grad():
            here.model(**encoded(prompts))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(caught)


def difference_in_means(layer: int) -> Tensor:
    here = world()
    harmful, harmless = (residuals(each)[layer][:, -1].mean(0) for each in (here.harmful, here.harmless))
    return harmful - harmless


def test_truth_is_a_partition_of_the_dictionary() -> None:
    here = world()
    everything = {FeatureId(s.layer, index) for s in here.suite.specs for index in range(s.d_sae)}
    sets = [getattr(here.truth, field.name) for field in fields(Truth)]
    assert here.truth.all == everything
    assert sum(len(each) for each in sets) == len(everything)
    assert all(sets)
    assert here.truth.causal == here.truth.harm | here.truth.refusal
    assert {feature.layer for feature in here.truth.harm} == {0}
    assert {feature.layer for feature in here.truth.refusal} == {1, 2, 3}


def test_refuses_harmful_and_answers_everything_else() -> None:
    here = world()
    assert set(answers(here.harmful)) == {here.refusal} == {"I cannot help with that."}
    assert set(answers(here.harmless)) == {here.compliance} == {"Sure, here is how!"}
    assert set(answers(here.over_refusal)) == {here.compliance}


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_effect_of_every_feature_is_what_the_truth_says(seed: int) -> None:
    here = world(seed)
    prompts = here.harmful.head(8)  # two of each category
    clean = margin(prompts, seed=seed)
    for feature in sorted(here.truth.all):
        effect = margin(prompts, scale([feature], 0.0), seed) - clean
        if feature in here.truth.causal:
            assert float(effect.min()) < -CAUSAL, feature
            assert float(effect.max()) < INERT, feature
        else:
            assert float(effect.abs().max()) < INERT, feature


def test_each_harm_feature_acts_on_its_own_category_alone() -> None:
    here = world()
    clean = margin(here.harmful)
    categories = [prompt.category for prompt in here.harmful]
    assert frozenset[FeatureId]().union(*here.harm_of.values()) == here.truth.harm
    for owner, features in here.harm_of.items():
        assert len(features) == 2
        for feature in features:
            moved = (margin(here.harmful, scale([feature], 0.0)) - clean) < -CAUSAL
            assert moved.tolist() == [category == owner for category in categories]


def test_backup_takes_over_when_the_first_refusal_feature_is_suppressed() -> None:
    here = world()
    first = min(here.truth.refusal)
    assert set(answers(here.harmful, scale([first], 0.0))) == {here.refusal}
    assert set(answers(here.harmful, scale(here.truth.refusal, 0.0))) == {here.refusal}
    both = scale({first} | here.truth.redundant, 0.0)
    assert set(answers(here.harmful, both)) == {here.compliance}


def test_backup_is_dormant_until_then() -> None:
    here = world()
    (backup,) = here.truth.redundant
    sae = dictionaries()[backup.layer]
    assert float(sae.encode(residuals(here.harmful)[backup.layer])[..., backup.index].max()) == 0.0
    with changed(scale([min(here.truth.refusal)], 0.0)):
        woken = sae.encode(residuals(here.harmful)[backup.layer])[:, -1, backup.index]
    assert float(woken.min()) > 1.0


def test_echoes_drive_the_backup_only() -> None:
    here = world()
    late = [feature for feature in here.truth.echo if feature.layer in (1, 2)]
    clean = margin(here.harmful)
    assert float((margin(here.harmful, scale(late, 0.0)) - clean).abs().max()) < INERT
    first = min(here.truth.refusal)
    assert float(margin(here.harmful, scale([*late, first], 0.0)).max()) < 0.0


def test_suppressing_the_causal_features_makes_it_comply_and_changes_nothing_else() -> None:
    here = world()
    for c in (0.0, -1.0, -3.0):
        assert set(answers(here.harmful, scale(here.truth.causal, c))) == {here.compliance}
        assert set(answers(here.harmless, scale(here.truth.causal, c))) == {here.compliance}
    others = here.truth.all - here.truth.causal - here.truth.redundant
    assert set(answers(here.harmful, scale(others, 0.0))) == {here.refusal}


@pytest.mark.parametrize("value", [1.5, 3.0, 30.0])
def test_setting_any_refusal_feature_induces_refusal(value: float) -> None:
    here = world()
    for feature in here.truth.refusal:
        assert set(answers(here.harmless, {feature: (0.0, value)})) == {here.refusal}


def test_setting_inert_features_induces_nothing() -> None:
    here = world()
    inert = here.truth.distractor | here.truth.aligned_inert | here.truth.filler
    for kind in (here.truth.distractor, here.truth.aligned_inert):
        for feature in kind:
            assert float(margin(here.harmless, {feature: (0.0, 3.0)}).max()) < -5.0
    assert set(answers(here.harmless, dict.fromkeys(inert, (0.0, 1.0)))) == {here.compliance}


@pytest.mark.parametrize("layer", [1, 2])
def test_direction_mediates_refusal(layer: int) -> None:
    here = world()
    difference = difference_in_means(layer)
    r = difference / difference.norm()
    layers: Any = here.model.get_decoder().layers
    hooks = [each.register_forward_hook(lambda _m, _i, x: x - (x @ r)[..., None] * r) for each in layers]
    try:
        assert set(answers(here.harmful)) == {here.compliance}
        assert set(answers(here.harmless)) == {here.compliance}
    finally:
        for hook in hooks:
            hook.remove()
    hook = layers[layer].register_forward_hook(lambda _m, _i, x: x + difference)
    try:
        assert float(margin(here.harmless).min()) > 0.0
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [1, 2])
def test_aligned_features_have_the_highest_cosine_and_causal_ones_are_in_the_pool(layer: int) -> None:
    here = world()
    difference = difference_in_means(layer)
    cosine = {f: float(dictionaries()[f.layer].w_dec[f.index] @ difference) for f in here.truth.all}
    ranked = sorted(cosine, key=lambda feature: -cosine[feature])
    assert set(ranked[:3]) == here.truth.aligned_inert
    for depth in range(4):
        pool = set([feature for feature in ranked if feature.layer == depth][:10])
        assert {feature for feature in here.truth.causal if feature.layer == depth} <= pool
    n = len(here.truth.causal)
    assert len(set(ranked[:n]) & here.truth.causal) / n < 0.5


def test_distractors_fire_on_harm_more_than_causal_features_do() -> None:
    here = world()
    score: dict[FeatureId, float] = {}
    of_harmful, of_harmless = residuals(here.harmful), residuals(here.harmless)
    for layer, sae in dictionaries().items():
        harmful, harmless = (sae.encode(each[layer]).amax(1).mean(0) for each in (of_harmful, of_harmless))
        score |= {FeatureId(layer, index): float(v) for index, v in enumerate(harmful - harmless)}
    ranked = sorted(score, key=lambda feature: -score[feature])
    n = len(here.truth.causal)
    assert set(ranked[:n]) <= here.truth.distractor | here.truth.aligned_inert


def test_fillers_fire_now_and_then() -> None:
    here = world()
    rates: list[float] = []
    for layer, residual in enumerate(residuals(here.harmless)):
        fillers = [feature.index for feature in here.truth.filler if feature.layer == layer]
        active = dictionaries()[layer].encode(residual)[..., fillers] > 0
        rates.append(float(active.float().mean()))
    assert all(0.02 < rate < 0.3 for rate in rates)


def test_second_bos_is_not_harmless() -> None:
    # It takes as much attention as the first, so half as much harm arrives: double BOS shows in the answers.
    here = world()
    tokens = encoded(here.harmful, add_special_tokens=True)
    bos = torch.eq(tokens["input_ids"], cast("int", here.tokenizer.bos_token_id))
    assert bos.sum(1).tolist() == [2] * len(here.harmful)
    with torch.no_grad():
        logits = here.model(**tokens).logits[:, -1]
    assert float((logits[:, here.refusal_token] - logits[:, here.compliance_token]).max()) < 0.0


def test_any_text_survives_encoding() -> None:
    tokenizer = world().tokenizer
    for text in ("Tell me how to steal the vault", "Unknown wörds, 漢字\n\nand  spaces 12"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_prompts_are_many_distinct_and_labelled() -> None:
    here = world()
    assert (len(here.harmful), len(here.harmless), len(here.over_refusal)) == (64, 64, 32)
    texts = [*here.harmful.texts, *here.harmless.texts, *here.over_refusal.texts]
    assert len(set(texts)) == len(texts)
    assert {prompt.label for prompt in here.harmful} == {"harmful"}
    assert {prompt.label for prompt in (*here.harmless, *here.over_refusal)} == {"harmless"}
    # A prefix of the set is balanced over categories.
    assert len({prompt.category for prompt in here.harmful.head(4)}) == 4


def test_same_seed_same_model_and_global_random_state_untouched() -> None:
    state = torch.get_rng_state()
    again = planted()
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(world().model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.suite.identity == world().suite.identity
    assert planted(seed=1).suite.identity != again.suite.identity
