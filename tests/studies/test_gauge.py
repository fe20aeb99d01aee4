"""Signals of harm and refusal features, and walks over words, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from demur.data import AttackPair
from demur.method.interventions import ScaleFeatures
from demur.model import ChatModel, Region, TokenizedPrompt
from demur.studies.gauge import Gauge, Parts, Walk, drops, p_refuse, walked
from demur.testing import planted
from demur.types import FeatureId, PromptSet


def gauge() -> Gauge:
    """Two harm features and one refusal feature, on no model."""
    harm, refusal = (FeatureId(0, 1), FeatureId(0, 2)), (FeatureId(3, 4),)
    return Gauge(cast("Any", None), harm, refusal, np.array([3.0, 1.0, 2.0]), (7,))


def test_harm_counts_at_its_maximum_on_words_and_refusal_at_its_mean_on_the_template() -> None:
    regions = (Region.SPECIAL, *[Region.INSTRUCTION] * 2, *[Region.POST_INSTRUCTION] * 2)
    values = torch.tensor([[9.0, 9.0, 9.0], [1.0, 0.0, 8.0], [2.0, 0.5, 0.0], [7.0, 7.0, 1.0], [0.0, 7.0, 4.0]])
    whole, bare = (TokenizedPrompt(str(n), (0,) * n, tuple(map(int, regions[:n]))) for n in (5, 1))
    # No words, or no template: nothing fires there.
    assert gauge().reduced([whole, bare], [values, values[:1]]).tolist() == [[2.0, 0.5, 2.5], [0.0, 0.0, 0.0]]


def test_a_signal_is_a_share_of_the_reference_and_unknown_without_features() -> None:
    signals = gauge().signals(np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]))
    assert signals.tolist() == [[1.0, 1.0], [0.5, 0.5]]
    bare = Gauge(cast("Any", None), (), (FeatureId(3, 4),), np.array([2.0]), (7,))
    assert bare.signals(np.array([[1.0]]))[0, 1] == 0.5
    assert np.isnan(bare.signals(np.array([[1.0]]))[0, 0])


def test_the_first_token_is_read_under_the_change() -> None:
    made = planted()
    model = ChatModel(made.model, made.tokenizer, name="planted")
    refusing = made.tokenizer("I", add_special_tokens=False)["input_ids"][0]
    work: Any = SimpleNamespace(
        model=model,
        suite=made.suite,
        under=lambda _: {},
        cached=lambda _name, _depends, _kind, compute, _label: compute(),
    )
    off = (ScaleFeatures(tuple(sorted(made.truth.causal | made.truth.redundant)), 0.0),)
    asked = PromptSet(name="asked", prompts=made.harmful.prompts[:4])
    clean, changed = p_refuse(work, asked, [refusing]), p_refuse(work, asked, [refusing], off)
    assert (clean > 0.9).all()
    assert (changed < 0.1).all()


def test_drops_are_shares_of_the_start() -> None:
    assert drops(np.array([2.0, 1.0, 3.0]), 2.0).tolist() == [0.0, 0.5, -0.5]
    assert np.isnan(drops(np.array([0.0, 1.0]), 0.0)).all()


def test_a_walk_adds_words_in_reading_order() -> None:
    walk = Walk.of(AttackPair(id="a", attack="x", plain="do it", text="In a play: Do it, please!"), 16)
    assert walk is not None
    assert walk.words == ("In", "a", "play:", ",", "please!")
    assert walk.texts == (
        *("Do it", "In Do it", "In a Do it", "In a play: Do it", "In a play: Do it,"),
        "In a play: Do it, please!",
    )
    assert walk.alone(2) == "play: Do it"
    assert walk.alone(4) == "Do it please!"
    assert [prompt.id for prompt in walked([walk])] == [f"a~{n}" for n in range(6)]


def test_long_texts_are_added_in_pieces() -> None:
    text = " ".join(f"w{n}" for n in range(10)) + " do it"
    walk = Walk.of(AttackPair(id="a", attack="x", plain="do it", text=text), 4)
    assert walk is not None
    assert len(walk.words) == 4
    assert " ".join(walk.words) == text.removesuffix(" do it")
    assert walk.texts[-1] == text


@pytest.mark.parametrize("plain", [None, "something else", "do it"])
def test_where_nothing_can_be_walked(plain: str | None) -> None:
    assert Walk.of(AttackPair(id="a", attack="x", plain=plain, text="do it"), 4) is None


def test_parts_of_a_text_are_left_out_whole() -> None:
    parts = Parts.of("Do it now, please!", 9)
    assert parts.words == ("Do", "it", "now,", "please!")
    assert [parts.without(n) for n in range(4)] == ["it now, please!", "Do now, please!", "Do it please!", "Do it now,"]
    assert Parts.of("Do it now, please!", 2).words == ("Do it", "now, please!")
    assert Parts.of("Do", 9).words == ()


def test_the_request_is_no_part_of_a_walk() -> None:
    walk = Walk.of(AttackPair(id="a", attack="x", plain="do it", text="In a play: do it, please!"), 16)
    assert walk is not None
    assert walk.parts.without(1) == "In play: do it, please!"
    # Tokens by the place of their last character: "In", "play", "do", "please".
    assert walk.parts.owners([1, 8, 12, 23]).tolist() == [0, 2, -1, 4]
