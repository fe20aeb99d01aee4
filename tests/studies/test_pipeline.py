"""Each step on the way to F*, on answers and scores that are written by hand: what it takes, keeps and doubts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scripted import (
    CLEAN,
    POOL,
    NoSaes,
    attribution,
    context_of,
    found,
    judged,
    one_set,
    prompt_set,
    prompts_of,
    row,
)

from demur.errors import ModelError
from demur.method import selection
from demur.method.attribution import SCORED, ScoredTokens
from demur.method.direction import FORMS, ClassMeans, Direction
from demur.method.selection import DictionaryAttribution, Pool
from demur.model import SCORED_REGIONS, ChatModel, Region
from demur.runs import Run
from demur.stats import spearman_over_prompts
from demur.studies import pipeline
from demur.studies.config import FindConfig
from demur.studies.pipeline import Attributor, Found
from demur.studies.results import SplitUse
from demur.types import Candidate, FeatureId, FeatureSet, Form, PromptSet, RefusalToken


@pytest.fixture(scope="module", name="model")
def chat_model(truth: Any) -> ChatModel:
    return ChatModel(truth.model, truth.tokenizer, name="planted")


def config(**changes: Any) -> FindConfig:
    return FindConfig.model_validate({"k": 2, "k0": 2, "n_exact": 2, **changes})


FOUND = found(CLEAN, prompts_of(CLEAN))


# -- clean answers -----------------------------------------------------------------------------------------------------


def test_labels_hold_where_harmful_prompts_are_refused_and_harmless_ones_are_not() -> None:
    prompts = prompts_of({"a-harmful": "YNPX?", "a-harmless": "YNPX?"})
    harmful, harmless = (judged("YNPX?", prompts[f"a-{each}"]) for each in ("harmful", "harmless"))
    used = pipeline.split_used(harmful, harmless)
    assert used.harmful.ids == ("a-harmful-1", "a-harmful-2")
    assert used.harmless.ids == ("a-harmless-0", "a-harmless-3")
    for name, kept in (("direction", 2), ("selection", 2), ("tuning", 5), ("test", 5)):
        assert pipeline.split_use(name, harmful, harmless) == (
            SplitUse(split=name, label="harmful", n=5, refused=2, complied=1, used=kept),
            SplitUse(split=name, label="harmless", n=5, refused=2, complied=1, used=kept),
        )


TELLS = {"direction-harmful": "NP?Y", "direction-harmless": "YXN", "tuning-harmful": "Y", "tuning-harmless": "N"}


def test_clean_answers_give_the_refusal_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    token = RefusalToken(token_id=7, text="N", share=1.0)

    def tokens(model: Any, refusals: Any, others: Any) -> tuple[RefusalToken, ...]:
        assert model is context.model
        asked.append((list(refusals), list(others)))
        return (token,)

    monkeypatch.setattr(pipeline, "find_refusal_tokens", tokens)
    context = context_of(run, config(), {**CLEAN, **TELLS, "selection-harmless": "yX?"})
    clean = pipeline.answer_clean(context, context.splits.choosing)
    # Whole refusals begin with them; what is no refusal of a harmless prompt does not.
    assert asked == [(["N"] * 4, ["Y", "X", "y", "X"])]
    assert (clean.tokens, clean.refusal_ids) == ((token,), (7,))
    assert [answers.answers[0].prompt.id for pair in clean.answers.values() for answers in pair] == [
        f"{split}-{label}-0" for split in ("direction", "selection", "tuning") for label in ("harmful", "harmless")
    ]
    assert [step[0] for step in context.steps] == [
        f"clean: {split}, {label}"
        for split in ("direction", "selection", "tuning")
        for label in ("harmful", "harmless")
    ]
    (warning,) = context.warnings
    assert "33% of 6 harmless prompts (the prompts that choose)" in warning


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # Of all harmful prompts two, and a twentieth, have to be refused.
        ({"direction": "NN" + "Y" * 29, "selection": "YY" + "?" * 9, "tuning": "Y" * 7}, None),
        ({"direction": "NN" + "Y" * 30, "selection": "YY", "tuning": "Y" * 7}, r"refused 2 of 41 .* \(0 unscored"),
        ({"direction": "N", "selection": "YY?", "tuning": "Y"}, r"refused 1 of 4 harmful prompts \(1 unscored by"),
        ({"direction": "N??", "selection": "??", "tuning": "?"}, r"refused 1 of 1 harmful"),
        ({"direction": "PN", "selection": "PN", "tuning": "Y"}, None),
    ],
)  # fmt: skip
def test_without_refusals_there_is_nothing_to_explain(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: dict[str, str], message: str | None
) -> None:
    monkeypatch.setattr(pipeline, "find_refusal_tokens", lambda *_: (RefusalToken(token_id=7, text="N", share=1.0),))
    context = context_of(run, config(), {**CLEAN, **{f"{split}-harmful": word for split, word in words.items()}})
    choosing = context.splits.choosing
    if message is None:
        # Refusals there are, but in the selection prompts of the first case none on which to score.
        if words["selection"].startswith("P"):
            pipeline.answer_clean(context, choosing)
        else:
            with pytest.raises(ModelError, match=r"of the selection prompts, 0 harmful ones .* and 3 harmless"):
                pipeline.answer_clean(context, choosing)
        return
    with pytest.raises(ModelError, match=message) as error:
        pipeline.answer_clean(context, choosing)
    shown = [line for line in str(error.value).splitlines() if "->" in line]
    firsts = (words["direction"] + words["selection"])[:3]
    said = {"N": "refusal", "Y": "compliance", "?": "unscored"}
    assert [line.split("-> ")[1] for line in shown] == [f"{letter!r} ({said[letter]})" for letter in firsts]


@pytest.mark.parametrize(
    ("name", "word", "told"),
    [
        ("direction-harmful", "NYYY", "direction prompts, 1 harmful ones were refused and 2 harmless"),
        ("direction-harmless", "YNNNN", "direction prompts, 2 harmful ones were refused and 1 harmless"),
        ("selection-harmless", "YNNNN", "selection prompts, 3 harmful ones were refused and 1 harmless"),
    ],
)
def test_both_classes_need_two_prompts_where_features_are_chosen(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, word: str, told: str
) -> None:
    monkeypatch.setattr(pipeline, "find_refusal_tokens", lambda *_: (RefusalToken(token_id=7, text="N", share=1.0),))
    context = context_of(run, config(), {**CLEAN, name: word})
    with pytest.raises(ModelError, match=told):
        pipeline.answer_clean(context, context.splits.choosing)


@pytest.mark.parametrize(
    ("word", "told"), [("NYYYY", []), ("NPYYYYYYY", ["22% of 9"]), ("????", []), ("N?", ["100% of 1"])]
)
def test_over_refusal_is_warned_of_beyond_a_fifth(run: Run, word: str, told: list[str]) -> None:
    context = context_of(run, config())
    pipeline.warn_of_over_refusal(context, "there", judged(word, prompt_set("x-harmless", len(word))))
    assert len(context.warnings) == len(told)
    for warning, part in zip(context.warnings, told, strict=True):
        assert f"refuses {part} harmless prompts (there)" in warning


# -- F* ----------------------------------------------------------------------------------------------------------------


def test_the_overlap_of_f_star_with_each_prompt_s_own_set() -> None:
    # Both of two, one of two, none of two.
    assert FOUND.local_overlap == pytest.approx(0.5)
    assert replace(FOUND, chosen=FOUND.chosen.head(1)).local_overlap == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("k", "signal", "told"),
    [(2, False, ["33% of the 3 selection prompts"]), (3, True, ["holds 2 features, so F* has that size instead of 3"])],
)
def test_what_f_star_rests_on_is_doubted(
    run: Run, monkeypatch: pytest.MonkeyPatch, k: int, signal: bool, told: list[str]
) -> None:
    mine = FOUND if not signal else replace(FOUND, attribution=attribution(*FOUND.attribution.rows[:2]))
    context = context_of(run, config(k=k))

    def answered(work: Any, prompts: Any) -> Any:
        assert (work, prompts) == (context, context.splits.choosing)
        return FOUND.clean

    def steps(work: Any, clean: Any) -> Found:
        assert (work, clean) == (context, FOUND.clean)
        return mine

    monkeypatch.setattr(pipeline, "answer_clean", answered)
    monkeypatch.setattr(pipeline, "find_from", steps)
    checked: list[Found] = []
    monkeypatch.setattr(pipeline, "warn_of_dictionaries", lambda _work, each: checked.append(each))
    assert pipeline.find(context, context.splits.choosing) is mine
    assert checked == [mine]
    assert len(context.warnings) == len(told)
    for warning, part in zip(context.warnings, told, strict=True):
        assert part in warning
    assert set(context.seconds) == {"clean answers", "check of the SAEs"}


def test_the_steps_give_one_another_what_they_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(run, config(k=3, estimator="ig"))
    monkeypatch.setattr(pipeline, "choose_direction", lambda work, clean: _only(FOUND.direction, work, context, clean))
    monkeypatch.setattr(pipeline, "make_pool", lambda *given: _only(FOUND.pool, given[2], FOUND.direction))

    def pool(self: Attributor, pool: Pool, method: str, harmful: PromptSet) -> Any:
        assert (self.work, self.clean, self.direction) == (context, FOUND.clean, FOUND.direction)
        assert (pool, method, harmful.ids) == (FOUND.pool, "ig", FOUND.clean.used("selection").harmful.ids)
        return FOUND.attribution

    monkeypatch.setattr(Attributor, "pool", pool)
    mine = pipeline.find_from(context, FOUND.clean)
    assert (mine.clean, mine.direction, mine.pool) == (FOUND.clean, FOUND.direction, FOUND.pool)
    # Of the two prompts with signal the mean scores per token are 2, 1, .75, 0, .25.
    assert mine.chosen.features == POOL[:3]
    assert mine.chosen.scores == pytest.approx((2.0, 1.0, 0.75))
    assert set(context.seconds) == {"direction", "pool", "attribution"}


def _only(value: Any, given: Any, wanted: Any, *_: Any) -> Any:
    assert given is wanted
    return value


class Layers(NoSaes):
    """Two layers, of which a fake check needs the number only."""

    def __init__(self, reads: Any = None) -> None:
        super().__init__()
        self._reads = reads or {}

    @property
    def reads(self) -> Any:
        return self._reads

    def __getitem__(self, layer: int) -> Any:
        return SimpleNamespace(dense=lambda: layer)


@pytest.mark.parametrize("reads", [{}, {0: "mlp_in"}])
def test_a_region_that_is_reconstructed_poorly_is_doubted(
    run: Run, monkeypatch: pytest.MonkeyPatch, reads: Any
) -> None:
    """At layer 0 the words' share is .3, no more; the template's .4. At layer 1 nothing varies on the template."""
    asked: list[tuple[int, tuple[str, ...]]] = []
    sums = {
        0: (np.array([[1.0, 4.0], [2.0, 4.0]]), np.array([[5.0, 10.0], [5.0, 10.0]])),
        1: (np.array([[9.0, 1.0]]), np.array([[10.0, 0.0]])),
    }

    def reconstruction(_model: Any, layer: int, items: Any, regions: Any) -> Any:
        assert regions == SCORED_REGIONS
        asked.append((layer, items))
        error, spread = sums[layer]
        return SimpleNamespace(error=error, spread=spread)

    monkeypatch.setattr(pipeline, "reconstruction", reconstruction)
    words = {**CLEAN, "selection-harmful": "N" * 12 + "Y", "selection-harmless": "N" + "Y" * 12}
    context = context_of(run, config(), words, suite=Layers(reads))
    monkeypatch.setattr(
        type(context.model), "tokenize", lambda _, prompts: tuple(each.id for each in prompts), raising=False
    )
    mine = replace(found(words, prompts_of(words)), chosen=one_set(FeatureId(0, 1), FeatureId(1, 4), FeatureId(0, 9)))
    pipeline.warn_of_dictionaries(context, mine)
    (warning,) = context.warnings
    assert "template tokens at layer 0 (FVU 0.40), the user's words at layer 1 (FVU 0.90)" in warning
    assert warning.endswith("; `demur dictionaries` says what that costs" if not reads else "(FVU 0.90)")
    # Eight prompts of each class on which the label holds, and each layer of F* once.
    ids = (*(f"selection-harmful-{n}" for n in range(8)), *(f"selection-harmless-{n}" for n in range(1, 9)))
    assert asked == [(0, ids), (1, ids)]
    pipeline.warn_of_dictionaries(context, mine)
    assert len(asked) == 2
    context.warnings.clear()
    pipeline.warn_of_dictionaries(context, replace(mine, chosen=one_set()))
    assert context.warnings == []


# -- direction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "forms"),
    [({}, FORMS), ({"direction_form": "affine", "direction_layer": 1, "direction_position": -2, "kl_threshold": 0.5},
                   ("affine",))],
)  # fmt: skip
def test_the_direction_is_searched_for_as_configured(
    run: Run, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], forms: Any
) -> None:
    asked = config(**changes)
    context = context_of(run, asked)
    monkeypatch.setattr(type(context.model), "tokenize", lambda _, prompts: prompts.ids)
    clean, means = FOUND.clean, ClassMeans((-1,), torch.zeros(2, 1, 2), torch.ones(2, 1, 2))
    train: list[Any] = []
    scored: list[Any] = []

    def means_of(_model: Any, items: Any, search: Any) -> ClassMeans:
        train.append((items, search))
        return means

    monkeypatch.setattr(ClassMeans, "of", means_of)

    def find_direction(model: Any, given: Any, validation: Any, ids: Any, search: Any, *, stored: Any) -> Direction:
        assert (model, ids) == (context.model, (1,))
        assert torch.equal(given.harmless, means.harmless)
        assert validation == tuple(getattr(clean.used("selection"), each).ids for each in ("harmful", "harmless"))
        assert (search.forms, search.layer, search.position, search.kl_threshold) == (
            forms, asked.direction_layer, asked.direction_position, asked.kl_threshold,
        )  # fmt: skip
        candidate = FOUND.direction.candidates[0]
        names = [f"{candidate.layer}:{candidate.position}:{candidate.form}"]

        def score(take: Any) -> Iterator[Any]:
            scored.append(validation)
            yield [candidate] if take(names) else []

        assert list(stored(names, score)) == [candidate]
        # Known now, so that nothing is scored again.
        assert list(stored(names, lambda _take: iter([]))) == [candidate]
        return replace(FOUND.direction, note="something was relaxed" if changes else "")

    monkeypatch.setattr(pipeline, "find_direction", find_direction)
    assert pipeline.choose_direction(context, clean).layer == FOUND.direction.layer
    ((items, search),) = train
    assert items == tuple(getattr(clean.used("direction"), each).ids for each in ("harmful", "harmless"))
    assert search.forms == forms
    assert context.warnings == (["direction: something was relaxed"] if changes else [])
    assert ("direction", 1, 1) in context.steps
    # Refusal tokens, or prompts to score on, that are others: candidates are scored anew, on the means that are known.
    with pytest.raises(AssertionError):
        pipeline.choose_direction(context, replace(clean, tokens=(RefusalToken(token_id=2, text="N", share=1.0),)))
    assert (len(train), len(scored)) == (1, 1)
    # Other prompts that make the means: both anew.
    words = {**CLEAN, "direction-harmful": "NYN"}
    pipeline.choose_direction(context, found(words, prompts_of(words)).clean)
    assert (len(train), len(scored)) == (2, 2)


def test_the_chosen_direction_is_shown_with_its_token(run: Run, model: ChatModel) -> None:
    context = context_of(run, config(), model=model)
    places: tuple[tuple[int, int, Form], ...]
    places = ((1, -1, "affine"), (1, -2, "linear"), (0, -1, "linear"), (1, -1, "linear"))
    rows = tuple(
        Candidate(layer=layer, position=position, form=form, bypass=n, induce=0.0, kl=0.0, kept=True)
        for n, (layer, position, form) in enumerate(places)
    )
    mine = replace(FOUND, direction=replace(FOUND.direction, candidates=rows, note="a note"))
    told = pipeline.direction_info(context, mine)
    assert told.chosen == rows[3]
    assert (told.norm, told.candidates, told.note) == (5.0, rows, "a note")
    item = model.tokenize([mine.clean.answers["direction"][0].answers[0].prompt])[0]
    assert told.token == model.tokenizer.decode([item.ids[-1]])
    second = pipeline.direction_info(context, replace(mine, direction=replace(mine.direction, position=-2)))
    assert second.token == model.tokenizer.decode([item.ids[-2]])
    assert second.chosen == rows[1]


# -- pool and attribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "features"),
    [("cosine", POOL[:2]), ("attribution", (POOL[1], POOL[4], POOL[3])), ("union", (*POOL[:2], POOL[4], POOL[3]))],
)  # fmt: skip
def test_what_fills_the_pool(run: Run, monkeypatch: pytest.MonkeyPatch, source: Any, features: Any) -> None:
    """By cosine the first two; by attribution three of the five best, as three a layer times one layer allow."""
    context = context_of(run, config(pool=source, k0=3), suite=OneLayer())
    computed: list[Any] = []

    def cosine(suite: Any, vector: Any, k0: int) -> Pool:
        assert (suite, k0) == (context.suite, 3)
        assert vector.tolist() == pytest.approx([0.6, 0.8])
        computed.append("cosine")
        return Pool(features=POOL[:2], cosines=(0.9, 0.8))

    def given(suite: Any, vector: Any, wanted: Any) -> Pool:
        assert suite is context.suite
        assert vector.tolist() == pytest.approx([0.6, 0.8])
        return Pool(features=tuple(wanted), cosines=(0.5,) * len(wanted))

    def dictionary(_self: Any, harmful: PromptSet, *, falling: bool = False, **_: Any) -> DictionaryAttribution:
        assert (harmful.ids, falling) == (FOUND.clean.used("selection").harmful.ids, True)
        return DictionaryAttribution((), one_set(POOL[1], POOL[4], POOL[3], POOL[2], POOL[0]))

    monkeypatch.setattr(selection, "cosine_pool", cosine)
    monkeypatch.setattr(selection, "pool_of", given)
    monkeypatch.setattr(Attributor, "dictionary", dictionary)
    pool = pipeline.make_pool(context, FOUND.clean, FOUND.direction)
    assert pool.features == features
    assert pipeline.make_pool(context, FOUND.clean, FOUND.direction) == pool
    assert len(computed) <= 1
    if source == "cosine":
        pipeline.make_pool(context, FOUND.clean, replace(FOUND.direction, difference=torch.tensor([6.0, 8.0])))
        assert len(computed) == 2


class OneLayer(NoSaes):
    layers: Any = (0,)


@pytest.fixture(name="asked")
def attributor(run: Run, model: ChatModel) -> Attributor:
    direction = replace(FOUND.direction, difference=torch.ones(64), harmless_mean=torch.zeros(4, 64))
    return Attributor(context_of(run, config(k=3, steps=7), model=model), FOUND.clean, direction)


def of(asked: Attributor, **changes: Any) -> Attributor:
    """The same with other settings."""
    work: Any = asked.work
    context = context_of(work.run, asked.work.config.model_copy(update=changes), model=work.model)
    return replace(asked, work=context)


@pytest.mark.parametrize(("estimator", "method"), [("gradient", "exact"), ("ig", "ig"), ("paper", "gradient")])
def test_every_method_is_asked_the_same_of_the_pool(
    asked: Attributor, monkeypatch: pytest.MonkeyPatch, estimator: Any, method: Any
) -> None:
    mine, harmful = of(asked, estimator=estimator), prompt_set("selection-harmful", 3)
    calls: list[Any] = []

    def batches(model: Any, suite: Any, items: Any, pool: Pool, **given: Any) -> Iterator[Any]:
        calls.append(given)
        assert (model, suite, pool) == (mine.work.model, mine.work.suite, FOUND.pool)
        assert [item.prompt_id for item in items] == list(harmful.ids)
        assert given["patch"].id == mine.direction.ablate().id
        assert given["metric"].refusal_ids == (1,)
        # The rule for the target is that of the study's own estimator, whichever is asked.
        assert given["metric"].allow_refusal_target == (estimator == "paper")
        assert (given["method"], given["steps"], given["scoring"]) == (method, 7, SCORED)
        for prompt in harmful.ids:
            if given["take"]([prompt]):
                yield attribution(row(prompt, 1.0, *[float(prompt[-1])] * 5))

    monkeypatch.setattr(pipeline, "attribute_batches", batches)
    got = mine.pool(FOUND.pool, method, harmful)
    assert got.features == POOL
    assert [each.prompt_id for each in got.rows] == list(harmful.ids)
    assert got.totals[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert (got.spec.method, got.spec.refusal_ids, got.spec.patch) == (method, (1,), mine.direction.ablate().id)
    assert got.spec.allow_refusal_target == (estimator == "paper")
    assert got.steps == (7 if method == "ig" else 1)
    # The same again computes nothing; other prompts, another pool or another question do.
    assert mine.pool(FOUND.pool, method, harmful).rows == got.rows
    assert len(calls) == 1
    steps: Any = mine.work
    assert (f"attribution: {method}", 3, 3) in steps.steps


def test_what_an_attribution_depends_on_is_asked_anew(asked: Attributor, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def batches(_model: Any, _suite: Any, items: Any, *_: Any, take: Any, **__: Any) -> Iterator[Any]:
        computed.append("pool")
        for item in items:
            take([item.prompt_id])
            yield attribution(row(item.prompt_id, 1.0, *[1.0] * 5))

    def dictionary(*_: Any, **__: Any) -> DictionaryAttribution:
        computed.append("dictionary")
        return DictionaryAttribution((), one_set(POOL[0]))

    monkeypatch.setattr(pipeline, "attribute_batches", batches)
    monkeypatch.setattr(selection, "attribute_dictionary", dictionary)
    harmful, other = prompt_set("selection-harmful", 2), prompt_set("tuning-harmful", 2)
    half = Pool(features=POOL[::-1], cosines=(0.0,) * 5)
    for n, ask in enumerate(
        (
            lambda: asked.pool(FOUND.pool, "gradient", harmful),
            lambda: asked.pool(FOUND.pool, "gradient", other),
            lambda: asked.pool(half, "gradient", harmful),
            lambda: asked.pool(FOUND.pool, "ig", harmful),
            lambda: asked.dictionary(harmful),
            lambda: asked.dictionary(other),
            lambda: asked.dictionary(harmful, falling=True),
            lambda: asked.dictionary(harmful, to_zero=True),
            lambda: asked.dictionary(harmful, scoring=ScoredTokens(regions=(Region.INSTRUCTION,))),
            lambda: of(asked, k=9).dictionary(harmful),
            lambda: of(asked, estimator="paper").dictionary(harmful),
        ),
        1,
    ):
        ask()
        assert len(computed) == n
        ask()
        assert len(computed) == n


@pytest.mark.parametrize(("k", "k0", "top"), [(3, 2, 4), (7, 2, 7)])
def test_whole_dictionaries_give_as_many_as_can_be_asked_for(
    asked: Attributor, monkeypatch: pytest.MonkeyPatch, k: int, k0: int, top: int
) -> None:
    harmful, given = prompt_set("selection-harmful", 2), dict[str, Any]()
    best = DictionaryAttribution((FeatureSet(features=POOL[:1], scores=(1.0,), scope="local", method="m",
                                  prompt_id="a"),), one_set(POOL[0]))  # fmt: skip

    def attribute(model: Any, suite: Any, items: Any, **options: Any) -> DictionaryAttribution:
        given.update(options, model=model, suite=suite, ids=[item.prompt_id for item in items])
        options["progress"](1, 2)
        return best

    monkeypatch.setattr(selection, "attribute_dictionary", attribute)
    mine, words = of(asked, k=k, k0=k0, estimator="paper"), ScoredTokens(regions=(Region.INSTRUCTION,))
    assert mine.dictionary(harmful, to_zero=True, scoring=words) == best
    assert (given["top"], given["falling"], given["to_zero"], given["scoring"]) == (top, False, True, words)
    assert (given["model"], given["suite"], given["ids"]) == (mine.work.model, mine.work.suite, list(harmful.ids))
    assert (given["method"], given["steps"], given["metric"].allow_refusal_target) == ("paper", 7, True)
    assert given["patch"].id == mine.direction.ablate().id
    steps: Any = mine.work
    assert ("attribution: all features", 1, 2) in steps.steps


def test_each_feature_of_f_star_has_its_own_numbers(
    run: Run, model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(run, config(), model=model)
    mine = replace(FOUND, chosen=FeatureSet(features=(POOL[2], POOL[0]), scores=(2.0, 1.0), scope="global", method="m"))
    used, asked = mine.clean.used("selection"), list[Any]()

    def means(model: Any, suite: Any, items: Any, features: Any, reduces: Any) -> dict[str, torch.Tensor]:
        assert (model, suite, features) == (context.model, context.suite, mine.chosen.features)
        asked.append((tuple(item.prompt_id for item in items), tuple(reduces)))
        first = len(asked) == 1
        return {name: torch.tensor([0.5, 0.25]) * (10 if name == "max" else 1 if first else 0.5) for name in reduces}

    monkeypatch.setattr(pipeline, "feature_means", means)
    exact = attribution(row("a", 1.0, 1, 2, 8, 4, 5), row("b", 1.0, 3, 2, 0, 4, 5))
    first, second = pipeline.feature_rows(context, mine, exact)
    assert asked == [(used.harmful.ids, ("rate", "max")), (used.harmless.ids, ("rate",))]
    # Exact effects are means over prompts and over the two scored tokens of each.
    assert (first.feature, first.score, first.cosine, first.exact) == (POOL[2], 2.0, 0.3, 2.0)
    assert (first.rate_harmful, first.rate_harmless, first.max_harmful) == (0.5, 0.25, 5.0)
    assert (second.feature, second.score, second.cosine, second.exact) == (POOL[0], 1.0, 0.5, 1.0)
    assert (second.rate_harmful, second.rate_harmless, second.max_harmful) == (0.25, 0.125, 2.5)
    assert [each.exact for each in pipeline.feature_rows(context, mine, None)] == [None, None]
    assert len(asked) == 2


# -- estimators --------------------------------------------------------------------------------------------------------


def scores(method: str, steps: int, *rows: Any) -> Any:
    made = attribution(*rows)
    return replace(made, spec=made.spec.model_copy(update={"method": method, "steps": steps}))


def test_estimators_are_held_against_exact_patching(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = scores("exact", 1, row("a", 1.0, 1, 2, 3, 4, 5), row("b", 1.0, 5, 3, 1, 2, 4))
    rows = (row("a", 4.0, 1, 2, 3, 4, 5), row("b", -2.0, 1, 3, 5, 4, 2))
    # Of 4 and -2 logits 3 and -3 are explained.
    rows = tuple(each.model_copy(update={"explained": e}) for each, e in zip(rows, (3.0, -3.0), strict=True))
    flat = (row("a", 0.0, 1, 1, 1, 1, 1), row("b", 0.0, 2, 2, 2, 2, 2))
    by = {"exact": truth, "gradient": scores("gradient", 1, *rows), "ig": scores("ig", 7, rows[0], flat[1]),
          "paper": scores("paper", 7, *flat)}  # fmt: skip
    asked: list[Any] = []

    def pool(self: Attributor, pool: Pool, method: str, refused: PromptSet) -> Any:
        assert (self.clean, self.direction, pool) == (FOUND.clean, FOUND.direction, FOUND.pool)
        asked.append((method, refused.ids))
        return by[method]

    monkeypatch.setattr(Attributor, "pool", pool)
    context, refused = context_of(run, config(estimator="ig")), prompt_set("test-harmful", 2)
    (gradient, ig, paper), exact = pipeline.compare_estimators(context, FOUND, refused)
    assert exact is truth
    assert asked == [(method, refused.ids) for method in ("exact", "gradient", "ig", "paper")]
    assert [(each.method, each.steps, each.n, each.used) for each in (gradient, ig, paper)] == [
        ("gradient", 1, 2, False), ("ig", 7, 2, True), ("paper", 7, 2, False),
    ]  # fmt: skip
    guess, exactly = by["gradient"].totals.numpy(), truth.totals.numpy()
    assert gradient.spearman == spearman_over_prompts(guess, exactly)
    # 1 on the first prompt; on the second the ranks differ by 4, 0, 4, 2, 2: 1 - 6 · 40 / 120.
    assert gradient.spearman_prompt == pytest.approx((1 - 1) / 2)
    assert (gradient.gap, gradient.gap_relative) == (pytest.approx(1.0), pytest.approx(1.0 / 3))
    # A prompt on which every feature scores the same has no order.
    assert ig.spearman_prompt == pytest.approx(1.0)
    assert math.isnan(paper.spearman_prompt)
    assert (paper.gap, math.isnan(paper.gap_relative)) == (0.0, True)
    assert context.warnings == []


@pytest.mark.parametrize(("n_exact", "warned"), [(1, True), (0, False)])
def test_without_a_refused_prompt_nothing_is_patched(run: Run, n_exact: int, warned: bool) -> None:
    context = context_of(run, config(n_exact=n_exact))
    assert pipeline.compare_estimators(context, FOUND, prompt_set("test-harmful", 0)) == ((), None)
    assert ["could be patched exactly" in each for each in context.warnings] == [True] * warned
