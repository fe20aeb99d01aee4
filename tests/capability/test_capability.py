"""Capability through lm-evaluation-harness: its own numbers clean, those made by hand under intervention."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import capability_tasks as task_files
import numpy as np
import pytest
import torch

from demur.capability import (
    CapabilityRow,
    capability_change,
    check_tasks,
    measure_capability,
    task_identity,
)
from demur.errors import InputError, ModelError
from demur.method.interventions import AblateDirection, Compiled, Intervention, PerPrompt, ScaleFeatures, SetFeatures
from demur.model import PINNED_DATE, ChatModel, Region, TokenizedPrompt, count_hooks
from demur.saes import load_suite
from demur.testing import FAMILIES, Family, save_tiny, tiny_suite
from demur.types import FeatureId, Prompt

pytestmark = pytest.mark.eval

NEW = 5
GIVEN = [
    ("Tell me how", " to bake bread for a friend."),
    ("A train that is always late", ": read the plan twice, then begin."),
    ("Hi", " three"),
    ("Explain the best way to clean a window, and why it works,", " in one sentence"),
]
ASKED = ["Tell me how to plan", "Write a short story about a window and a guitar", "Hi", "Give me a list"]

_MODELS: dict[str, tuple[Path, ChatModel]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capability")


def stored(family: Family, folder: Path) -> tuple[Path, ChatModel]:
    if family not in _MODELS:
        path = save_tiny(family, folder / family)
        _MODELS[family] = path, ChatModel.load(path)
    return _MODELS[family]


def intervened(model: ChatModel) -> Compiled:
    suite = tiny_suite(model.hf, d_sae=24)
    features = tuple(FeatureId(layer, index) for layer in range(model.n_layers) for index in (1, 5, 9))
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    changes: list[Intervention] = [ScaleFeatures(features, -2.0), SetFeatures((FeatureId(2, 7),), 3.0)]
    return Compiled(model, suite, [*changes, AblateDirection(vector)])


@pytest.fixture(autouse=True)
def _fast_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    # It asks pip, git and the compiler for their versions at the end of each run.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def same_as_own_run(
    rows: Sequence[CapabilityRow],
    path: Path,
    tasks: Sequence[Path],
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Compare with the harness by itself: it loads the folder, and nothing of demur takes part.

    One run a task: rows of several would be padded together, and their numbers differ in the last bits.
    """
    harness, manager = import_module("lm_eval"), import_module("lm_eval.tasks").TaskManager
    seen: list[str] = []
    for task in tasks:
        reference = harness.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(path), **(model_args or {})},
            tasks=[str(task)],
            task_manager=manager(include_defaults=False),
            device="cpu",
            bootstrap_iters=1000,
            **options,
        )
        seen += same_numbers(rows, cast("dict[str, Any]", reference))
    assert sorted(seen) == sorted(row.task for row in rows)


def same_numbers(rows: Sequence[CapabilityRow], reference: dict[str, Any]) -> list[str]:
    rows = [row for row in rows if row.task in reference["results"]]
    for row in rows:
        found = reference["results"][row.task]
        assert row.value == found[f"{row.metric},{row.filter}"], row
        stderr = found[f"{row.metric}_stderr,{row.filter}"]
        assert row.stderr == (None if stderr == "N/A" else stderr), row
        assert row.n == reference["n-samples"][row.task]["effective"]
        assert row.shots == reference["n-shot"][row.task]
        samples = [s for s in reference["samples"][row.task] if s["filter"] == row.filter]
        if row.scores:
            assert row.scores == tuple(float(sample[row.metric]) for sample in samples)
    return [row.task for row in rows]


def by_hand(model: ChatModel, text: str, answer: str, compiled: Compiled | None = None) -> float:
    """Log-likelihood (nats) of `answer` after `text`: demur's own teacher-forced pass, one row without padding."""
    start = len(model.tokenizer(text)["input_ids"])
    ids = tuple(model.tokenizer(text + answer)["input_ids"])
    batch = model.batch([TokenizedPrompt("0", ids[:-1], (int(Region.RESPONSE),) * (len(ids) - 1))])
    with torch.inference_mode():
        if compiled is None:
            logits = cast("Any", model.hf)(batch.input_ids).logits[0]
        else:
            with compiled.on(batch):
                logits = cast("Any", model.hf)(batch.input_ids).logits[0]
    scores = logits.float().log_softmax(-1)[start - 1 :]
    return float(scores.gather(1, torch.tensor(ids[start:])[:, None]).sum())


def written(model: ChatModel, text: str, compiled: Compiled | None = None) -> str:
    """Greedy answer, written without a cache, one token a pass."""
    ids = list(model.tokenizer(text)["input_ids"])
    start = len(ids)
    for _ in range(NEW):
        batch = model.batch([TokenizedPrompt("0", tuple(ids), (int(Region.RESPONSE),) * len(ids))])
        with torch.inference_mode():
            if compiled is None:
                token = int(model.last_logits(batch)[0].argmax())
            else:
                with compiled.on(batch):
                    token = int(model.last_logits(batch)[0].argmax())
        if token in model.eos_ids:
            break
        ids.append(token)
    return model.decode(ids[start:])


@pytest.mark.parametrize("family", ["gemma2", "llama3", "qwen3"])
def test_the_clean_model_has_the_harness_own_numbers(family: Family, folder: Path) -> None:
    path, model = stored(family, folder)
    texts = [(text, written(model, text) if n % 2 else "something else") for n, text in enumerate(ASKED)]
    tasks = [
        task_files.multiple_choice(folder / f"own-{family}"),
        task_files.given_answers(folder / f"own-{family}", GIVEN),
        task_files.written_answers(folder / f"own-{family}", texts, NEW),
    ]
    rows = measure_capability(model, tasks, batch_size=2)
    assert [(row.task, row.metric) for row in rows] == [
        ("pick", "acc"),
        ("pick", "acc_norm"),
        ("given", "perplexity"),
        ("write", "exact_match"),
    ]
    same_as_own_run(rows, path, tasks, batch_size=2)
    assert rows[3].value == 0.5
    assert {(row.version, row.intervention) for row in rows} == {("1.5", "none")}


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_examples_and_chat_template_are_the_harness_own(family: Family, folder: Path) -> None:
    path, _ = stored(family, folder)
    model = ChatModel.load(path, system_prompt="You are a friend.")
    tasks = [
        task_files.multiple_choice(folder / f"chat-{family}"),
        task_files.written_answers(folder / f"chat-{family}", [(text, "three") for text in ASKED], NEW),
    ]
    rows = measure_capability(model, tasks, batch_size=2, shots=2, seed=7, chat_template=True, limit=3)
    settings = {"date_string": PINNED_DATE.strftime("%d %b %Y"), "thinking": False}
    same_as_own_run(
        rows,
        path,
        tasks,
        model_args={"enable_thinking": False, "chat_template_args": settings},
        batch_size=2,
        num_fewshot=2,
        apply_chat_template=True,
        system_instruction="You are a friend.",
        fewshot_random_seed=7,
        limit=3,
    )
    assert [row.shots for row in rows] == [2, 2, 2]
    plain = measure_capability(model, tasks, batch_size=2, shots=2, seed=8, chat_template=True, limit=3)
    assert [a.digest == b.digest for a, b in zip(rows, plain, strict=True)] == [False, False, False]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_chat_template_is_filled_as_demur_fills_it(
    family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thinking off, the date pinned, the generation prompt added."""
    _, model = stored(family, folder)
    wrapper = import_module("lm_eval.models.huggingface").HFLM
    fill, filled = wrapper.apply_chat_template, list[str]()

    def recorded(*args: Any, **options: Any) -> str:
        filled.append(fill(*args, **options))
        return filled[-1]

    monkeypatch.setattr(wrapper, "apply_chat_template", recorded)
    task = task_files.written_answers(folder / f"filled-{family}", [("Tell me how", "three")], 1)
    measure_capability(model, [task], chat_template=True)
    assert {*filled} == {model.chat.text("Tell me how")[0]}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_multimodal", "llama3", "qwen3"])
def test_given_answers_are_scored_as_a_teacher_forced_pass_scores_them(family: Family, folder: Path) -> None:
    _, model = stored(family, folder)
    compiled = intervened(model)
    task = task_files.given_answers(folder / f"forced-{family}", GIVEN)
    for change in (None, compiled):
        (row,) = measure_capability(model, [task], change)
        found = -math.log(row.value)
        expected = np.mean([by_hand(model, *each, change) for each in GIVEN])
        assert found == pytest.approx(expected, rel=1e-5)
        assert row.intervention == ("none" if change is None else compiled.id)
    plain, changed = ([by_hand(model, *each, change) for each in GIVEN] for change in (None, compiled))
    assert abs(np.mean(plain) - np.mean(changed)) > 0.1
    # One document, so the number is that document's alone.
    (row,) = measure_capability(model, [task], compiled, limit=1)
    assert row.n == 1
    assert -math.log(row.value) == pytest.approx(by_hand(model, *GIVEN[0], compiled), rel=1e-7)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama3", "qwen3"])
def test_answers_are_written_under_the_intervention(family: Family, folder: Path) -> None:
    """Every token: with the expected answers those of the changed model, it scores 1 and the plain model does not."""
    _, model = stored(family, folder)
    compiled = intervened(model)
    expected = [(text, written(model, text, compiled)) for text in ASKED]
    task = task_files.written_answers(folder / f"written-{family}", expected, NEW)
    (plain,) = measure_capability(model, [task])
    for rows_a_pass in (1, 3):
        (changed,) = measure_capability(model, [task], compiled, batch_size=rows_a_pass)
        assert changed.scores == (1.0,) * len(ASKED)
    assert plain.value < 1.0
    assert plain.digest == changed.digest
    assert capability_change(plain, changed).value == pytest.approx(1.0 - plain.value)


def chat_answers_are_demurs_own(model: ChatModel, compiled: Compiled, texts: Sequence[str], new: int, at: Path) -> None:
    """In the chat template the harness writes, under the intervention, what `demur.model.generate` writes."""
    prompts = [Prompt(id=str(n), text=text, label="harmless") for n, text in enumerate(texts)]
    with model.intervene(compiled):
        changed = list(model.generate(prompts, max_new_tokens=new).texts)
    plain = list(model.generate(prompts, max_new_tokens=new).texts)
    task = task_files.written_answers(at, list(zip(texts, changed, strict=True)), new)
    (row,) = measure_capability(model, [task], compiled, chat_template=True, batch_size=3)
    assert row.scores == (1.0,) * len(texts)
    (row,) = measure_capability(model, [task], chat_template=True, batch_size=3)
    assert row.scores == tuple(float(a == b) for a, b in zip(plain, changed, strict=True))
    assert row.value < 1.0


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama3", "qwen3"])
def test_chat_answers_are_those_of_demurs_own_generation(family: Family, folder: Path) -> None:
    _, model = stored(family, folder)
    chat_answers_are_demurs_own(model, intervened(model), ASKED, NEW, folder / f"generation-{family}")


def test_batched_equals_single(folder: Path) -> None:
    """Scored rows are padded on the right without a mask, written ones on the left with one."""
    _, model = stored("gemma2", folder)
    compiled = intervened(model)
    tasks = [task_files.given_answers(folder / "batched", GIVEN), task_files.multiple_choice(folder / "batched")]
    single = measure_capability(model, tasks, compiled, batch_size=1)
    batched = measure_capability(model, tasks, compiled, batch_size=4)
    for one, two in zip(single, batched, strict=True):
        assert two.value == pytest.approx(one.value, rel=1e-5)
        assert (one.digest, one.n, one.scores) == (two.digest, two.n, two.scores)


def test_a_static_cache_of_the_checkpoint_is_put_aside(folder: Path) -> None:
    _, model = stored("gemma2", folder)
    compiled = intervened(model)
    expected = [(text, written(model, text, compiled)) for text in ASKED]
    task = task_files.written_answers(folder / "static", expected, NEW)
    settings = cast("Any", model.hf.generation_config)
    settings.cache_implementation = "static"
    try:
        (row,) = measure_capability(model, [task], compiled)
        assert settings.cache_implementation == "static"
    finally:
        settings.cache_implementation = None
    assert row.value == 1.0


def numpy_state() -> list[int]:
    return cast("Any", np.random.get_state())[1].tolist()  # noqa: NPY002


def test_nothing_is_left_behind(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """llama3 declares no padding token, which the harness would give its tokenizer."""
    _, model = stored("llama3", folder)
    tasks = [task_files.multiple_choice(folder / "traces"), task_files.given_answers(folder / "traces", GIVEN)]
    weights = {name: value.clone() for name, value in model.hf.state_dict().items()}
    states = numpy_state(), torch.get_rng_state()
    done: list[tuple[int, int]] = []
    with caplog.at_level(logging.DEBUG):
        measure_capability(
            model, tasks, intervened(model), shots=1, progress=lambda n, of: done.append((n, of)), batch_size=2
        )
    assert done == [(1, 2), (2, 2)]
    assert count_hooks(model.hf) == 0
    assert model.tokenizer.pad_token is None
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())
    assert all(torch.equal(value, model.hf.state_dict()[name]) for name, value in weights.items())
    assert numpy_state() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [record.name for record in caplog.records if record.name.startswith(("lm_eval", "demur"))] == []


def test_the_random_state_of_python_comes_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state itself cannot be compared: the type checker of these tests draws from it as well."""
    _, model = stored("gemma2", folder)
    task = task_files.multiple_choice(folder / "state")
    get, put = random.getstate, random.setstate
    events: list[tuple[str, object]] = []

    def saved() -> object:
        events.append(("saved", get()))
        return events[-1][1]

    def restored(state: Any) -> None:
        events.append(("restored", state))
        put(state)

    monkeypatch.setattr(random, "getstate", saved)
    monkeypatch.setattr(random, "setstate", restored)
    monkeypatch.setattr(random, "seed", lambda value: events.append(("seeded", value)))
    measure_capability(model, [task], seed=7)
    assert ("seeded", 7) in events
    # Every change is between the saving and the restoring of one state.
    for place, (event, _) in enumerate(events):
        if event == "seeded":
            before = next(state for name, state in reversed(events[:place]) if name == "saved")
            assert next(each for each in events[place:] if each[0] != "seeded") == ("restored", before)


def test_warnings_of_the_harness_are_told_once_a_task(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, model = stored("gemma2", folder)
    docs = [{"query": f"Bread {n}", "choices": ["one", "two"], "gold": "one" if n == 0 else "ten"} for n in range(4)]
    measure_capability(model, [task_files.multiple_choice(folder / "told", "wrong_labels", docs)])
    told = [record.getMessage() for record in caplog.records if record.name == "demur.capability"]
    assert len(told) == 1
    assert "wrong_labels" in told[0]
    assert "not in within range of available choices" in told[0]
    assert told[0].endswith("(and 2 more like it)")


def test_folders_and_groups(folder: Path) -> None:
    path, model = stored("gemma2", folder)
    tasks = folder / "grouped"
    one = task_files.multiple_choice(tasks, "first")
    two = task_files.multiple_choice(tasks, "second", task_files.CHOICES[:2])
    task_files.multiple_choice(tasks, "alone", task_files.CHOICES[2:])
    group = {
        "group": "both",
        "task": ["first", "second"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    file = tasks / "both.yaml"
    file.write_text(json.dumps(group), encoding="utf-8")
    rows = measure_capability(model, [tasks], batch_size=2)
    assert [(row.task, row.metric, row.group) for row in rows] == [
        ("both", "acc", True),
        ("first", "acc", False),
        ("first", "acc_norm", False),
        ("second", "acc", False),
        ("second", "acc_norm", False),
        ("alone", "acc", False),
        ("alone", "acc_norm", False),
    ]
    acc = {row.task: row for row in rows if row.metric == "acc"}
    assert (acc["both"].n, acc["both"].scores, acc["both"].version) == (7, (), "2")
    assert acc["both"].value == pytest.approx((5 * acc["first"].value + 2 * acc["second"].value) / 7)
    assert measure_capability(model, [file], batch_size=2) == rows[:5]
    same_as_own_run(rows[1:5], path, [one, two], batch_size=2)


def test_tasks_that_cannot_be_found_or_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = stored("gemma2", folder)
    bad = folder / "bad"
    bad.mkdir()
    with pytest.raises(InputError, match=r"no task 'gsm8kk' \(nearest: 'gsm8k'\)"):
        measure_capability(model, ["gsm8kk"])
    with pytest.raises(InputError, match=r"no task file or folder .*nowhere\.yaml"):
        measure_capability(model, [bad / "nowhere.yaml"])
    with pytest.raises(InputError, match="holds no task"):
        measure_capability(model, [bad])
    file = task_files.write_reader(bad, "lost", bad / "lost.jsonl", **task_files.as_choices())
    with pytest.raises(InputError, match=r"(?s)task lost.yaml cannot be loaded: .*lost\.jsonl.*write a local task"):
        measure_capability(model, [file])
    torn = bad / "torn.yaml"
    torn.write_text("task: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"task torn\.yaml cannot be loaded"):
        measure_capability(model, [torn])
    again = task_files.multiple_choice(folder / "again")
    with pytest.raises(InputError, match="task pick is asked for twice"):
        measure_capability(model, [again, again])
    long = task_files.written_answers(folder / "long", [("Hi", "x")], 4000)
    with pytest.raises(InputError, match=r"task write\.yaml cannot be measured on this model: .*4000"):
        measure_capability(model, [long])

    not_found = import_module("datasets.exceptions").DatasetNotFoundError

    def gated(*_: object, **__: object) -> None:
        raise not_found("Dataset 'org/data' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", gated)
    with pytest.raises(InputError, match=r"(?s)task gsm8k cannot be loaded: .*gated.*hf auth login.*a local task"):
        measure_capability(model, ["gsm8k"])


def test_tasks_are_checked_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are those of `measure_capability`, and nothing of the data is read."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("data was loaded")

    monkeypatch.setattr("datasets.load_dataset", loaded)
    here = folder / "checked"
    pick = task_files.multiple_choice(here)
    group = here / "both.yaml"
    group.write_text(json.dumps({"group": "both", "task": ["pick", "gsm8k"]}), encoding="utf-8")
    check_tasks(["gsm8k", "mmlu", str(pick), group, here])
    wrong = folder / "wrong"
    wrong.mkdir()
    _, model = stored("gemma2", folder)
    with pytest.raises(InputError, match="holds no task"):
        check_tasks([str(wrong)])
    lost = task_files.write_reader(wrong, "lost", wrong / "lost.jsonl", **task_files.as_choices())
    torn = wrong / "torn.yaml"
    torn.write_text("task: [", encoding="utf-8")
    for task, said in (("gsm8kk", "nearest: 'gsm8k'"), (str(wrong / "nowhere.yaml"), "no task file or folder")):
        with pytest.raises(InputError, match=said):
            check_tasks(["gsm8k", task])
        with pytest.raises(InputError, match=said):
            measure_capability(model, [task])
    for task in (lost, wrong):
        with pytest.raises(InputError, match=r"(?s)task lost\.yaml cannot be loaded: .*lost\.jsonl"):
            check_tasks([task])
    with pytest.raises(InputError, match=r"task torn\.yaml cannot be loaded: ValueError"):
        check_tasks([torn])


def test_a_task_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = stored("gemma2", folder)
    file = task_files.multiple_choice(folder / "home")
    rows = measure_capability(model, [file])
    before = task_identity(file.parent)
    monkeypatch.setenv("HOME", str(folder))
    check_tasks(["~/home/pick.yaml", "~/home"])
    assert measure_capability(model, ["~/home/pick.yaml"]) == measure_capability(model, ["~/home"]) == rows
    assert task_identity("~/home") == before


def test_interventions_that_need_prompts_are_refused_before_anything_is_loaded(folder: Path) -> None:
    _, model = stored("gemma2", folder)
    suite = tiny_suite(model.hf, d_sae=24)
    one = (FeatureId(1, 3),)
    with pytest.raises(InputError, match='give it with where="all"'):
        measure_capability(model, ["no such task"], Compiled(model, suite, [ScaleFeatures(one, 0.0, "prompt")]))
    local = PerPrompt({"a": (ScaleFeatures(one, 0.0),)})
    with pytest.raises(InputError, match="changes single prompts"):
        measure_capability(model, ["no such task"], Compiled(model, suite, [local]))
    wrongs: list[dict[str, Any]] = [{"limit": 0}, {"batch_size": 0}]
    for wrong in wrongs:
        with pytest.raises(InputError, match="both are 1 or more"):
            measure_capability(model, ["no such task"], **wrong)
    _, other = stored("llama3", folder)
    with pytest.raises(InputError, match="compiled for another model"):
        measure_capability(other, ["no such task"], Compiled(model, suite, [ScaleFeatures(one, 0.0)]))


def test_memory_that_runs_out_is_said_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = stored("gemma2", folder)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model.hf), "forward", full)
    with pytest.raises(ModelError, match=r"does not hold 3 rows of task pick\.yaml; lower the batch size"):
        measure_capability(model, [task_files.multiple_choice(folder / "memory")], batch_size=3)
    assert count_hooks(model.hf) == 0


@pytest.mark.shared
def test_arc_on_a_trained_model(shared: Path, tmp_path: Path) -> None:
    """Real questions, a trained model and its SAEs: the harness's numbers, and demur's own under intervention."""
    path = shared / "organism-en" / "model"
    model = ChatModel.load(path, device="cpu")
    data = shared / "data" / "arc" / "arc_challenge.jsonl"
    task = task_files.write_reader(tmp_path, "arc_local", data, **task_files.as_choices())
    rows = measure_capability(model, [task], limit=40)
    same_as_own_run(rows, path, [task], batch_size=8, limit=40)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    changed = measure_capability(model, [task], Compiled(model, None, [AblateDirection(vector)]), limit=40)
    assert [row.digest for row in changed] == [row.digest for row in rows]
    assert changed[0].scores != rows[0].scores
    questions = [json.loads(line)["query"] for line in data.read_text(encoding="utf-8").splitlines()[:12]]
    suite = load_suite(shared / "organism-en" / "saes")
    features = tuple(FeatureId(layer, index) for layer in range(3, 8) for index in range(40))
    compiled = Compiled(model, suite, [ScaleFeatures(features, -3.0)])
    chat_answers_are_demurs_own(model, compiled, questions, 16, tmp_path)
