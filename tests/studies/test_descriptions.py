"""Labels of features and their detection scores: by hand, on the planted model, and on the bundled one through a
loopback endpoint that counts words."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "judges"))

from loopback import Loopback, Reply, loopback  # pyright: ignore[reportMissingImports]
from planted_study import PlantedFiles
from word_counter import answer

from demur.errors import DemurError, InputError
from demur.method.activations import feature_activations
from demur.model import ChatModel
from demur.report.blocks import Table, Text
from demur.studies import STUDIES
from demur.studies.config import load_config
from demur.studies.context import run_study
from demur.studies.descriptions import Trial, bulk_labels, detection, held_out, read_words
from demur.studies.features import Result
from demur.testing import planted as planted_model
from demur.types import FeatureId, PromptSet, Split

A, B, C = (FeatureId(0, n) for n in range(3))


def test_detection_by_hand() -> None:
    texts = ("boil the kettle", "an oven", "paint a fence", "a kettlebell")
    trials = {A: Trial(texts, (True, False, False, True)), B: Trial(texts, (False, True, False, False))}
    labels = {A: "words about kettle", B: "oven, kettle", C: "fence"}
    found = detection(labels, trials, read_words, source="x", reader="words")
    rows = {row.feature: row for row in found.rows}
    # A's label fits texts 1 and 4: both strong. B's fits 1, 2 and 4: of one strong text one, of three others two.
    assert (rows[A].own.value, rows[A].own.n) == (1.0, 4)
    assert rows[B].own.value == pytest.approx((1 + 1 / 3) / 2)
    # By the other's label: A's texts are told as (1, 1/2), B's as (0, 1/3).
    assert rows[A].shuffled.value == pytest.approx((1 + 1 / 2) / 2)
    assert rows[B].shuffled.value == pytest.approx((0 + 1 / 3) / 2)
    assert rows[A].own.low < 1.0
    # C is strong on no held-out text, so its label could not be tried.
    assert rows[C].text == "fence"
    assert rows[C].own.n == 0
    assert found.own.value == pytest.approx((1 + 2 / 3) / 2)
    assert found.gain.value == pytest.approx(((1 - 3 / 4) + (2 / 3 - 1 / 6)) / 2)
    assert found.gain.n == 2


def test_words_match_from_their_beginning_and_labels_without_words_fit_nothing() -> None:
    trial = Trial(("Explosives!", "an unexplained noise", "the text"), (True, False, False))
    assert read_words(["expl"], [trial]) == [(True, False, False)]
    assert read_words(["the words related to a, ."], [trial]) == [(False, False, False)]


def test_bulk_files_of_neuronpedia(tmp_path: Path) -> None:
    def row(layer: str, index: str, text: str) -> str:
        return json.dumps({"modelId": "m", "layer": layer, "index": index, "description": text}) + "\n"

    with gzip.open(tmp_path / "batch-0.jsonl.gz", "wt") as file:
        file.write(row("6-gemmascope-2-res-16k", "4", "kettles") + row("6-gemmascope-2-res-16k", "4", "tea"))
    (tmp_path / "batch-1.jsonl").write_text(row("12-gemmascope-2-res-16k", "4", "ovens"))
    wanted = [FeatureId(6, 4), FeatureId(12, 4), FeatureId(12, 5)]
    assert bulk_labels(str(tmp_path), wanted) == {wanted[0]: "kettles", wanted[1]: "ovens"}
    assert bulk_labels(str(tmp_path / "batch-1.jsonl"), wanted) == {wanted[1]: "ovens"}
    (tmp_path / "batch-2.jsonl").write_text('{"index": 3}\n')
    with pytest.raises(InputError, match=r"batch-2\.jsonl is no file of Neuronpedia's explanations .*layer"):
        bulk_labels(str(tmp_path), wanted)


def test_held_out_prompts_are_strong_or_not_by_the_limit() -> None:
    made = planted_model()
    model = ChatModel(made.model, made.tokenizer, name="planted")
    split = Split(harmful=made.harmful, harmless=made.harmless)
    few = Split(harmful=made.over_refusal, harmless=PromptSet(name="none", prompts=()))
    context: Any = SimpleNamespace(model=model, suite=made.suite, config=SimpleNamespace(seed=0))
    context.splits = SimpleNamespace(tuning=split, test=few)
    prompts = [*made.harmful.prompts, *made.harmless.prompts, *made.over_refusal.prompts]
    refuse, harm = sorted(made.truth.refusal)[0], sorted(made.truth.harm)[0]
    items = model.tokenize(prompts)
    highest = {
        p.text: float(v.max())
        for p, v in zip(prompts, feature_activations(model, made.suite, items, [refuse]), strict=True)
    }
    # One harm word leaves a third of it: the feature fires, but is not strong.
    weak = [text for text, value in highest.items() if 0.2 < value < 1.0]
    assert len(weak) > 20
    found = held_out(context, {refuse: 1.0, harm: 1e9})
    assert set(found) == {refuse}
    trial = found[refuse]
    assert trial.strong == tuple(highest[text] > 1.0 for text in trial.texts)
    assert (sum(trial.strong), len(trial.strong)) == (20, 40)
    assert trial.strong[:20].count(True) not in (0, 20)
    assert len(set(trial.texts)) == 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder, so that features are found once."""
    return tmp_path_factory.mktemp("labels") / "run"


@pytest.fixture(name="counter")
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    with loopback(lambda request, _times: Reply(answer(request.asked))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-secret")
        yield server


def planted(files: PlantedFiles, folder: Path, **options: Any) -> Result:
    found: Any = files.study(folder, "features", **{"n": "40,8,8,8", "k": 11, **options})
    return found


def warnings(result: Result) -> str:
    blocks = [block for section in result.page().sections for block in section.blocks]
    return " ".join(block.text for block in blocks if isinstance(block, Text) and block.role == "warning")


def messages(asked: list[str], start: str) -> set[str]:
    """The messages that stand in the requests that begin so."""
    lines = [line for each in asked if each.startswith(start) for line in each.splitlines() if line[:1].isdigit()]
    return {line.partition(". ")[2].replace("«", "").replace("»", "").strip() for line in lines}


def test_top_tokens_name_the_harm_words_of_a_feature(files: PlantedFiles, folder: Path) -> None:
    result = planted(files, folder, describe="top-tokens", examples=16)
    assert result.described is not None
    assert (result.described.source, result.described.reader) == ("top-tokens", "words")
    harm = [row for row in result.described.rows if row.feature in files.truth.truth.harm]
    # Each harm feature fires on the four words of one group and on nothing else; a word may not have been seen.
    named = [row for row in harm if len(row.text.split(", ")) == 4]
    assert len(named) >= 6
    assert all(row.own.value == 1.0 for row in named)
    assert all(abs(row.shuffled.value - 0.5) < 0.2 for row in named)
    cards = {card.feature: card.description for card in result.cards}
    assert all(cards[row.feature] == row.text for row in result.described.rows)
    table = next(b for s in result.page().sections for b in s.blocks if isinstance(b, Table) and b.title == "Features")
    assert [column.name for column in table.columns][-3:] == ["description", "detection", "shuffled"]


def test_labels_of_an_endpoint_are_tried_by_it(files: PlantedFiles, folder: Path, counter: Loopback) -> None:
    result = planted(files, folder, describe="endpoint=counter")
    described = result.described
    assert described is not None
    assert described.gain.low > 0.1
    assert described.own.value > 0.8
    asked = [request.asked for request in counter.requests]
    labelled, read = (sum(a.startswith(start) for a in asked) for start in ("A feature", "Description:"))
    tried = sum(row.own.n > 0 for row in described.rows)
    assert (labelled, read) == (len(described.rows), 2 * tried)
    # No held-out message was among the examples that a label was made from.
    shown, held = messages(asked, "A feature"), messages(asked, "Description:")
    assert shown
    assert held
    assert not held & shown
    # The key stays out of the folder, and a second run asks nothing.
    assert not any(b"sk-not-a-secret" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    again = planted(files, folder, describe="endpoint=counter")
    assert again.described == described
    assert len(counter.requests) == len(asked)


def test_wrong_labels_show_as_wrong(files: PlantedFiles, folder: Path, tmp_path: Path) -> None:
    good = planted(files, folder, describe="top-tokens").described
    assert good is not None
    assert good.gain.low > 0
    rows = [{"layer": f"{r.feature.layer}-x", "index": str(r.feature.index), "description": r.text} for r in good.rows]
    labels = [row["description"] for row in rows]
    for row, label in zip(rows, (*labels[5:], *labels[:5]), strict=True):
        row["description"] = label
    file = tmp_path / "batch-0.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = planted(files, folder, describe=f"neuronpedia={file}")
    assert result.described is not None
    assert result.described.own.value < good.own.value - 0.1
    assert not result.described.gain.low > 0
    assert "They say no more of their features than other labels do." in warnings(result)


def test_a_reader_that_says_nothing_is_unscored(
    files: PlantedFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback(lambda _request, _times: Reply("I would rather not.")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        result = planted(files, folder, describe="top-tokens", describe_reader="endpoint=mute")
    assert result.described is not None
    assert {row.own.n for row in result.described.rows} == {0}
    assert "No label could be tried" in warnings(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"describe": "oracle"}, "--describe 'oracle' is no source of labels; expected top-tokens"),
        ({"describe": "endpoint"}, "--describe 'endpoint' is no source"),
        ({"describe": "neuronpedia=/absent"}, "there is no /absent; name a file batch-N"),
        ({"describe_reader": "top-tokens"}, "--describe-reader 'top-tokens' reads nothing; expected words or"),
    ],
)
def test_bad_options_are_named(files: PlantedFiles, folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planted(files, folder, **options)


def test_an_endpoint_that_fails_is_named(
    files: PlantedFiles, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tmp_path
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(DemurError, match=r"nothing answers at .*127\.0\.0\.1:9"):
        planted(files, folder, describe="endpoint=gone")
    with loopback(lambda _request, _times: Reply("odd", status=418)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with pytest.raises(DemurError, match=r"'odd' at .* does not answer: HTTP 418.*without --describe"):
            planted(files, folder, describe="endpoint=odd")


@pytest.mark.slow
def test_labels_of_the_bundled_features_beat_shuffled_ones(tmp_path: Path, counter: Loopback) -> None:
    """What word counts can say of the bundled model's features is little, but it is about them."""
    study = STUDIES["features"]
    options = {"describe": "endpoint=counter", "n": "96,24,48,48", "max_new_tokens": 12}
    result = run_study(study, load_config(None, options, study.config), tmp_path / "run")
    assert result.described.gain.low > 0
    assert result.described.own.value > 0.55
    assert abs(result.described.shuffled.value - 0.5) < 0.08
    assert counter.requests
