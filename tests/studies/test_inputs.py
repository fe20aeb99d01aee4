"""What a study loads, and what of it can be refused before any weight is read: no model is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import NoModel, NoSaes

from demur.bundled import BundledJudge, bundled_path
from demur.errors import InputError
from demur.judges import PatternJudge
from demur.saes import find_preset, get_preset
from demur.studies import inputs
from demur.studies.checkpoints import Config as CheckpointsConfig
from demur.studies.config import StudyConfig
from demur.studies.dictionaries import Config as DictionariesConfig
from demur.studies.inputs import (
    BASE_SAES,
    HELPFUL,
    before_names,
    check_fit,
    configured_suite,
    load_inputs,
    neuronpedia_source,
    other_names,
    outcome_judge,
    read_splits,
)
from demur.studies.transfer import Config as TransferConfig
from demur.types import PURPOSES, Prompt, PromptSet, Split, Splits

GEMMA = "google/gemma-2-2b-it"


def named(kind: type[Any] = StudyConfig, **options: Any) -> Any:
    return kind.model_validate({"model": "org/chat", "harmful": "h.csv", "harmless": "b.csv", **options})


# -- names -------------------------------------------------------------------------------------------------------------


def test_neuronpedia_has_one_sae_of_a_layer_and_width() -> None:
    preset = get_preset(GEMMA)
    assert preset.neuronpedia is not None
    level = preset.average_l0
    own = neuronpedia_source(named(model=GEMMA, average_l0=level))
    assert own == preset.neuronpedia.replace("{width}", str(preset.width))
    assert neuronpedia_source(named(model=GEMMA, average_l0=level, sae_width="65k")) == preset.neuronpedia.replace(
        "{width}", "65k"
    )
    assert neuronpedia_source(named(average_l0=level, saes=GEMMA)) == own
    assert neuronpedia_source(named(model=GEMMA, average_l0=level, saes="./mine")) is None
    assert neuronpedia_source(named(model=GEMMA, average_l0=level + 1)) is None
    assert neuronpedia_source(named()) is None
    without = next(name for name in ("google/gemma-3-1b-it", "meta-llama/Llama-3.1-8B-Instruct") if find_preset(name))
    expected = get_preset(without).neuronpedia
    assert (neuronpedia_source(named(model=without, average_l0=get_preset(without).average_l0)) is None) == (
        expected is None
    )


def test_names_of_what_is_compared() -> None:
    assert other_names(named()) == ()
    assert other_names(StudyConfig()) == ()
    assert other_names(named(TransferConfig, to_saes=("a", "b"))) == ("a", "b")
    assert other_names(TransferConfig(to_saes=("a",))) == (BASE_SAES, "a")
    assert other_names(named(DictionariesConfig, against=("a",))) == ("a",)
    assert other_names(DictionariesConfig()) == (BASE_SAES,)
    assert before_names(named()) == ()
    assert before_names(StudyConfig()) == ()
    assert before_names(CheckpointsConfig()) == (HELPFUL,)
    assert before_names(CheckpointsConfig(before=("a",))) == ("a",)
    assert before_names(named(CheckpointsConfig, before=("a", "b"))) == ("a", "b")


def test_an_outcome_judge_tells_outcomes() -> None:
    assert isinstance(outcome_judge("patterns"), PatternJudge)
    with pytest.raises(InputError, match="'harmbench' tells whether an answer is harmful"):
        outcome_judge("harmbench")


def test_saes_are_looked_for_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(inputs, "load_saes", lambda *given, **options: asked.append((given, options)) or NoSaes())
    configured_suite(named(saes="./s", sae_width="65k", saes_revision="r", layers="1,2", average_l0=50))
    assert asked == [(("org/chat", "./s"), {"layers": (1, 2), "average_l0": 50.0, "width": "65k", "revision": "r"})]


def text(**changes: Any) -> Any:
    sizes = {"model_type": "tiny", "hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 20, **changes}
    return SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**sizes) if decoder else None)


def test_model_and_saes_are_compared_by_their_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(inputs, "read_config", lambda *given: read.append(given) or text())
    checked: list[Any] = []

    class Checked(NoSaes):
        def check(self, *, d_model: int, n_layers: int, model_type: str | None = None) -> None:
            checked.append((d_model, n_layers, model_type))

    check_fit(named(revision="r"), Checked())
    assert (read, checked) == ([("org/chat", "r")], [(8, 3, "tiny")])


# -- loading -----------------------------------------------------------------------------------------------------------


def splits() -> Splits:
    def side(purpose: str, label: Any) -> PromptSet:
        return PromptSet(name=label, prompts=(Prompt(id=f"{purpose} {label}", text=f"{purpose} {label}", label=label),))

    sides = {name: Split(harmful=side(name, "harmful"), harmless=side(name, "harmless")) for name in PURPOSES}
    return Splits(**sides)  # pyright: ignore[reportArgumentType]


class Loaded(NoModel):
    """A model that was not loaded."""

    name: Any = ""
    tokenizer: Any = "tokenizer"

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self.name, self.source, self.options = f"name of {source}", source, options


class Loading:
    """Stands for everything slow; `done` says what was read, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Any] = []
        self.configs: dict[str, Any] = {}
        self.splits = splits()
        monkeypatch.setattr(inputs, "load_saes", self.saes)
        monkeypatch.setattr(inputs, "load_suite", self.suite)
        monkeypatch.setattr(inputs, "read_config", self.config)
        monkeypatch.setattr(inputs, "read_splits", self.prompts)
        monkeypatch.setattr(inputs.ChatModel, "load", self.model)

    def prompts(self, config: StudyConfig) -> Splits:
        self.done.append("prompts")
        assert isinstance(config, StudyConfig)
        return self.splits

    def of(self, what: str, *given: Any) -> NoSaes:
        self.done.append((what, *given))
        suite = NoSaes()
        suite.source = f"SAEs of {given[-1]}"
        return suite

    def saes(self, model: Any, source: Any, *, layers: Any, average_l0: float | None = None, **_: Any) -> NoSaes:
        whose = model.source if isinstance(model, Loaded) else model
        return self.of("saes", str(whose), layers, average_l0, str(source))

    def suite(self, source: Any, *, layers: Any, average_l0: float) -> NoSaes:
        return self.of("suite", layers, average_l0, str(source))

    def config(self, source: str, revision: Any) -> Any:
        self.done.append(("config", source, revision))
        return self.configs.get(source, text())

    def model(self, source: Any, **options: Any) -> Loaded:
        self.done.append(("model", str(source)))
        return Loaded(source, options)


@pytest.fixture(name="loading")
def not_loading(monkeypatch: pytest.MonkeyPatch) -> Loading:
    monkeypatch.setattr(NoSaes, "check", lambda *_, **__: None)
    return Loading(monkeypatch)


def test_a_named_model_is_loaded_after_all_that_can_be_checked(loading: Loading) -> None:
    config = named(saes="./s", revision="r", layers="1", average_l0=40, dtype="float16", device="cpu",
                   system_prompt="Be kind.", max_batch_tokens=9)  # fmt: skip
    found = load_inputs(config, lambda suite: loading.done.append(("check", suite.source)))
    assert loading.done == [
        "prompts", ("saes", "org/chat", (1,), 40.0, "./s"), ("config", "org/chat", "r"), ("check", "SAEs of ./s"),
        ("model", "org/chat"),
    ]  # fmt: skip
    model: Any = found.model
    assert model.options == {
        "revision": "r", "dtype": "float16", "device": "cpu", "system_prompt": "Be kind.", "max_batch_tokens": 9,
    }  # fmt: skip
    assert (found.title, found.saes_title, found.suite.source) == ("name of org/chat", "SAEs of ./s", "SAEs of ./s")
    assert found.splits == loading.splits
    assert isinstance(found.judge, PatternJudge)
    assert (found.others, found.before, found.warnings) == ({}, {}, ())


def test_saes_that_a_study_cannot_use_stop_it_before_the_model_is_loaded(loading: Loading) -> None:
    def refuse(_suite: Any) -> None:
        raise InputError("transcoders")

    with pytest.raises(InputError, match="transcoders"):
        load_inputs(named(), refuse)
    assert not [each for each in loading.done if each[0] == "model"]
    with pytest.raises(InputError, match="outcome judge"):
        load_inputs(named(judge="harmbench"))


def test_the_bundled_model_has_its_own_judge_and_saes(loading: Loading) -> None:
    place = bundled_path()
    found = load_inputs(StudyConfig.model_validate({"layers": "0", "average_l0": 20}))
    assert (found.title, found.saes_title) == ("the bundled model", "the bundled SAEs")
    assert isinstance(found.judge, BundledJudge)
    assert loading.done == ["prompts", ("suite", (0,), 20.0, str(place.saes)), ("model", str(place.model))]
    assert isinstance(load_inputs(StudyConfig(judge="patterns")).judge, PatternJudge)
    others = load_inputs(TransferConfig.model_validate({"to_saes": "mine", "layers": "0"})).others
    assert {name: suite.source for name, suite in others.items()} == {
        BASE_SAES: f"SAEs of {place.base_saes}", "mine": "SAEs of mine",
    }  # fmt: skip
    assert loading.done[-1] == ("saes", str(place.model), (0,), None, "mine")


@pytest.mark.usefixtures("loading")
def test_other_saes_that_a_study_cannot_use_stop_it() -> None:
    def refuse(suite: Any) -> None:
        if suite.source == "SAEs of b":
            raise InputError("b holds transcoders")

    with pytest.raises(InputError, match="b holds transcoders"):
        load_inputs(named(TransferConfig, to_saes=("a", "b")), refuse)


@pytest.mark.usefixtures("loading")
def test_other_saes_of_a_named_model_are_loaded_by_name() -> None:
    others = load_inputs(named(TransferConfig, to_saes=("a", "b"))).others
    assert {name: suite.source for name, suite in others.items()} == {"a": "SAEs of a", "b": "SAEs of b"}


def test_checkpoints_are_read_with_the_tokenizer_of_the_model(loading: Loading, tmp_path: Path) -> None:
    folder = str(tmp_path)
    config = named(CheckpointsConfig, before=(folder, "org/base@step1", "org/other"), revision="r", device="cpu")
    found = load_inputs(config)
    assert [each for each in loading.done if each[0] == "config"] == [
        ("config", "org/chat", "r"), ("config", folder, None), ("config", "org/base", "step1"),
        ("config", "org/other", None), ("config", "org/chat", "r"),
    ]  # fmt: skip
    assert list(found.before) == [folder, "org/base@step1", "org/other"]
    for (name, each), source, revision in zip(
        found.before.items(), (folder, "org/base", "org/other"), (None, "step1", None), strict=True
    ):
        model: Any = each.model
        assert (model.source, model.options["tokenizer"], model.options["revision"]) == (source, "tokenizer", revision)
        assert (model.options["device"], each.title) == ("cpu", name)
        # Without SAEs of their own: those of the model.
        assert (each.suite, each.saes_title) == (found.suite, found.suite.source)
        assert (each.splits, each.judge) == (found.splits, found.judge)
    own = load_inputs(named(CheckpointsConfig, before=("org/base",), before_saes="./b", layers="2", average_l0=30))
    assert loading.done[-1] == ("saes", "org/base", (2,), 30.0, "./b")
    assert (own.before["org/base"].saes_title, own.saes_title) == ("SAEs of ./b", "SAEs of None")


def test_the_bundled_checkpoint_is_the_helpful_model(loading: Loading) -> None:
    place = bundled_path()
    found = load_inputs(CheckpointsConfig())
    model: Any = found.before[HELPFUL].model
    assert (list(found.before), model.source, model.options["revision"]) == ([HELPFUL], place.helpful_model, None)
    assert [each for each in loading.done if each[0] == "config"] == [
        ("config", str(place.helpful_model), None), ("config", str(place.model), None),
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["model_type", "hidden_size", "num_hidden_layers", "vocab_size"])
def test_another_model_is_no_checkpoint(loading: Loading, part: str) -> None:
    loading.configs["org/base"] = text(**{part: 99})
    with pytest.raises(InputError) as error:
        load_inputs(named(CheckpointsConfig, before=("org/fine", "org/base")))
    own = {"model_type": "tiny", "hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 20}[part]
    assert f"--before org/base is no checkpoint of org/chat: {part} 99, not {own};" in str(error.value)
    assert not [each for each in loading.done if each[0] == "model"]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_named_prompts_are_split_as_configured(tmp_path: Path) -> None:
    names = ("harmful", "harmless", "test_harmful", "test_harmless")
    paths = {name: str(tmp_path / f"{name}.txt") for name in names}
    for name, path in paths.items():
        Path(path).write_text("\n".join(f"{name} {n}" for n in range(30)), encoding="utf-8")
    sizes = {"direction": 8, "selection": 6, "tuning": 4, "test": 5}

    def split(seed: int = 3, given: Sequence[str] = names) -> Splits:
        options: dict[str, Any] = {name: paths[name] for name in given}
        return read_splits(named(n="8,6,4,5", seed=seed, **options))

    every, some = split(), split(given=names[:2])
    for found, test in ((every, "test_"), (some, "")):
        for name, each in found:
            if name in PURPOSES:
                for label in ("harmful", "harmless"):
                    prompts = getattr(each, label)
                    begin = (test if name == "test" else "") + label
                    assert len(prompts) == sizes[name]
                    assert {text.split()[0] for text in prompts.texts} == {begin}
                    assert {prompt.label for prompt in prompts} == {label}
    assert split() == every
    assert split(4).direction.harmful.texts != every.direction.harmful.texts
