"""Each way to suppress and to induce: which features it takes, what it does with a strength, and what controls draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import CLEAN, POOL, NoSaes, context_of, found, one_set, prompt_set, prompts_of

from demur.errors import InputError
from demur.method import activations, selection
from demur.method.interventions import PerPrompt, ScaleFeatures, SetFeatures
from demur.method.selection import DictionaryAttribution
from demur.model import ChatModel
from demur.runs import Run
from demur.studies import methods
from demur.studies.config import MAIN, CompareConfig, FindConfig
from demur.studies.methods import METHODS, FeatureMethod, Method, RandomMatched, Selection, Sets, get_method
from demur.studies.pipeline import Attributor
from demur.testing import planted
from demur.types import FeatureId, FeatureSet, PromptSet

CONFIG = CompareConfig.model_validate({"suppress": "0,-2", "induce_multiples": "1,2", "dimensions": "1,3", "k": 2})
SET = CompareConfig.model_validate({"induce": "7,9", "induce_where": "all", "k": 2})
FOUND = found(CLEAN, prompts_of(CLEAN))
HARMFUL = prompt_set("test-harmful", 2)


@pytest.fixture(scope="module", name="model")
def planted_model() -> ChatModel:
    made = planted()
    return ChatModel(made.model, made.tokenizer, name="planted")


@pytest.fixture(name="given")
def selection_of(tmp_path: Path, model: ChatModel) -> Iterator[Selection]:
    with Run.open(tmp_path / "run", config={}) as run:
        yield Selection(context_of(run, CONFIG, model=model, suite=Norms()), FOUND, 2)


class Norms(NoSaes):
    """Decoder norms 1, 2, 3, … in each layer."""

    def __getitem__(self, layer: int) -> Any:
        return SimpleNamespace(decoder_norms=lambda: torch.arange(1.0, 7.0))


def test_who_takes_whose_strengths() -> None:
    leaders = {name: get_method(name).leader for name in METHODS}
    assert {name: leader for name, leader in leaders.items() if leader} == {
        "cossim+ap-local": MAIN, "ap-local": "ap", "random": MAIN, "random-pool": MAIN,
    }  # fmt: skip
    assert [name for name in METHODS if get_method(name).local] == ["cossim+ap-local", "ap-local"]
    assert [name for name in METHODS if get_method(name).control] == ["random", "random-pool"]
    assert {name for name in METHODS if not get_method(name).has_set} == {
        "cossim+ap-local", "ap-local", "direction", "direction-affine", "subspace", "subspace-clusters",
    }  # fmt: skip


def test_a_method_is_found_by_name_as_a_class_or_made_already() -> None:
    made = Method()
    METHODS.register("made", made)
    assert get_method("made") is made
    assert isinstance(get_method("cossim"), FeatureMethod)
    with pytest.raises(InputError, match="cossin"):
        get_method("cossin")


def test_strengths_are_those_configured_for_the_kind() -> None:
    main, direction, subspace = map(get_method, (MAIN, "direction", "subspace"))
    assert (main.strengths(CONFIG, "suppress"), main.strengths(CONFIG, "induce")) == ((0.0, -2.0), (1.0, 2.0))
    assert main.strengths(SET, "induce") == (7.0, 9.0)
    assert (direction.strengths(CONFIG, "suppress"), direction.strengths(SET, "induce")) == (
        (1.0,),
        SET.induce_multiples,
    )
    assert subspace.strengths(CONFIG, "suppress") == (1.0, 3.0)
    assert [main.strength_text(CONFIG, "suppress", c) for c in (0.5, -2.0)] == ["c = 0.5", "c = \N{MINUS SIGN}2"]
    assert [main.strength_text(config, "induce", 2.0) for config in (CONFIG, SET)] == ["2 × max", "v = 2"]
    assert [direction.strength_text(CONFIG, kind, 0.5) for kind in ("suppress", "induce")] == ["", "0.5 × length"]
    assert [subspace.strength_text(CONFIG, "suppress", n) for n in (1.0, 3.0)] == ["1 dimension", "3 dimensions"]


def test_a_bare_method_suppresses_nothing_and_cannot_induce(given: Selection) -> None:
    sets = Sets(given, CONFIG)
    with pytest.raises(NotImplementedError):
        Method().suppress(sets, 0.0, HARMFUL)
    assert Method().induce(sets, 1.0) == ()
    with pytest.raises(NotImplementedError):
        FeatureMethod().select(given)


# -- features ----------------------------------------------------------------------------------------------------------


def test_f_star_is_scaled_or_set_to_multiples_of_its_own_maxima(
    given: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def maxima(model: Any, suite: Any, items: Any, features: Any) -> torch.Tensor:
        asked.append((tuple(item.prompt_id for item in items), features))
        assert (model, suite) == (given.work.model, given.work.suite)
        return torch.tensor([2.0, 0.5])[: len(features)]

    monkeypatch.setattr(activations, "mean_max_activations", maxima)
    main, sets = get_method(MAIN), Sets(given, CONFIG)
    assert main.suppress(sets, -2.0, HARMFUL) == ((ScaleFeatures(POOL[:2], -2.0),),)
    assert main.induce(sets, 2.0) == ((SetFeatures(POOL[:2], (4.0, 1.0), "prompt"),),)
    assert main.induce(Sets(given, SET), 7.0) == ((SetFeatures(POOL[:2], 7.0, "all"),),)
    # On the refused harmful selection prompts, once.
    assert asked == [(FOUND.clean.used("selection").harmful.ids, POOL[:2])]
    assert given.maxima(one_set()) == ()
    assert given.maxima(one_set(POOL[4])) == (2.0,)
    assert len(asked) == 2
    harmful = replace(FOUND, clean=found({**CLEAN, "selection-harmful": "NNY"}, prompts_of(CLEAN)).clean)
    replace(given, found=harmful).maxima(one_set(POOL[4]))
    assert asked[2] == (("selection-harmful-0", "selection-harmful-1"), POOL[4:])


def test_what_methods_select(given: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    used = FOUND.clean.used("selection")
    best = one_set(POOL[3], POOL[1], POOL[0])

    def dictionary(self: Attributor, harmful: PromptSet, *, falling: bool = False, **_: Any) -> DictionaryAttribution:
        assert (self.work, self.clean, self.direction) == (given.work, FOUND.clean, FOUND.direction)
        assert harmful.ids == used.harmful.ids
        return DictionaryAttribution((), best if falling else one_set(POOL[4], *best.features))

    def actdiff(_model: Any, _suite: Any, harmful: Any, harmless: Any, k: int, *, reduce: str) -> FeatureSet:
        assert [tuple(i.prompt_id for i in each) for each in (harmful, harmless)] == [
            used.harmful.ids,
            used.harmless.ids,
        ]
        return FeatureSet(features=POOL[:k], scores=(0.0,) * k, scope="global", method=reduce)

    def cossim(suite: Any, direction: Any, k: int) -> FeatureSet:
        assert suite is given.work.suite
        assert direction.tolist() == pytest.approx([0.6, 0.8])
        return one_set(*POOL[1 : 1 + k])

    monkeypatch.setattr(Attributor, "dictionary", dictionary)
    monkeypatch.setattr(selection, "actdiff_set", actdiff)
    monkeypatch.setattr(selection, "cossim_set", cossim)

    def select(name: str, given: Selection = given) -> FeatureSet:
        method = get_method(name)
        assert isinstance(method, FeatureMethod)
        return method.select(given)

    assert select(MAIN) is FOUND.chosen
    assert select("ap").features == (POOL[4], POOL[3])
    assert select("ap-falling").features == (POOL[3], POOL[1])
    assert select("cossim").features == POOL[1:3]
    assert (select("actdiff").features, select("actdiff").method) == (POOL[:2], "max")
    work: Any = given.work
    last = context_of(work.run, CONFIG.model_copy(update={"actdiff_tokens": "last"}), model=work.model)
    assert select("actdiff", replace(given, work=last)).method == "last"
    # A study that compares nothing has no such setting.
    assert select("actdiff", replace(given, work=context_of(work.run, FindConfig(), model=work.model))).method == "max"


def test_sets_are_chosen_once_and_anew_for_other_settings(given: Selection) -> None:
    chosen: list[int] = []

    class Counted(FeatureMethod):
        name, label = "counted", "counted"

        def select(self, given: Selection) -> FeatureSet:
            chosen.append(given.k)
            return one_set(*POOL[: given.k])

    METHODS.register("counted", Counted())
    sets = Sets(given, CONFIG)
    assert sets["counted"] == sets["counted"] == Sets(given, CONFIG)["counted"] == (one_set(*POOL[:2]),)
    assert sets[MAIN] == (FOUND.chosen,)
    assert chosen == [2]
    turned = replace(FOUND, direction=replace(FOUND.direction, difference=torch.ones(2)))
    others = (
        Sets(replace(given, k=1), CONFIG),
        Sets(given, CONFIG.model_copy(update={"actdiff_tokens": "mean"})),
        Sets(replace(given, found=turned), CONFIG),
        Sets(replace(given, found=replace(FOUND, chosen=one_set(POOL[1]))), CONFIG),
    )
    for each in others:
        each["counted"]
    assert chosen == [2, 1, 2, 2, 2]
    # Of what is drawn at random only.
    Sets(given, CONFIG.model_copy(update={"seed": 9, "random_sets": 9}))["counted"]
    assert len(chosen) == 5


# -- controls ----------------------------------------------------------------------------------------------------------


def test_controls_are_drawn_by_the_seeds_of_the_configuration(given: Selection) -> None:
    class Counted(RandomMatched):
        name, label = "counted", "counted"

        def draw(self, given: Selection, seeds: Any) -> tuple[FeatureSet, ...]:  # noqa: ARG002
            drawn.append(list(seeds))
            return tuple(one_set(FeatureId(8, n)) for n in range(len(seeds)))

    drawn: list[list[int]] = []
    METHODS.register("counted", Counted())
    config = CONFIG.model_copy(update={"seed": 4, "random_sets": 3})
    assert len(Sets(given, config)["counted"]) == 3
    Sets(given, config)["counted"]
    Sets(given, config.model_copy(update={"seed": 5}))["counted"]
    Sets(given, config.model_copy(update={"random_sets": 2}))["counted"]
    assert drawn == [[4, 5, 6], [5, 6, 7], [4, 5]]


def test_random_features_are_matched_by_rate_and_by_size_of_what_they_move(
    given: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = FOUND.clean.used("selection")

    def means(model: Any, suite: Any, groups: Any, reduces: Any, *, layers: Any) -> Iterator[Any]:
        assert (model, suite, layers) == (given.work.model, given.work.suite, (0,))
        assert [tuple(i.prompt_id for i in each) for each in groups] == [used.harmful.ids, used.harmless.ids]
        assert list(reduces) == ["rate", "mean"]
        for scale in (1.0, 3.0):
            yield {"rate": {0: torch.full((6,), 0.1 * scale)}, "mean": {0: torch.full((6,), 10.0 * scale)}}

    drawn: list[Any] = []

    def random_set(main: FeatureSet, matched: Any, *, exclude: Any, seed: int) -> FeatureSet:
        rates, sizes = matched
        # Both classes count alike; a feature's size is its activation times the norm of what it writes.
        assert rates[0].tolist() == pytest.approx([0.2] * 6)
        assert sizes[0].tolist() == pytest.approx([20.0 * n for n in range(1, 7)])
        assert (main.features, exclude) == (POOL[:2], POOL)
        drawn.append(seed)
        return one_set(FeatureId(0, seed))

    monkeypatch.setattr(activations, "dictionary_means", means)
    monkeypatch.setattr(selection, "random_set", random_set)
    method = get_method("random")
    assert isinstance(method, RandomMatched)
    assert method.draw(given, [3, 4]) == (one_set(FeatureId(0, 3)), one_set(FeatureId(0, 4)))
    assert drawn == [3, 4]


@pytest.mark.parametrize(("k", "size", "words"), [(2, 2, []), (3, 3, []), (4, 3, ["holds 3 features outside F*"])])
def test_the_control_from_the_pool_holds_what_f_star_does_not(
    given: Selection, k: int, size: int, words: list[str]
) -> None:
    method = get_method("random-pool")
    assert isinstance(method, RandomMatched)
    mine = replace(given, k=k)
    sets = method.draw(mine, range(30))
    assert sets == method.draw(mine, range(30))
    assert all(len(set(each.features)) == size and set(each.features) <= set(POOL[2:]) for each in sets)
    # Every feature and every order comes up.
    assert len({each.features for each in sets}) == 6
    assert len({each.method for each in sets}) == 30
    assert len(given.work.warnings) == len(words)
    for warning, word in zip(given.work.warnings, words, strict=True):
        assert word in warning
        assert f"sets of {size} instead of {k}" in warning


def test_without_a_feature_left_there_is_no_control_from_the_pool(given: Selection) -> None:
    method = get_method("random-pool")
    assert isinstance(method, RandomMatched)
    assert method.draw(replace(given, found=replace(FOUND, chosen=one_set(*POOL))), range(3)) == ()
    assert ["F* holds the whole pool" in each for each in given.work.warnings] == [True]


# -- sets of each prompt -----------------------------------------------------------------------------------------------


def test_local_sets_are_attributed_on_the_prompt_itself(given: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(_self: Any, pool: Any, method: Any, prompts: PromptSet) -> Any:
        assert (pool, method, prompts.ids) == (FOUND.pool, "gradient", HARMFUL.ids)
        rows = zip(FOUND.attribution.rows[:2], prompts.ids, strict=True)
        return replace(FOUND.attribution, rows=tuple(row.model_copy(update={"prompt_id": name}) for row, name in rows))

    def local(*features: FeatureId, prompt: str) -> FeatureSet:
        return FeatureSet(features=features, scores=(0.0,) * len(features), scope="local", method="m", prompt_id=prompt)

    def dictionary(_self: Any, prompts: PromptSet, **options: Any) -> DictionaryAttribution:
        assert (prompts.ids, options) == (HARMFUL.ids, {})
        sets = tuple(local(*POOL[n : n + 3], prompt=name) for n, name in enumerate(prompts.ids))
        return DictionaryAttribution(sets, one_set(POOL[0]))

    monkeypatch.setattr(Attributor, "pool", pool)
    monkeypatch.setattr(Attributor, "dictionary", dictionary)
    sets, names = Sets(given, CONFIG), HARMFUL.ids
    for name, own in (
        ("cossim+ap-local", {names[0]: POOL[:2], names[1]: (POOL[0], POOL[2])}),
        ("ap-local", {names[0]: POOL[:2], names[1]: POOL[1:3]}),
    ):
        ((change,),) = get_method(name).suppress(sets, -2.0, HARMFUL)
        assert isinstance(change, PerPrompt)
        assert change.by_prompt == {prompt: (ScaleFeatures(features, -2.0),) for prompt, features in own.items()}
        assert change.name == name
        assert get_method(name).induce(sets, 1.0) == ()


# -- directions --------------------------------------------------------------------------------------------------------


def test_the_direction_is_ablated_in_its_form_or_added(given: Selection) -> None:
    mine = replace(FOUND, direction=replace(FOUND.direction, harmless_mean=torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    sets = Sets(replace(given, found=mine), SET)
    linear, affine = get_method("direction"), get_method("direction-affine")
    for method, form in ((linear, "linear"), (affine, "affine")):
        ((change,),) = method.suppress(sets, 1.0, HARMFUL)
        assert change.id == mine.direction.ablate(form).id  # pyright: ignore[reportArgumentType]
    ((added,),) = linear.induce(sets, 1.5)
    assert added.id == mine.direction.add(1.5, "all").id
    assert affine.induce(sets, 1.5) == ()


def test_a_subspace_has_as_many_dimensions_as_its_strength(given: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = torch.tensor([[9.0, 9.0], [1.0, 0.0]])
    mine = replace(FOUND, direction=replace(FOUND.direction, harmless_mean=harmless))
    read: list[Any] = []

    def residuals(_model: Any, items: Any, layer: int, position: int) -> torch.Tensor:
        read.append((tuple(item.prompt_id for item in items), layer, position))
        return torch.tensor([[2.0, 1.0], [3.0, 5.0]])

    def basis(kind: float) -> Any:
        def made(harmful: torch.Tensor, mean: torch.Tensor, k: int) -> torch.Tensor:
            assert (harmful.tolist(), mean.tolist()) == ([[2.0, 1.0], [3.0, 5.0]], [1.0, 0.0])
            return torch.eye(2)[:k] * kind

        return made

    monkeypatch.setattr(methods, "residuals_at", residuals)
    monkeypatch.setattr(methods, "singular_directions", basis(1.0))
    monkeypatch.setattr(methods, "cluster_directions", basis(-1.0))
    sets = Sets(replace(given, found=mine), CONFIG)
    for name, sign in (("subspace", 1.0), ("subspace-clusters", -1.0)):
        # Two prompts span two dimensions at most.
        for strength, rows in ((1.0, 1), (2.0, 2), (5.0, 2)):
            ((change,),) = get_method(name).suppress(sets, strength, HARMFUL)
            wanted: Any = torch.eye(2)[:rows] * sign
            assert change.id == replace(mine.direction.ablate(), vector=wanted).id
        assert get_method(name).induce(sets, 1.0) == ()
    # The harmful prompts that made the direction, where it was read; once.
    assert read == [(FOUND.clean.used("direction").harmful.ids, 1, -1)]
