"""What is measured beside refusal, by hand: which answers and texts count, how they are weighted, what is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scripted import CLEAN, POOL, NoModel, Scripted, context_of, judged, prompt_set

from demur.bundled import bundled_prompts
from demur.capability import CapabilityRow
from demur.errors import InputError
from demur.method import likelihood
from demur.method.interventions import ScaleFeatures
from demur.method.likelihood import AnswerEffect, TokenLoss
from demur.model import ChatModel, Region, TokenizedPrompt
from demur.runs import Run
from demur.stats import auroc, bootstrap_mean, wilson
from demur.studies.config import CostOptions, FindConfig, OverRefusalOptions, SideEffectOptions
from demur.studies.side_effects import QUESTION, SideEffectMeter, SideInputs, over_refusal_prompts
from demur.types import Answer, PromptSet


@pytest.fixture(name="context")
def planted_context(run: Run, truth: Any) -> Scripted:
    model = ChatModel(truth.model, truth.tokenizer, name="planted")
    return context_of(run, NAMED, model=model, suite=truth.suite)


NAMED = FindConfig.model_validate({"model": "m", "harmful": "x", "harmless": "y", "seed": 3})
BUNDLED = FindConfig(seed=3)


# -- inputs ------------------------------------------------------------------------------------------------------------


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def test_over_refusal_prompts_that_chose_something_are_left_out(run: Run, tmp_path: Path) -> None:
    used = ["Direction-HARMLESS  0", "selection-harmful 1", "tuning-harmless 2"]
    path = lines(tmp_path / "over.txt", [*used, "test-harmless 1", "kill a process", "shoot a photo"])
    context = context_of(run, NAMED)
    found = over_refusal_prompts(OverRefusalOptions.model_validate({"over_refusal": path}), context)
    assert found is not None
    assert found.texts == ("test-harmless 1", "kill a process", "shoot a photo")
    assert {prompt.label for prompt in found} == {"harmless"}
    alone = OverRefusalOptions.model_validate({"over_refusal": lines(tmp_path / "used.txt", used)})
    with pytest.raises(InputError, match="every prompt of --over-refusal"):
        over_refusal_prompts(alone, context)


def test_over_refusal_prompts_are_a_sample_by_the_seed(run: Run, tmp_path: Path) -> None:
    """Such sets are sorted by kind, so the first rows would be of one kind."""
    texts = [f"prompt {n}" for n in range(40)]
    path = lines(tmp_path / "over.txt", texts)

    def sample(n: int, seed: int = 3) -> tuple[str, ...]:
        config = NAMED.model_copy(update={"seed": seed})
        asked = OverRefusalOptions.model_validate({"over_refusal": path, "n_over_refusal": n})
        found = over_refusal_prompts(asked, context_of(run, config))
        assert found is not None
        return found.texts

    assert len(set(sample(10))) == 10
    assert sample(10) == sample(10) != sample(10, 4)
    assert sample(10) != tuple(texts[:10])
    assert sample(40) == tuple(texts)
    assert len(sample(39)) == 39


def test_only_the_bundled_model_brings_over_refusal_prompts(run: Run) -> None:
    assert over_refusal_prompts(OverRefusalOptions(), context_of(run, NAMED)) is None
    own = over_refusal_prompts(OverRefusalOptions(n_over_refusal=10**6), context_of(run, BUNDLED))
    assert own is not None
    assert own.texts == bundled_prompts().over_refusal.texts


def test_every_source_of_text_has_its_share_and_no_more_is_read(context: Scripted, tmp_path: Path) -> None:
    sources = [lines(tmp_path / f"{name}.txt", [f"{name} {n} steal the car" for n in range(9)]) for name in "ab"]

    def read(**options: Any) -> SideInputs:
        return SideInputs.read(CostOptions.model_validate({"text": sources, **options}), context)

    found = read(n_text=5, text_tokens=4)
    texts = [f"a {n} steal the car" for n in range(3)] + [f"b {n} steal the car" for n in range(2)]
    assert list(found.texts) == likelihood.texts_to_score(context.model, texts, max_tokens=4)
    assert max(len(item) for item in found.texts) == 5
    assert len(read(n_text=4).texts) == 4
    assert len(read(n_text=1).texts) == 1
    assert found.over_refusal is None
    assert SideInputs.read(CostOptions(), context).texts == ()


def test_the_bundled_model_brings_texts_and_tasks_are_looked_up(
    context: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("demur.capability.check_tasks", asked.append)
    mine = context_of(context.run, BUNDLED, model=context.model)
    found = SideInputs.read(CostOptions(n_text=3, tasks=("quiz",), n_over_refusal=2), mine)
    assert len(found.texts) == 3
    assert found.over_refusal is not None
    assert len(found.over_refusal) == 2
    assert asked == [("quiz",)]
    SideInputs.read(CostOptions(n_text=3), mine)
    assert len(asked) == 1


# -- costs -------------------------------------------------------------------------------------------------------------

OFF = (ScaleFeatures(POOL[:1], 0.0),)
NATS: dict[str, tuple[float, float, int, float]] = {
    # Clean and changed loss, tokens, KL.
    "test-harmless-0": (2.0, 4.0, 1, 0.5),
    "test-harmless-3": (3.0, 6.0, 3, 0.25),
    "test-harmless-4": (1.0, 9.0, 0, 0.0),
}


def meter_of(context: Scripted, monkeypatch: pytest.MonkeyPatch, nats: Any = NATS) -> tuple[SideEffectMeter, list[str]]:
    """A meter of five answers of which the first, fourth and fifth count, and what is computed with it."""
    computed: list[str] = []

    def effects(model: Any, items: Any, change: Any, clean: Any) -> list[AnswerEffect]:
        assert model is context.model
        assert list(clean) == [item.prompt_id for item in items] == list(nats)
        place = 1 if change.interventions else 0
        computed.append(f"answers {place}")
        return [
            AnswerEffect(prompt_id=name, nats=nats[name][place], tokens=nats[name][2], kl=place * nats[name][3])
            for name in nats
        ]

    def losses(model: Any, items: Any, change: Any) -> list[TokenLoss]:
        assert model is context.model
        place = 1 if change.interventions else 0
        computed.append(f"texts {place}")
        return [TokenLoss(prompt_id=item.prompt_id, nats=1.0 + 3 * place, tokens=n + 1) for n, item in enumerate(items)]

    monkeypatch.setattr(likelihood, "answer_effects", effects)
    monkeypatch.setattr(likelihood, "token_losses", losses)
    clean = judged("YN?XY", prompt_set("test-harmless", 5))
    texts = tuple(TokenizedPrompt(f"t{n}", (1, 2), (int(Region.SPECIAL), int(Region.RESPONSE))) for n in range(2))
    return SideEffectMeter(context, SideEffectOptions(resamples=300), clean, texts), computed


def test_the_rise_is_per_token_of_the_clean_answers_that_do_not_refuse(
    context: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, computed = meter_of(context, monkeypatch)
    found = meter.measure(OFF)
    # 2 nats more on one token and 3 on three; an answer without a token is unscored.
    assert found.ce_answers.value == pytest.approx(5 / 4)
    assert found.ce_answers == bootstrap_mean([2.0, 1.0, math.nan], [1, 3, 0], resamples=300, seed=3)
    assert found.kl == bootstrap_mean([0.5, 0.25, 0.0], resamples=300, seed=3)
    assert found.ce_text == bootstrap_mean([3.0, 1.5], [1, 2], resamples=300, seed=3)
    assert sorted(computed) == ["answers 0", "answers 1", "texts 0", "texts 1"]
    # Nothing is measured twice, and the clean model costs nothing.
    assert meter.ce_answers(OFF) == found.ce_answers
    assert meter.ce_answers(()).value == 0.0
    assert len(computed) == 4
    meter.texts = ()
    assert meter.measure(OFF).ce_text is None
    meter.ce_answers((ScaleFeatures(POOL[:1], 0.5),))
    assert len(computed) == 5


def test_answers_and_texts_are_their_own_stages(context: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same change on other answers is another measurement."""
    meter, computed = meter_of(context, monkeypatch)
    meter.ce_answers(OFF)
    other, again = meter_of(context, monkeypatch)
    other.clean = judged("yN?XY", prompt_set("test-harmless", 5))
    other.ce_answers(OFF)
    assert (len(computed), len(again)) == (2, 2)


def test_an_empty_answer_is_not_scored(context: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: NATS[name] for name in ("test-harmless-0", "test-harmless-3")}
    meter, _ = meter_of(context, monkeypatch, few)
    answers = list(meter.clean.answers)
    answers[4] = Answer(prompt=answers[4].prompt, text="")
    meter.clean = meter.clean.__class__(tuple(answers), meter.clean.verdicts)
    assert meter.ce_answers(OFF).n == 2


def test_a_loss_without_bound_is_no_small_rise(context: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**NATS, "test-harmless-0": (2.0, math.inf, 1, 0.5)}
    meter, _ = meter_of(context, monkeypatch, broken)
    found = meter.ce_answers(OFF)
    assert (found.value, found.low, found.high, found.n) == (math.inf, math.inf, math.inf, 3)


# -- knowledge ---------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer that knows how words begin."""

    unk_token_id = 0

    def __init__(self, firsts: dict[str, int]) -> None:
        self.firsts = firsts

    def __call__(self, word: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [self.firsts[word], 99]}


class Yes(NoModel):
    """A tokenizer of single words, and prompts as tokens."""

    firsts: Any = None

    def __init__(self, **firsts: int) -> None:
        self.firsts = firsts

    @property
    def tokenizer(self) -> Any:
        return Words(self.firsts)

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None: ...

    def tokenize(self, prompts: Any, **_: Any) -> Any:
        return [TokenizedPrompt(f"{each.id}: {each.text}", (1,), (int(Region.RESPONSE),)) for each in prompts]


def asker(run: Run, suite: Any, monkeypatch: pytest.MonkeyPatch, odds: dict[str, list[float]], **firsts: int) -> Any:
    asked: list[Any] = []

    def preference(_model: Any, items: Any, *, first: Any, second: Any, change: Any) -> list[float]:
        asked.append((list(first), list(second), [item.prompt_id for item in items], len(change.interventions)))
        return odds["harmful" if "-harmful" in items[0].prompt_id else "harmless"]

    monkeypatch.setattr(likelihood, "preference", preference)
    context = context_of(run, NAMED, model=Yes(**firsts), suite=suite)
    clean = judged(CLEAN["test-harmless"], prompt_set("test-harmless", 7))
    return SideEffectMeter(context, SideEffectOptions(resamples=400), clean), asked


SETS = prompt_set("test-harmful", 3), prompt_set("test-harmless", 4)


def test_the_model_is_asked_whether_requests_are_harmful(run: Run, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    odds = {"harmful": [1.0, 0.0, 2.0], "harmless": [-1.0, 0.5, -2.0, 0.0]}
    # A token that both begin with says nothing, nor does one that is unknown.
    words = {"Yes": 4, "yes": 2, "YES": 3, "No": 7, "no": 2, "NO": 0}
    meter, asked = asker(run, truth.suite, monkeypatch, odds, **words)
    found = meter.knowledge(*SETS, ())
    assert found is not None
    assert (found.says_harmful.value, found.says_harmful.n) == (pytest.approx(2 / 3), 3)
    assert found.says_harmful.low == wilson(2, 3).low
    assert (found.says_harmful_of_harmless.value, found.says_harmful_of_harmless.n) == (0.25, 4)
    assert found.auroc == auroc(odds["harmful"], odds["harmless"], resamples=400, seed=3)
    texts = [f"{p.id}: {QUESTION.format(prompt=p.text)}" for p in SETS[0]]
    assert asked[0] == ([3, 4], [7], texts, 0)
    assert "{prompt}" in QUESTION
    assert len(asked) == 2
    assert meter.says_harmful(SETS[0], ()) == odds["harmful"]
    assert len(asked) == 2


@pytest.mark.parametrize("words", [{"Yes": 1, "yes": 1, "YES": 1, "No": 1, "no": 2, "NO": 2},
                                   {"Yes": 1, "yes": 3, "YES": 3, "No": 1, "no": 1, "NO": 1}])  # fmt: skip
def test_where_yes_and_no_begin_alike_nothing_is_asked(
    run: Run, truth: Any, monkeypatch: pytest.MonkeyPatch, words: dict[str, int]
) -> None:
    meter, asked = asker(run, truth.suite, monkeypatch, {}, **words)
    assert meter.knowledge(*SETS, ()) is None
    assert asked == []


# -- capability --------------------------------------------------------------------------------------------------------


def test_each_task_is_run_once_under_a_change(context: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def measure(model: Any, tasks: list[str], change: Any, *, limit: Any, seed: Any) -> list[CapabilityRow]:
        assert (model, limit, seed) == (context.model, 5, 3)
        asked.append((*tasks, change and len(change.interventions)))
        return [CapabilityRow(
            task=tasks[0], metric=metric, value=0.5, stderr=None, n=2, shots=0, higher_is_better=True, version="1",
            harness="0", digest="d", intervention="x", scores=(1.0, 0.0),
        ) for metric in ("acc", "f1")]  # fmt: skip

    data = {"quiz": "quiz 1", "maze": "maze 1"}
    monkeypatch.setattr("demur.capability.measure_capability", measure)
    monkeypatch.setattr("demur.capability.task_identity", lambda task: data[task])
    options = SideEffectOptions(tasks=("quiz", "maze"), task_limit=5)
    meter = SideEffectMeter(context, options, judged("Y", PromptSet(name="x", prompts=prompt_set("x", 1).prompts)))
    got = meter.capability(OFF)
    assert [(row.task, row.metric) for row in got] == [(t, m) for t in ("quiz", "maze") for m in ("acc", "f1")]
    assert asked == [("quiz", 1), ("maze", 1)]
    assert context.steps == [(f"capability: {task}", n, 1) for task in ("quiz", "maze") for n in (0, 1)]
    assert meter.capability(OFF) == got
    assert len(asked) == 2
    meter.capability(())
    assert asked[2:] == [("quiz", None), ("maze", None)]
    # Other questions under the same name.
    data["quiz"] = "quiz 2"
    meter.capability(OFF)
    assert asked[4:] == [("quiz", 1)]
