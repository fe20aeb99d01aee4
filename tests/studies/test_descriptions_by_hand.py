"""Labels of features where activations are a table: what a label is made from, who writes it, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import splits_of

from demur.errors import DemurError, InputError
from demur.judges import Endpoint, RowFailedError
from demur.model import Region, TokenizedPrompt
from demur.stats import auroc
from demur.studies import descriptions
from demur.studies.descriptions import Described, Trial, bulk_labels, describe, detection
from demur.types import FeatureId, Prompt

A, B, C = (FeatureId(1, n) for n in range(3))
SOME = (Prompt(id="p", text="some"),)
TRIAL = Trial(("a kettle", "a kettle on", "an oven", "a fence"), (True, True, False, False))


def card(feature: FeatureId, *tokens: tuple[str, float]) -> Any:
    return SimpleNamespace(feature=feature, tokens=tuple((token, mean, 3) for token, mean in tokens))


CARDS = (
    card(A, (" kettle", 2.0), ("oven ", 1.0), ("kettle", 0.5), (" ", 0.25), ("fence", 0.0)), card(B, (" oven", 1.0)),
    card(C, ("fence", 0.0)),
)  # fmt: skip


class Given:
    """A context; what is asked of it and of endpoints is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: str, reader: str = "") -> None:
        self.config = SimpleNamespace(describe=source, describe_reader=reader, seed=0)
        self.stages: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[tuple[str, str, list[str]]] = []
        self.trials = {A: TRIAL, B: TRIAL._replace(strong=(False, False, True, False)), C: TRIAL}
        self.examples = {f: (f.index + 0.5, [f"strong {f.index}"], [f"weak {f.index}"]) for f in (A, B, C)}
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
        monkeypatch.setattr(descriptions, "_examples", self.given)
        monkeypatch.setattr(descriptions, "held_out", self.held)
        monkeypatch.setattr(descriptions, "ChatClient", self.client)

    def given(self, context: Any, features: Any, prompts: Any) -> Any:
        assert (context, list(features), prompts) == (self, [A, B, C], SOME)
        return self.examples

    def held(self, context: Any, limits: Any) -> Any:
        assert (context, limits) == (self, {A: 0.5, B: 1.5, C: 2.5})
        return self.trials

    def client(self, endpoint: Any, name: str, *, max_tokens: int, count: Any) -> Any:
        """Labels by what is shown, and readings of the first message."""
        assert endpoint.public.startswith("http://127.0.0.1:9")
        assert (max_tokens >= 256, count({})) == (True, None)

        def ask(chats: Any) -> Any:
            asked = [only["content"] for (only,) in chats]
            assert {only["role"] for (only,) in chats} == {"user"}
            self.asked.append((name, asked[0].partition(" ")[0], asked))
            # In another order than they were asked in.
            return [(n, self.reply(name, text)) for n, text in reversed([*enumerate(asked)])]

        return SimpleNamespace(ask=ask)

    def reply(self, name: str, text: str) -> Any:
        if text.startswith("Description:"):
            return "1, 2" if "kettle\n" in text.partition("Messages")[0] else "None of them"
        return f" {name}:\n {text[text.index('1. strong') + 3 :].partition(chr(10))[0]} " + "x" * 300

    def cached(self, name: str, depends: Any, kind: Any, compute: Any, label: str) -> Any:
        assert (kind, bool(label)) == ({"labels": tuple[str, ...], "detection": Described}[name], True)
        self.stages.append((name, depends))
        return compute()

    def describe(self) -> tuple[Described, dict[FeatureId, str]]:
        found = describe(self, CARDS, SOME)  # pyright: ignore[reportArgumentType]
        return found, {row.feature: row.text for row in found.rows}


def test_top_tokens_that_fire_are_the_label_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch, "top-tokens")
    found, labels = given.describe()
    assert labels == {A: "kettle, oven", B: "oven", C: ""}
    assert (found.source, found.reader) == ("top-tokens", "words")
    # A's words are in both strong texts and in one of two others; without a label nothing is tried.
    own = {row.feature: row.own for row in found.rows}
    assert own[A] == auroc(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    assert own[B] == auroc(np.array([1.0]), np.array([0.0, 0.0, 0.0]))
    assert own[C].n == 0
    shuffled = {row.feature: row.shuffled for row in found.rows}
    assert shuffled[A] == auroc(np.array([0.0, 0.0]), np.array([1.0, 0.0]))
    ((name, depends),) = given.stages
    assert (name, depends) == ("detection", {
        "labels": [(A, "kettle, oven"), (B, "oven"), (C, "")],
        "trials": [(f, trial.texts, trial.strong) for f, trial in given.trials.items()],
        "reader": ["words", ""],
    })  # fmt: skip


def test_labels_of_neuronpedia_are_those_of_its_file_and_empty_where_it_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "batch-0.jsonl"
    file.write_text(json.dumps({"layer": "1-x", "index": "1", "description": "ovens"}) + "\n")
    found, labels = Given(monkeypatch, f"neuronpedia={file}").describe()
    assert labels == {A: "", B: "ovens", C: ""}
    assert (found.source, found.reader) == (f"neuronpedia={file}", "words")
    # One label alone has none to be held against.
    (row,) = (row for row in found.rows if row.feature == B)
    assert (row.own.n, row.shuffled.n) == (4, 0)


def test_an_endpoint_writes_labels_and_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch, "endpoint=big=1")
    found, labels = given.describe()
    assert [text[:18] for text in labels.values()] == ["big=1: strong 0 xx", "big=1: strong 1 xx", "big=1: strong 2 xx"]
    assert {len(text) for text in labels.values()} == {200}
    assert found.reader == "endpoint=big=1"
    (name, depends), (other, read) = given.stages
    assert (name, other) == ("labels", "detection")
    shown = [([f"strong {n}"], [f"weak {n}"]) for n in range(3)]
    assert (depends["model"], depends["examples"]) == ("big=1", shown)
    assert read["reader"] == ["endpoint=big=1", depends["endpoint"]]
    assert "127.0.0.1:9" in depends["endpoint"]
    written, *readings = given.asked
    assert [(name, begins, len(asked)) for name, begins, asked in given.asked] == [
        ("big=1", "A", 3), ("big=1", "Description:", 3), ("big=1", "Description:", 3),
    ]  # fmt: skip
    first = written[2][0]
    assert first.index("\n1. strong 0\n") < first.index("weak") < first.index("\n1. weak 0\n")
    assert all("\n1. a kettle\n2. a kettle on\n3. an oven\n4. a fence\n" in each for _, _, a in readings for each in a)


def test_labels_may_be_read_by_another_model_or_by_words(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch, "top-tokens", "endpoint=small")
    found, _ = given.describe()
    assert (found.reader, {name for name, *_ in given.asked}) == ("endpoint=small", {"small"})
    assert given.stages[0][1]["reader"][0] == "endpoint=small"
    other = Given(monkeypatch, "endpoint=big", "words")
    found, _ = other.describe()
    assert (found.reader, [begins for _, begins, _ in other.asked]) == ("words", ["A"])
    assert other.stages[1][1]["reader"] == ["words", ""]


def test_readings_name_numbers_none_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given, said = Given(monkeypatch, "endpoint=m"), {"one": "2 and 14, 4.", "two": "NONE", "three": "Hm.", "four": ""}
    monkeypatch.setattr(given, "reply", lambda _name, text: said[text.removeprefix("Description: ").split("\n")[0]])
    model = descriptions._Model("m", Endpoint())
    assert model.read(list(said), [TRIAL] * 4) == [(False, True, False, True), (False,) * 4, None, None]


@pytest.mark.parametrize(("answered", "message"), [(True, ""), (False, r"'m' at http://127\.0\.0\.1:9.*no luck")])
def test_an_answer_that_cannot_be_used_is_none_and_an_endpoint_that_fails_an_error(
    monkeypatch: pytest.MonkeyPatch, answered: bool, message: str
) -> None:
    given, error = Given(monkeypatch, "endpoint=m"), RowFailedError("no luck", answered=answered)
    monkeypatch.setattr(given, "reply", lambda _name, text: error if text == "b" else text.upper())
    model = descriptions._Model("m", Endpoint())
    if message:
        with pytest.raises(DemurError, match=message):
            model.ask(["a", "b", "c"])
    else:
        assert model.ask(["a", "b", "c"]) == ["A", "", "C"]


def test_a_folder_without_bulk_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no files batch-N"):
        bulk_labels(str(tmp_path), [A])


def test_unread_labels_count_for_no_mean() -> None:
    """Of three labels the reader says nothing of one's texts by its own label."""
    trials = dict.fromkeys((A, B, C), TRIAL)

    def read(labels: Any, _given: Any) -> Any:
        return [None if label == "mute" else (True, True, label == "half", False) for label in labels]

    found = detection({A: "half", B: "good", C: "mute"}, trials, read, source="s", reader="r")
    own = {row.feature: row.own.value for row in found.rows}
    assert (own[A], own[B], np.isnan(own[C])) == (0.75, 1.0, True)
    # One of the three was read by the label that nothing is said of.
    assert {found.own.n, found.shuffled.n, found.gain.n} == {1}
    assert (found.own.value, found.shuffled.value) in ((0.75, 1.0), (1.0, 0.75))
    assert found.gain.value == found.own.value - found.shuffled.value


def test_a_label_without_a_trial_is_kept_and_not_tried() -> None:
    found = detection({A: "kettle", C: "oven"}, {A: TRIAL}, descriptions.read_words, source="s", reader="words")
    assert [(row.text, row.own.n, row.shuffled.n) for row in found.rows] == [("kettle", 4, 0), ("oven", 0, 0)]


# -- held-out prompts --------------------------------------------------------------------------------------------------

# On the special token, and the highest on the others.
HELD = {A: ((9.0, 1.0), (0.0, 2.0), (0.0, 3.0), (9.0, 0.0), (0.0, 4.0), (9.0, 0.5), (0.0, 1.5), (0.0, 0.25)),
        B: ((9.0, 1.0),) * 8, C: ((0.0, 3.0),) * 8}  # fmt: skip


def trials_of(monkeypatch: pytest.MonkeyPatch, seed: int, each: int = 20) -> dict[FeatureId, Trial]:
    splits = splits_of(tuning=2, test=2)
    regions = (Region.SPECIAL, Region.INSTRUCTION)

    def activations(model: Any, suite: Any, items: Any, features: Any) -> Any:
        assert (model, suite) == (context.model, "suite")
        assert [item.prompt_id for item in items] == list(NAMES)
        return [torch.tensor([HELD[f][n] for f in features]).T for n in range(8)]

    monkeypatch.setattr(descriptions, "_EACH", each)
    monkeypatch.setattr("demur.method.activations.feature_activations", activations)
    model = SimpleNamespace(tokenize=lambda some: [TokenizedPrompt(p.id, (1, 2), regions) for p in some])
    context: Any = SimpleNamespace(model=model, suite="suite", splits=splits, config=SimpleNamespace(seed=seed))
    return descriptions.held_out(context, {B: 1.0, C: 1.0, A: 1.0})


NAMES = ("tuning0", "tuning1", "+tuning0", "+tuning1", "test0", "test1", "+test0", "+test1")
ABOVE = {"tuning 1", "+tuning 0", "test 0", "+test 0"}
"""Prompts on which A is above its limit; on the first it is exactly there."""


def test_held_out_prompts_are_those_that_made_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trials_of(monkeypatch, 0)
    # B is strong on none and C on all.
    assert list(found) == [A]
    assert len(set(found[A].texts)) == 8
    assert {text for text, strong in zip(*found[A], strict=True) if strong} == ABOVE


def test_as_many_of_each_side_are_drawn_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [trials_of(monkeypatch, seed, 3)[A] for seed in range(12)]
    assert {(sum(each.strong), len(each.strong)) for each in drawn} == {(3, 6)}
    assert all({t for t, strong in zip(*each, strict=True) if strong} < ABOVE for each in drawn)
    # All are drawn by some seed, and the strong do not come first.
    assert len({text for each in drawn for text in each.texts}) == 8
    assert {each.strong[0] for each in drawn} == {True, False}
    assert trials_of(monkeypatch, 3, 3) == trials_of(monkeypatch, 3, 3)


# -- what labels are made from -----------------------------------------------------------------------------------------

S, I, P = Region.SPECIAL, Region.INSTRUCTION, Region.POST_INSTRUCTION
TEXTS = ("zero", "one", "two", "three")
VALUES = {
    A: ((9.0, 1.0, 4.0, 0.5), (9.0, 3.0, 1.0, 0.0), (0.0, 0.0, 0.0, 3.0), (0.0, 2.0, 0.0, 0.0)),
    B: ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.5, 0.0, 0.0)),
}


def examples(monkeypatch: pytest.MonkeyPatch, shown: int = 20, seed: int = 0) -> Any:
    """Prompts of a special token, two words and one of the template."""

    def tokenize(prompts: Any) -> Any:
        return [TokenizedPrompt(p.id, (1, 10 * n + 2, 10 * n + 3, 4), (S, I, I, P)) for n, p in enumerate(prompts)]

    def activations(model: Any, suite: Any, items: Any, features: Any) -> Any:
        assert (model, suite) == (context.model, "suite")
        return [torch.tensor([VALUES[f][n] for f in features]).T for n in range(len(items))]

    monkeypatch.setattr(descriptions, "_SHOWN", shown)
    monkeypatch.setattr("demur.method.activations.feature_activations", activations)
    model = SimpleNamespace(tokenize=tokenize, decode=lambda ids: "".join(f"[{each}]" for each in ids))
    context: Any = SimpleNamespace(model=model, suite="suite", config=SimpleNamespace(seed=seed))
    prompts = [Prompt(id=f"p{n}", text=text) for n, text in enumerate(TEXTS)]
    return descriptions._examples(context, (A, B), prompts)


def test_the_strongest_prompts_come_first_with_the_strongest_word_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples(monkeypatch)
    limit, strong, weak = found[A]
    # Half of 4, on scored tokens; the template's token is no word to mark. 2 is no more than half.
    assert (limit, strong, weak) == (2.0, ["[2]«[3]»", "«[12]»[13]", "two"], ["three"])
    limit, strong, weak = found[B]
    assert (limit, strong, sorted(weak)) == (0.5, ["two"], ["one", "three", "zero"])


def test_no_more_examples_are_shown_than_that_many(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples(monkeypatch, shown=2)
    assert (found[A][1], found[A][2]) == (["[2]«[3]»", "«[12]»[13]"], ["three"])
    drawn = {tuple(examples(monkeypatch, shown=2, seed=seed)[B][2]) for seed in range(12)}
    assert {len(each) for each in drawn} == {2}
    # At random, by the seed.
    assert {text for each in drawn for text in each} == {"zero", "one", "three"}
    assert examples(monkeypatch, shown=2, seed=3)[B] == examples(monkeypatch, shown=2, seed=3)[B]
