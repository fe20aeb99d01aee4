"""What a running study works with: stages with keys, drafts, warnings, seconds, and what every result says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from scripted import CLEAN, ByHand, NoModel, NoSaes, context_of, judged, prompt_set, prompts_of

from demur.errors import InputError
from demur.judges import CoherentJudge, Judge, Reading
from demur.method.interventions import ScaleFeatures
from demur.model import ChatModel
from demur.runs import Run, read_run
from demur.studies import context as module
from demur.studies.base import Study, StudyResult
from demur.studies.config import FindConfig
from demur.studies.context import Context, JudgedAnswers, open_context, run_study
from demur.studies.inputs import Inputs
from demur.types import Answer, FeatureId, Outcome, PromptSet, Split, Splits, Verdict

# -- judged answers ----------------------------------------------------------------------------------------------------


def test_answers_are_counted_by_what_they_are() -> None:
    answers = judged("YNPX?", prompt_set("x-harmful", 5))
    assert answers.refused == (False, True, True, False, None)
    assert answers.complied == (True, False, False, False, None)
    assert answers.incoherent == (False, False, False, True, None)
    assert answers.has(Outcome.REFUSAL, Outcome.INCOHERENT) == (False, True, False, True, None)
    assert (answers.refusal.value, answers.refusal.n, answers.refusal.unscored) == (0.5, 4, 1)
    assert (answers.compliance.value, answers.compliance.n) == (0.25, 4)
    assert [each.text for each in answers.where(Outcome.COMPLIANCE, Outcome.INCOHERENT)] == ["Y", "X"]
    assert answers.only(Outcome.REFUSAL, Outcome.COMPLIANCE).ids == ("x-harmful-0", "x-harmful-1")
    other = judged("YYPNX", prompt_set("x-harmful", 5))
    assert answers.matches(other) == (True, False, True, False, False)
    joined = JudgedAnswers.joined([answers, judged("NY", prompt_set("y-harmful", 2))])
    assert [each.text for each in joined.answers] == list("YNPX?NY")
    assert joined.refused == (False, True, True, False, None, True, False)


# -- answers -----------------------------------------------------------------------------------------------------------


def workspace(run: Run, truth: Any, **options: Any) -> Context[Any]:
    """A context whose answers are the planted model's own."""
    model = ChatModel(truth.model, truth.tokenizer, name="planted")
    config = FindConfig.model_validate({"max_new_tokens": 4, **options})
    scripted = context_of(run, config, model=model, suite=truth.suite)
    made = Context(config, scripted.inputs, run, scripted.progress, study="study")
    made.steps = scripted.steps  # pyright: ignore[reportAttributeAccessIssue]
    return made


OFF = (ScaleFeatures((FeatureId(0, 1),), 0.0),)


def test_answers_are_written_once_in_the_order_of_their_prompts(
    run: Run, truth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, calls = workspace(run, truth), list[Any]()
    prompts = PromptSet(name="asked", prompts=truth.harmful.prompts[:3])

    def batches(model: Any, asked: Any, compiled: Any, *, max_new_tokens: int, drafts: Any, take: Any) -> Any:
        assert (model, max_new_tokens) == (work.model, work.config.max_new_tokens)
        calls.append((compiled.interventions, {text: list(each) for text, each in drafts.items()}))
        for batch in (asked[2:], asked[:2]):
            if take([prompt.id for prompt in batch]):
                n = "N" if compiled.interventions else "Y"
                yield [Answer(prompt=p, text=n, finished=p.id != asked[0].id) for p in batch]

    monkeypatch.setattr(module, "answer_batches", batches)
    clean = work.answer("told", prompts)
    assert [(each.prompt, each.text, each.finished, each.intervention) for each in clean.answers] == [
        (prompt, "Y", n > 0, "none") for n, prompt in enumerate(prompts)
    ]
    assert clean.complied == (True, True, True)
    steps: Any = work
    assert ("told", 3, 3) in steps.steps
    changed = work.answer("told", prompts, OFF)
    assert {each.intervention for each in changed.answers} == {OFF[0].id}
    assert changed.refused == (True, True, True)
    # What the same prompts were answered before is the draft of what they are answered now.
    yes, no = (tuple(work.model.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in "YN")
    assert calls[0] == ((), {})
    assert calls[1] == (OFF, {prompt.text: [yes] for prompt in prompts})
    # Known: nothing is written, and the latest draft is last, each once.
    assert work.answer("told", prompts) == clean
    assert len(calls) == 2
    more = (ScaleFeatures((FeatureId(0, 1),), 0.5),)
    work.answer("told", prompts, more)
    assert calls[2][1] == {prompt.text: [no, yes] for prompt in prompts}
    # Other prompts, or longer answers, are other answers.
    work.answer("told", PromptSet(name="asked", prompts=prompts.prompts[:2]))
    work.config = work.config.model_copy(update={"max_new_tokens": 5})
    work.answer("told", prompts)
    assert len(calls) == 5
    assert work.answer("told", PromptSet(name="none", prompts=())).answers == ()


def test_a_resumed_run_keeps_its_batch_sizes(run: Run, truth: Any) -> None:
    first, second = workspace(run, truth), workspace(run, truth)
    prompts = PromptSet(name="none", prompts=())
    first.model.budgets = first.model.budgets.__class__(111, 77)
    first.answer("told", prompts)
    second.model.budgets = second.model.budgets.__class__(999, 888)
    second.answer("told", prompts)
    assert (second.model.budgets.plain, second.model.budgets.gradients) == (111, 77)
    limited = workspace(run, truth, max_batch_tokens=50)
    limited.model.budgets = limited.model.budgets.__class__(50, 40)
    limited.answer("told", prompts)
    assert limited.model.budgets.plain == 50


def test_a_stage_s_key_names_model_saes_and_change(run: Run) -> None:
    context = context_of(run, FindConfig())
    assert context.depends == {"model": {"model": "none"}, "saes": "none"}
    # Without a change no SAE counts.
    assert context.under(()) == {"model": {"model": "none"}, "saes": None, "intervention": "none"}
    assert context.under(OFF) == {"model": {"model": "none"}, "saes": "none", "intervention": OFF[0].id}
    made: list[int] = []

    def value(depends: dict[str, Any], on: Any = context, label: str = "") -> int:
        return on.cached("value", depends, int, lambda: made.append(1) or len(made), label)

    assert (value({"a": 1}), value({"a": 1}), value({"a": 2}, label="told")) == (1, 1, 2)
    assert context.cached("value", {"a": 1}, int, lambda: 9) == 1
    assert context.cached("value", {"a": 4}, int, lambda: 9) == 9
    assert context.steps == [("told", 0, 1), ("told", 1, 1)]

    class Others(NoSaes):
        identity: Any = "others"

    other = context.on(replace(context.inputs, suite=Others()))
    other.identity = context.identity
    assert value({"a": 1}, other) == 3


# -- warnings, seconds, other settings ---------------------------------------------------------------------------------


def test_a_doubt_is_noted_once_and_seconds_add_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(run, FindConfig())
    for text in ("one", "two", "one"):
        context.warn(text)
    assert context.warnings == ["one", "two"]
    clock = iter([10.0, 12.5, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    for name in ("a", "b", "a"):
        with context.timed(name):
            pass
    assert context.seconds == {"a": 6.5, "b": 1.0}


def test_what_is_only_tried_leaves_no_trace(run: Run) -> None:
    context = context_of(run, FindConfig(k=3))
    context.warn("mine")
    trying = context.trying(k=9, k0=2)
    trying.warn("theirs")
    with trying.timed("theirs"):
        pass
    assert (trying.config.k, trying.config.k0, context.config.k) == (9, 2, 3)
    assert (trying.warnings, context.warnings, context.seconds) == (["theirs"], ["mine"], {})
    assert (trying.inputs, trying.run) == (context.inputs, context.run)
    inputs = replace(context.inputs, suite=NoSaes())
    beside = context.on(inputs)
    beside.warn("beside")
    with beside.timed("beside"):
        pass
    assert (beside.inputs, beside.config, beside.run) == (inputs, context.config, context.run)
    assert beside.progress is context.progress
    # Its warnings are its own, its seconds the study's.
    assert (context.warnings, list(context.seconds)) == (["mine"], ["beside"])


# -- coherence ---------------------------------------------------------------------------------------------------------


class Blind(ByHand):
    kind: ClassVar[str] = "blind"
    knows_incoherence: ClassVar[bool] = False


class Paid(Blind):
    kind: ClassVar[str] = "paid"
    costly: ClassVar[bool] = True


class Coherence(CoherentJudge):
    """Made by hand; as cheap as the judge that it wraps."""

    costly: ClassVar[bool] = False

    def __init__(self) -> None:
        rate = SimpleNamespace(value=0.04, low=0.01, high=0.12, n=50)
        self.coherence: Any = SimpleNamespace(worst_run=2.25, false_positives=rate)

    @property
    def name(self) -> str:
        return "coherent"

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "coherent"}

    def stream(self, answers: Sequence[Answer]) -> Iterator[Reading]:
        for n in range(len(answers)):
            yield Reading(n, Verdict(outcome=Outcome.INCOHERENT, judge="coherent"), True)


@pytest.mark.parametrize(("judge", "watched"), [(ByHand(), False), (Paid(), False), (Blind(), True)])
def test_coherence_is_watched_where_the_judge_does_not_know_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, judge: Judge, watched: bool
) -> None:
    context = context_of(run, FindConfig())
    context.inputs = replace(context.inputs, judge=judge)
    clean, made = judged("YN", prompt_set("x-harmful", 2)).answers, list[Any]()
    monkeypatch.setattr(CoherentJudge, "of", lambda *given: made.append(given) or Coherence())
    context.watch_coherence(clean)
    assert made == ([(judge, context.model, clean)] if watched else [])
    assert isinstance(context.judging.reader, CoherentJudge) == watched
    if watched:
        assert context.judging.judge(clean).verdicts[0].outcome == Outcome.INCOHERENT
        # Its verdicts cost forward passes, so they are kept.
        again = context_of(run, FindConfig())
        again.inputs = context.inputs
        again.watch_coherence(clean)
        again.judging.judge(clean)
        assert (again.judging.new, again.judging.cached) == (0, 2)


def test_too_few_answers_for_coherence_are_a_doubt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*_: Any) -> Any:
        raise InputError("too few")

    context = context_of(run, FindConfig())
    context.inputs = replace(context.inputs, judge=Blind())
    monkeypatch.setattr(CoherentJudge, "of", of)
    context.watch_coherence(())
    assert context.warnings == ["answers were not checked for coherence by their likelihood: too few"]
    assert context.judging.reader is context.inputs.judge


# -- what every result says --------------------------------------------------------------------------------------------


class Told(StudyResult):
    answer: int = 0


def spec(layer: int, level: float | None, d_sae: int = 1000) -> Any:
    return SimpleNamespace(layer=layer, average_l0=level, d_sae=d_sae, activation="jumprelu", reads="resid_post",
                           source=f"layer {layer}", identity=f"id {layer}")  # fmt: skip


class Described(NoSaes):
    specs: Any = (spec(0, 50.0), spec(1, None), spec(2, 71.0))
    layers: Any = (0, 1, 2)
    source: Any = "saes"


class Small(NoModel):
    dtype: Any = "torch.float16"
    hf: Any = object()
    n_layers: Any = 3
    d_model: Any = 64
    n_parameters: Any = 1_234_567_890


def described(run: Run) -> Context[Any]:
    scripted = context_of(run, FindConfig(), model=Small(), suite=Described())
    inputs = replace(scripted.inputs, title="chat", saes_title="the SAEs")
    return Context(scripted.config, inputs, run, scripted.progress, study="told")


def test_the_facts_of_a_result(run: Run) -> None:
    context = described(run)
    assert context.facts == {
        "model": "chat: object, 3 layers of 64, 1,234.6 M parameters, float16 on cpu",
        "SAEs": "the SAEs: 3 layers of 1,000 features, jumprelu, average L0 60",
        "judge": "by-hand",
        "prompts (harmful + harmless)": "direction 3 + 3, selection 3 + 3, tuning 4 + 4, test 6 + 7",
    }
    context.judging = module.CachedJudge(run, Coherence())
    assert context.facts["judge"] == (
        "coherent; incoherent beyond 2.2 nats per token under the clean model, which calls 4% [1%–12%] of 50 clean "
        "answers incoherent"
    )
    suite: Any = context.suite
    suite.specs = (spec(0, None),)
    assert context.facts["SAEs"] == "the SAEs: 3 layers of 1,000 features, jumprelu"


def test_a_result_is_completed_with_doubts_each_once_and_its_own_facts_first(run: Run) -> None:
    context = described(run)
    context.warn("late")
    context.warn("early")
    context.seconds["a"] = 2.0
    done = context.completed(Told(answer=7, warnings=("early", "first"), facts={"judge": "another", "more": "1"}))
    assert (done.answer, done.study, done.model, done.seconds) == (7, "told", "chat", {"a": 2.0})
    assert done.warnings == ("early", "first", "late")
    assert (done.facts["judge"], done.facts["more"], done.facts["model"]) == ("another", "1", context.facts["model"])


class Failing(ByHand):
    kind: ClassVar[str] = "failing"

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        raise InputError(f"not today, nor {len(answers)} times")


def test_a_judge_that_failed_is_a_doubt(run: Run) -> None:
    context = described(run)
    context.inputs = replace(context.inputs, judge=Failing())
    context.judging.judge(judged("Y", prompt_set("x-harmful", 1)).answers)
    (warning,) = context.completed(Told()).warnings
    assert "not today" in warning


# -- runs --------------------------------------------------------------------------------------------------------------


def loaded(judge: Judge | None = None, warnings: tuple[str, ...] = ()) -> Inputs:
    prompts = prompts_of(CLEAN)
    sides: dict[str, Any] = {
        name: Split(harmful=prompts[f"{name}-harmful"], harmless=prompts[f"{name}-harmless"])
        for name in ("direction", "selection", "tuning", "test")
    }
    return Inputs("chat", "the SAEs", Small(), Described(), Splits(**sides), judge or ByHand(), warnings)


class Closing(ByHand):
    closed: ClassVar[list[str]] = []

    def close(self) -> None:
        self.closed.append("closed")


def study(run: Any, name: str = "told", **given: Any) -> Study[Any, Any]:
    return Study(name, FindConfig, Told, run, lambda _: (), **given)


@pytest.fixture(name="identified")
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "model_identity", lambda model: {"weights": type(model).__name__})


@pytest.mark.usefixtures("identified")
def test_a_study_writes_its_result_and_records_what_it_worked_on(tmp_path: Path) -> None:
    steps: list[Any] = []

    def work(context: Context[Any]) -> Told:
        context.progress("working", 1, 2)
        context.warn("a doubt")
        return Told(answer=context.config.k)

    Closing.closed.clear()
    inputs = loaded(Closing(), ("from loading",))
    done = run_study(study(work), FindConfig(k=4, seed=6), tmp_path / "run", inputs=inputs,
                     progress=lambda *step: steps.append(step))  # fmt: skip
    assert (done.answer, done.warnings, done.study) == (4, ("from loading", "a doubt"), "told")
    assert steps == [("working", 1, 2)]
    assert Told.model_validate_json((tmp_path / "run" / "told.json").read_bytes()) == done
    session = read_run(tmp_path / "run").manifest.latest
    prompts = prompts_of(CLEAN)
    assert session.inputs == {
        f"{purpose}/{label}": prompts[f"{purpose}-{label}"].digest
        for purpose in ("direction", "selection", "tuning", "test")
        for label in ("harmful", "harmless")
    }
    assert session.identities == {
        "model": {"weights": "Small"}, "saes": {f"layer {n}": f"id {n}" for n in range(3)}, "before": {},
    }  # fmt: skip
    assert (session.command, session.seeds, session.finished is not None) == ("told", {"told": 6}, True)
    assert Closing.closed == ["closed"]


@pytest.mark.usefixtures("identified")
def test_a_study_that_fails_frees_its_judge_and_writes_no_result(tmp_path: Path) -> None:
    def work(_context: Context[Any]) -> Told:
        raise InputError("no")

    Closing.closed.clear()
    with pytest.raises(InputError, match="no"):
        run_study(study(work), FindConfig(), tmp_path / "run", inputs=loaded(Closing()))
    assert Closing.closed == ["closed"]
    assert not (tmp_path / "run" / "told.json").exists()
    assert read_run(tmp_path / "run").manifest.latest.finished is None


@pytest.mark.usefixtures("identified")
def test_inputs_are_loaded_where_none_are_given_and_checkpoints_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []

    class Base(Small): ...

    before = loaded()
    inputs = replace(loaded(), before={"base": replace(before, model=Base())})
    asked: list[Any] = []

    def load(config: Any, check: Any) -> Inputs:
        asked.append(config.k)
        check(inputs.suite)
        return inputs

    monkeypatch.setattr(module, "load_inputs", load)
    told = study(lambda _: Told())
    with open_context(told, FindConfig(k=5), tmp_path / "run", progress=lambda *each: steps.append(each)) as context:
        assert (context.inputs, context.study, context.warnings) == (inputs, "told", [])
    assert asked == [5]
    assert steps == [("loading", 0, 1), ("loading", 1, 1)]
    assert read_run(tmp_path / "run").manifest.latest.identities["before"] == {"base": {"weights": "Base"}}
    with open_context(told, FindConfig(), tmp_path / "silent") as context:
        context.progress("nobody listens", 0, 1)


@pytest.mark.usefixtures("identified")
def test_saes_that_do_not_fit_the_study_are_refused(tmp_path: Path) -> None:
    inputs = loaded()
    suite: Any = inputs.suite
    suite.specs = (SimpleNamespace(**{**vars(spec(0, None)), "reads": "mlp_in"}),)
    with (
        pytest.raises(InputError, match="needs SAEs of the residual stream: it splices them"),
        open_context(study(lambda _: Told(), residual="it splices them"), FindConfig(), tmp_path / "run", inputs),
    ):
        pass
