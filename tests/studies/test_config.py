"""Configurations: what options accept, in the forms in which people write them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from demur.errors import InputError
from demur.studies import STUDIES
from demur.studies.benchmark import Config as BenchmarkConfig
from demur.studies.config import load_config
from demur.studies.study import Config as StudyConfig


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
    assert read(layers="0-3,5").layers == (0, 1, 2, 3, 5)


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
