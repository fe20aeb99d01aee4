"""Every selection method against the planted truth, and every attribution estimate against exact patching."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch

from demur.method.activations import Reduce
from demur.method.attribution import Attribution, attribute
from demur.method.direction import Direction, find_direction, find_refusal_tokens
from demur.method.interventions import Compiled
from demur.method.path import Method, Metric
from demur.method.selection import (
    actdiff_set,
    attribute_dictionary,
    cosine_pool,
    cossim_set,
    global_set,
    local_sets,
)
from demur.model import ChatModel, TokenizedPrompt
from demur.stats import spearman
from demur.testing import Planted, planted
from demur.types import FeatureId, Prompt

K0 = 10  # features per layer in the pool
NOISE = 1e-3  # logits per token: effects below this are float32 rounding and the residual's norm, not the circuit

ESTIMATES: tuple[Method, ...] = ("gradient", "paper", "ig")


@dataclass(frozen=True)
class Case:
    made: Planted
    model: ChatModel
    prompts: tuple[Prompt, ...]
    harmful: tuple[TokenizedPrompt, ...]
    harmless: tuple[TokenizedPrompt, ...]
    direction: Direction
    metric: Metric

    @property
    def k(self) -> int:
        return len(self.made.truth.causal)

    @property
    def patch(self) -> Compiled:
        return Compiled(self.model, None, [self.direction.ablate()])


@cache
def case() -> Case:
    made = planted()
    model = ChatModel(made.model, made.tokenizer, name="planted")
    harmful, harmless = (model.tokenize(each) for each in (made.harmful, made.harmless))
    refusal_ids = tuple(t.token_id for t in find_refusal_tokens(model, [made.refusal], [made.compliance]))
    assert refusal_ids == (made.refusal_token,)
    # The first half chooses the direction, the second is attributed.
    train, validation = (harmful[:24], harmless[:24]), (harmful[24:32], harmless[24:32])
    direction = find_direction(model, train, validation, refusal_ids)
    halves = made.harmful.prompts[32:], tuple(harmful[32:]), tuple(harmless[32:])
    return Case(made, model, *halves, direction, Metric(refusal_ids))


@cache
def attributed(method: Method) -> Attribution:
    here = case()
    pool = cosine_pool(here.made.suite, here.direction.vector, K0)
    return attribute(
        here.model,
        here.made.suite,
        here.harmful,
        pool,
        patch=here.patch,
        metric=here.metric,
        method=method,
    )


def precision_and_recall(features: Iterable[FeatureId]) -> tuple[float, float]:
    found, causal = set(features), case().made.truth.causal
    return len(found & causal) / len(found), len(found & causal) / len(causal)


@pytest.mark.parametrize("method", [*ESTIMATES, "exact"])
def test_attribution_over_the_pool_finds_the_causal_features(method: Method) -> None:
    precision, recall = precision_and_recall(global_set(attributed(method), case().k).features)
    assert precision >= 0.9
    assert recall >= 0.95


@pytest.mark.parametrize("method", ESTIMATES)
def test_attribution_over_the_whole_dictionary_finds_them_too(method: Method) -> None:
    here = case()
    found = attribute_dictionary(
        here.model,
        here.made.suite,
        here.harmful,
        patch=here.patch,
        metric=here.metric,
        top=here.k,
        method=method,
    )
    precision, recall = precision_and_recall(found.overall.features)
    assert precision >= 0.9
    assert recall >= 0.95


@pytest.mark.parametrize("method", [*ESTIMATES, "exact"])
def test_local_sets_hold_the_prompts_own_harm_features(method: Method) -> None:
    here = case()
    found = local_sets(attributed(method), 5)
    for prompt, chosen in zip(here.prompts, found, strict=True):
        assert chosen.prompt_id == prompt.id
        assert set(chosen.features) == here.made.harm_of[str(prompt.category)] | here.made.truth.refusal


def test_cosine_alone_takes_aligned_and_distracting_features() -> None:
    here = case()
    chosen = cossim_set(here.made.suite, here.direction.vector, here.k)
    precision, recall = precision_and_recall(chosen.features)
    assert precision < 0.5
    assert recall < 0.5
    assert set(chosen.features[:3]) == here.made.truth.aligned_inert


@pytest.mark.parametrize("reduce", ["max", "mean", "last"])
def test_activation_difference_takes_distractors(reduce: Reduce) -> None:
    here = case()
    chosen = actdiff_set(here.model, here.made.suite, here.harmful, here.harmless, here.k, reduce=reduce)
    precision, recall = precision_and_recall(chosen.features)
    assert precision < 0.5
    assert recall < 0.5


@pytest.mark.parametrize("method", ESTIMATES)
def test_estimates_rank_features_as_exact_patching_does(method: Method) -> None:
    exact, estimate = (attributed(each).means.mean(0) for each in ("exact", method))
    # What is inert is inert alike: its order is rounding, so it counts as tied.
    ties = [torch.where(each.abs() < NOISE, 0.0, each).numpy() for each in (exact, estimate)]
    assert spearman(*ties) > 0.95


@pytest.mark.parametrize("method", [*ESTIMATES, "exact"])
def test_inert_features_get_nothing(method: Method) -> None:
    result = attributed(method)
    causal = torch.tensor([feature in case().made.truth.causal for feature in result.features])
    scores = result.means.mean(0)
    assert float(scores[~causal].abs().max()) < NOISE
    assert float(scores[causal].min()) > 3 * NOISE


def test_path_explains_the_whole_change() -> None:
    result = attributed("ig")
    assert float((result.gaps / result.changes).abs().max()) < 0.05


def test_gradient_of_redundant_features_overstates_what_patching_one_does() -> None:
    # A refusal feature whose backup takes over moves the metric far less than its gradient promises.
    here = case()
    first = min(here.made.truth.refusal)
    column = attributed("exact").features.index(first)
    exact, gradient = (float(attributed(each).means.mean(0)[column]) for each in ("exact", "gradient"))
    assert 3 * exact < gradient
