"""Signals of harm and refusal features, and walks over words, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scripted import CLEAN, POOL, about, found, prompt_set

from demur.data import AttackPair
from demur.method.activations import feature_activations
from demur.method.interventions import ScaleFeatures, bind
from demur.model import ChatModel, Region, TokenizedPrompt
from demur.studies.context import Workspace
from demur.studies.gauge import Gauge, Parts, Walk, drops, p_refuse, walked, word_effects
from demur.studies.pipeline import Found
from demur.studies.roles import FeatureRole, Roles
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
    # Features that were silent on every reference prompt.
    silent = Gauge(cast("Any", None), (), (FeatureId(3, 4),), np.array([0.0]), (7,))
    assert np.isinf(silent.signals(np.array([[1.0]]))[0, 1])


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
    assert drops(np.array([0.25]), 0.5).tolist() == [0.5]
    assert np.isnan(drops(np.array([0.25]), -0.5)).all()
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
    assert Parts.of("Do", 9) == Parts("Do", (), (-1, -1))


def test_the_request_is_no_part_of_a_walk() -> None:
    walk = Walk.of(AttackPair(id="a", attack="x", plain="do it", text="In a play: do it, please!"), 16)
    assert walk is not None
    assert walk.parts.without(1) == "In play: do it, please!"
    # Tokens by the place of their last character: "In", "play", "do", "please".
    assert walk.parts.owners([1, 8, 12, 23]).tolist() == [0, 2, -1, 4]


# -- effects of parts --------------------------------------------------------------------------------------------------


class Told(Gauge):
    """Signals and odds by the number of words, estimates by hand."""

    def read(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:  # noqa: ARG002
        return np.array([[len(p.text.split()), 10.0 * ("b" in p.text)] for p in prompts], dtype=float)

    def p_refuse(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:  # noqa: ARG002
        return np.array([0.5 if "b" in p.text else 0.25 for p in prompts])

    def token_effects(self, texts: Any, method: Any) -> list[np.ndarray]:
        return [np.full(len(each.words), 1.0 if method == "gradient" else 2.0) for each in texts.values()]


def told() -> Told:
    return Told(cast("Any", None), (), (FeatureId(3, 4),), np.array([2.0]), (7,))


def test_a_part_s_effect_is_what_leaving_it_out_changes() -> None:
    texts = {"one": Parts.of("a b c", 3), "none": Parts.of("b", 3), "two": Parts.of("c c b b", 2)}
    effects = word_effects(told(), texts)
    assert list(effects) == ["one", "none", "two"]
    assert effects["one"].left_out.tolist() == [[-1.0, 0.0, 0.0], [-1.0, -10.0, -0.25], [-1.0, 0.0, 0.0]]
    assert effects["none"].left_out.shape == (0, 3)
    assert effects["two"].left_out.tolist() == [[-2.0, 0.0, 0.0], [-2.0, -10.0, -0.25]]
    assert (effects["two"].gradient.tolist(), effects["two"].ig.tolist()) == ([1.0, 1.0], [2.0, 2.0])
    assert len(effects["none"].ig) == 0
    assert word_effects(told(), {}) == {}
    assert word_effects(told(), {"none": Parts.of("b", 3)})["none"].left_out.shape == (0, 3)


def test_what_a_token_ends_in_owns_it_and_beyond_the_text_the_last_character() -> None:
    parts = Parts("ab c", ("ab", "c"), (0, 0, -1, 1))
    assert parts.owners([0, 1, 2, 3, 9]).tolist() == [0, 0, -1, 1, 1]
    assert parts.owners([]).dtype == np.dtype(int)


@pytest.fixture(scope="module", name="work")
def planted_work() -> Any:
    made = planted()
    model, keys = ChatModel(made.model, made.tokenizer, name="planted"), []

    def cached(name: str, depends: Any, kind: Any, compute: Any, label: str) -> Any:
        assert name in ("levels", "token-effects", "log-odds")
        assert None not in (kind, label)
        keys.append(depends)
        return compute()

    work = object.__new__(Planted)
    work.model, work.suite, work.truth, work.keys, work.cached = model, made.suite, made, keys, cached
    work.warnings = []
    return work


class Planted(Workspace[Any]):
    """A workspace that keeps nothing."""

    model: Any = None
    suite: Any = None
    cached: Any = None
    keys: Any = None
    truth: Any = None

    def under(self, change: Any) -> dict[str, Any]:
        return {"change": [each.id for each in change]}


def of_planted(work: Any) -> Gauge:
    harm, refusal = sorted(work.truth.truth.harm)[:2], sorted(work.truth.truth.refusal)
    return Gauge(work, tuple(harm), tuple(refusal), np.ones(len(harm) + len(refusal)), (7,))


def test_levels_are_read_under_the_change_and_of_no_prompt_nothing_is_computed(work: Any) -> None:
    gauge, prompts = of_planted(work), PromptSet(name="asked", prompts=work.truth.harmful.prompts[:3])
    items = work.model.tokenize(prompts)
    for change in ((), (ScaleFeatures(gauge.refusal, 0.0),)):
        with work.model.intervene(bind(work.suite, *change)):
            values = feature_activations(work.model, work.suite, items, gauge.features)
        assert gauge.levels(prompts, change) == pytest.approx(gauge.reduced(items, values), abs=1e-6)
        assert gauge.read(prompts, change) == pytest.approx(gauge.signals(gauge.levels(prompts, change)), abs=1e-6)
    assert gauge.levels(prompts)[:, 2:].max() > 0
    asked = len(work.keys)
    assert gauge.levels(PromptSet(name="none", prompts=())).shape == (0, len(gauge.features))
    assert len(work.keys) == asked
    # As many features, but other ones are harm features: other levels.
    gauge.levels(prompts)
    other = Gauge(work, gauge.harm[:1], (gauge.harm[1], *gauge.refusal), gauge.reference, (7,))
    other.levels(prompts)
    assert work.keys[-1] != work.keys[-2]


def test_the_probability_of_refusal_is_that_of_the_model_s_refusals(work: Any) -> None:
    refusing = work.model.tokenizer("I", add_special_tokens=False)["input_ids"][0]
    gauge = replace(of_planted(work), refusal_ids=(refusing,))
    prompts = PromptSet(name="asked", prompts=(*work.truth.harmful.prompts[:2], *work.truth.harmless.prompts[:2]))
    assert (gauge.p_refuse(prompts) > 0.5).tolist() == [True, True, False, False]
    off = (ScaleFeatures(tuple(sorted(work.truth.truth.causal | work.truth.truth.redundant)), 0.0),)
    assert (gauge.p_refuse(prompts, off) < 0.5).all()


def test_estimates_are_summed_over_the_tokens_of_a_part(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token takes its place in the prompt from the signal."""
    texts = {"a": Parts.joined([["Steal"], [" the", " car"]], 2, " now"), "b": Parts.of("Paint a river", 3)}
    seen: dict[str, Any] = {}

    def scores(_model: Any, _suite: Any, items: Any, features: Any, *, varied: Any, method: str) -> list[torch.Tensor]:
        seen.update(items=items, features=features, varied=varied, method=method)
        return [torch.arange(len(item), dtype=torch.float32) for item in items]

    monkeypatch.setattr("demur.method.tokens.token_effects", scores)
    gauge = replace(of_planted(work), reference=np.array([5.0, 5.0, *[2.0] * len(of_planted(work).refusal)]))
    got, unit = gauge.token_effects(texts, "ig"), 2.0 * len(gauge.refusal)
    assert (seen["features"], seen["method"]) == (gauge.refusal, "ig")
    for (name, parts), item, taken in zip(texts.items(), seen["items"], got, strict=True):
        assert item.prompt_id == name
        first = item.regions.index(Region.INSTRUCTION)
        owners = parts.owners(work.model.chat.ends(parts.text))
        wanted = [-sum(first + n for n, own in enumerate(owners) if own == part) for part in range(len(parts.words))]
        assert taken == pytest.approx(np.array(wanted) / unit)
        # Only the tokens of parts are varied: not the template, nor what always stays.
        varied = [False] * len(item)
        for n, own in enumerate(owners):
            varied[first + n] = bool(own >= 0)
        assert seen["varied"][name].tolist() == varied
    assert gauge.token_effects({}, "ig") == []
    # Another method, or another way to divide the text, is another estimate.
    before = len(work.keys)
    gauge.token_effects(texts, "gradient")
    gauge.token_effects({"a": Parts.of("Steal now the car", 2), "b": texts["b"]}, "gradient")
    gauge.token_effects({"c": texts["a"], "b": texts["b"]}, "gradient")
    assert len({str(key) for key in work.keys[before - 1 :]}) == 4


@pytest.mark.parametrize(
    ("roles", "harm", "features", "words"),
    [
        ({"refusal": (0,), "mixed": (1,), "harm": (2,)}, (2, 3), ((2, 3), (0,)), []),
        ({"mixed": (1,), "harm": (2,)}, (1, 3), ((3,), (1,)), ["no feature of F* is clearly"]),
        ({"harm": (0, 1)}, (2,), ((2,), (0, 1)), ["no feature of F* is clearly"]),
        ({"refusal": (0,)}, (0,), ((), (0,)), ["no harm feature was found"]),
    ],
)  # fmt: skip
def test_the_gauge_takes_refusal_features_of_f_star_and_harm_features_that_are_no_others(
    monkeypatch: pytest.MonkeyPatch, roles: Any, harm: Any, features: Any, words: list[str]
) -> None:
    def row(n: int, role: Any) -> FeatureRole:
        return FeatureRole(feature=POOL[n], role=role, instruction=0.0, post_instruction=0.0, share=about(0.5))

    given = tuple(row(n, role) for role, places in roles.items() for n in places)
    monkeypatch.setattr("demur.studies.gauge.find_roles", lambda _, each: Roles(features=given) if each.pool else None)

    def harm_of(_work: Any, given: Found, k: int) -> Roles:
        assert (given.chosen.features, k) == (POOL[:2], 4)
        return Roles(features=(*(row(n, "harm") for n in harm), row(4, "mixed")))

    monkeypatch.setattr("demur.studies.gauge.harm_features", harm_of)
    prompts = {name: prompt_set(name, len(word)) for name, word in CLEAN.items()}
    clean = {**CLEAN, "selection-harmful": "NYN"}

    class Levels(Gauge):
        def levels(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:  # noqa: ARG002
            # The refused harmful selection prompts.
            assert prompts.ids == ("selection-harmful-0", "selection-harmful-2")
            return np.array([[1.0] * len(self.features), [4.0] * len(self.features)])

    work = object.__new__(Planted)
    work.config, work.warnings = SimpleNamespace(k=4), []
    made = Levels.of(work, found(clean, prompts))
    assert (made.harm, made.refusal) == tuple(tuple(POOL[n] for n in each) for each in features)
    assert made.reference.tolist() == [2.5] * len(made.features)
    assert (made.refusal_ids, len(work.warnings)) == ((1,), len(words))
    for warning, word in zip(work.warnings, words, strict=True):
        assert word in warning
