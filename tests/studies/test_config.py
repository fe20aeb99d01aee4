"""Configurations: what options accept, in the forms in which people write them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from demur.bundled import bundled_prompts
from demur.errors import InputError
from demur.saes import get_preset
from demur.studies import STUDIES
from demur.studies.benchmark import Config as BenchmarkConfig
from demur.studies.config import load_config
from demur.studies.inputs import read_splits, with_paper_settings
from demur.studies.study import Config as StudyConfig
from demur.types import PURPOSES


def read(**options: Any) -> BenchmarkConfig:
    return load_config(None, options, BenchmarkConfig)


def test_f_star_comes_first_and_local_sets_bring_their_global_ones() -> None:
    assert read(methods=("random", "cossim")).methods == ("cossim+ap", "random", "cossim")
    assert read(methods=("ap-local",)).methods == ("cossim+ap", "ap-local", "ap")
    assert read(sizes="5,1,5").sizes == (1, 5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0,-1,-3", (0.0, -1.0, -3.0)), (-3, (-3.0,)), ([0, "-1,-2"], (0.0, -1.0, -2.0)), (("0.5",), (0.5,))],
)
def test_numbers_are_read_in_every_form(given: Any, expected: tuple[float, ...]) -> None:
    assert read(suppress=given).suppress == expected


def test_split_sizes_and_layers() -> None:
    assert read(n="test=50,tuning=16").n.wanted() == {"direction": 128, "selection": 32, "tuning": 16, "test": 50}
    assert read(n="9,8,7,6").n.wanted() == {"direction": 9, "selection": 8, "tuning": 7, "test": 6}
    assert read(layers="0-3,5").layers == read(layers=" 0 - 3, 5").layers == (0, 1, 2, 3, 5)
    assert read(layers="4-4").layers == read(layers="4").layers == read(layers=[4]).layers == (4,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": "test=5,test=6"}, "test split is given twice"),
        ({"n": "1,2,3"}, "expected 4"),
        ({"n": "test=1"}, "greater than or equal to 2"),
        ({"layers": "0,0,0"}, "layer 0 is named twice"),
        ({"layers": "a-b"}, "expected for example 0-5,8,10"),
        ({"suppress": "1"}, "c = 1 changes nothing"),
        ({"induce": "0"}, "above 0"),
        ({"ce_levels": "-1"}, "above 0"),
        ({"sizes": "0"}, "begin at 1"),
        ({"seed": 2**64}, "seed"),
        ({"harmful": "a.csv"}, "--harmful given without a model"),
        ({"model": "m", "harmful": "a.csv"}, "no harmless prompts given"),
        ({"knowlege": True}, "knowlege"),
        ({"k": "many"}, "k: "),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        read(**options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("supress = [0]", {}, "FILE: there is no setting 'supress'; did you mean suppress?"),
        ("zzzz = 1", {}, "FILE: there is no setting 'zzzz'"),
        ("", {"zzzz": 1}, "there is no setting 'zzzz'"),
        ("suppress = [1]", {}, "FILE: suppress: c = 1 changes nothing; leave it out"),
        ("suppress = [1]", {"k": 3}, "FILE: suppress: c = 1 changes nothing; leave it out"),
        ("k = 3", {"suppress": "1"}, "--suppress: c = 1 changes nothing; leave it out"),
        ("k = 0\nk0 = 0", {"k": "0"}, "FILE: k0: should be greater than or equal to 1\n  --k: should be greater than "
                                      "or equal to 1"),
        ('harmful = ["a", 3]', {}, "FILE: harmful.1: should be a valid string"),
        ("", {"sizes": "3,0,2"}, "--sizes: sizes and dimensions begin at 1"),
        ("", {"n": [9, 8]}, "--n: '9,8' has 2 numbers; expected 4: direction,selection,tuning,test"),
        ("", {"n": "test=x"}, "--n: test=x is not a size; expected direction,selection,tuning,test or "
                              "test=50,tuning=16"),
        ("", {"n": "rest=4"}, "--n: rest=4 is not a size; expected direction,selection,tuning,test or "
                              "test=50,tuning=16"),
        ("", {"harmful": "a"}, "--harmful given without a model: the bundled model has its own SAEs and prompts. Name "
                               "a MODEL, or leave them out"),
        ("", {"saes_revision": "x", "saes": "y"}, "--saes, --saes-revision given without a model: the bundled model has"
                                                  " its own SAEs and prompts. Name a MODEL, or leave them out"),
    ],
)  # fmt: skip
def test_a_message_names_the_option_or_the_setting_in_the_file(
    tmp_path: Path, file: str, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "benchmark.toml"
    path.write_text(file, encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_config(path, options, BenchmarkConfig, spelled=lambda name: f"--{name}")
    said = sorted(str(error.value).replace(str(path), "FILE").split("\n  "))
    wanted = sorted(message.split("\n  "))
    assert said == wanted


def test_a_file_that_cannot_be_read_is_named_and_none_is_needed(tmp_path: Path) -> None:
    for content, words in ((b"k = = 3", "is not valid TOML"), (b"k = '\xff'", "cannot read the configuration")):
        path = tmp_path / "broken.toml"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"broken\.toml") as error:
            load_config(path, {}, BenchmarkConfig)
        assert words in str(error.value)
    with pytest.raises(InputError, match=r"cannot read the configuration .*none\.toml"):
        load_config(tmp_path / "none.toml", {}, BenchmarkConfig)
    with pytest.raises(InputError, match=r"^configuration: there is no setting"):
        load_config(None, {}, BenchmarkConfig, complete=lambda values: {**values, "zzzz": 1})
    assert load_config(None, {"k": 3}, BenchmarkConfig, complete=lambda values: {**values, "k0": 2}).k0 == 2


def test_numbers_layers_and_split_sizes_in_lists() -> None:
    assert read(n=[9, 8, 7, "6"]).n.wanted() == read(n=("9", 8, 7, 6)).n.wanted() == read(n="9, 8,7,6").n.wanted()
    assert read(n="tuning=5").n.wanted() == {"direction": 128, "selection": 32, "tuning": 5, "test": 100}
    assert read(suppress=[0, [-1, "-2, -3"]], sizes=[5, "1,3"]).sizes == (1, 3, 5)
    assert read(suppress="0,-1,0,").suppress == (0.0, -1.0)
    assert read(over_refusal="a.csv").over_refusal == ("a.csv",)
    assert read(over_refusal=["a.csv", "b"]).over_refusal == ("a.csv", "b")


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.toml"
    path.write_text('methods = ["ap"]\nrandom_sets = 2\nn = "test=40"\nsuppress = [0, -1]\n', encoding="utf-8")
    found = load_config(path, {"random_sets": 4, "k": None}, BenchmarkConfig)
    assert (found.methods, found.random_sets, found.n.test, found.k) == (("cossim+ap", "ap"), 4, 40, 20)


def test_the_papers_strength_joins_those_that_a_benchmark_tries_and_replaces_a_studys() -> None:
    paper = {"suppress": (-3.0,), "k": 20}
    assert BenchmarkConfig(suppress=(0.0, -1.0)).with_settings(paper).suppress == (-3.0, 0.0, -1.0)
    assert StudyConfig(suppress=(0.0, -1.0)).with_settings(paper).suppress == (-3.0,)


def test_every_option_of_every_study_has_help_and_a_group() -> None:
    for name in STUDIES:
        config = STUDIES[name].config
        for field, info in config.model_fields.items():
            assert info.description, f"{name}: {field} has no docstring"
            owners = [each for each in config.__mro__ if field in inspect.get_annotations(each)]
            assert any("group" in vars(each) for each in owners), f"{name}: {field} belongs to no group"


def test_the_papers_settings_are_those_of_the_preset_named_for_the_saes_or_of_the_models(tmp_path: Path) -> None:
    def with_paper(model: str, saes: str | None, *, paper: bool = True) -> StudyConfig:
        config = StudyConfig(model=model, saes=saes, harmful=("a",), harmless=("b",), paper_settings=paper, k=7)
        return with_paper_settings(config)

    gemma, llama = "google/gemma-2-2b-it", "meta-llama/Llama-3.1-8B-Instruct"
    expected = {name: get_preset(name).study_settings() for name in (gemma, llama)}
    assert expected[gemma] != expected[llama]
    for model, saes, preset in (
        (gemma, None, gemma), (llama, None, llama), ("a/fine-tune", llama, llama), (llama, gemma, gemma),
        (gemma, str(tmp_path), gemma),
    ):  # fmt: skip
        found = with_paper(model, saes)
        for name, value in expected[preset].items():
            if name in StudyConfig.model_fields:
                assert getattr(found, name) == value, (model, saes, name)
    assert with_paper(gemma, None, paper=False).k == 7
    with pytest.raises(InputError, match="no preset for 'a/fine-tune'"):
        with_paper("a/fine-tune", str(tmp_path))


def test_the_bundled_models_prompts_keep_its_own_test_prompts_apart() -> None:
    prompts = bundled_prompts()
    splits = read_splits(StudyConfig.model_validate({"n": "8,6,4,5", "seed": 3}))
    for label in ("harmful", "harmless"):
        known = set(getattr(prompts, label).texts)
        sizes = {name: len(getattr(split, label)) for name, split in splits if name in PURPOSES}
        assert sizes == {"direction": 8, "selection": 6, "tuning": 4, "test": 5}
        for name, split in splits:
            if name in PURPOSES:
                own = set(getattr(split, label).texts)
                assert own <= (set(getattr(prompts, f"test_{label}").texts) if name == "test" else known), name
    other = read_splits(StudyConfig.model_validate({"n": "8,6,4,5", "seed": 4}))
    assert other.direction.harmful.texts != splits.direction.harmful.texts
