"""Options as they are read off a configuration class, and configurations from files and options."""

from __future__ import annotations

from pathlib import Path

from toy_study import ToyConfig

from demur.cli.options import options_of, read_config
from demur.studies import STUDIES
from demur.types import SplitSizes


def test_every_field_is_one_option_with_help() -> None:
    for name in ("study", "benchmark"):
        config = STUDIES[name].config
        fields = [option.field for members in options_of(config).values() for option in members]
        assert sorted(fields) == sorted(set(config.model_fields) - {"model"})
        for members in options_of(config).values():
            for option in members:
                assert option.meaning, option.field


def test_a_field_is_spelled_by_its_name() -> None:
    options = {option.field: option for members in options_of(ToyConfig).values() for option in members}
    assert options["max_new_tokens"].opts == ["--max-new-tokens"]
    assert options["n"].opts == ["-n", "--n"]
    assert (options["aloud"].opts, options["aloud"].secondary_opts) == (["--aloud"], ["--no-aloud"])
    assert options["n"].written == "128,32,32,100"
    assert options["layers"].form == "numbers"


def test_every_way_to_give_a_value() -> None:
    given = {
        "layers": ("0-2", "7"),
        "weights": ("0,-1", "-3"),
        "words": ("a,b", "c"),
        "texts": ("x.txt",),
        "times": "4",
        "aloud": True,
        "n": "test=9,tuning=8",
        "system_prompt": "Be kind.",
        "average_l0": "70",
        "judge": None,
    }
    config = read_config(ToyConfig, None, given)
    assert config == ToyConfig(
        layers=(0, 1, 2, 7),
        weights=(0.0, -1.0, -3.0),
        words=("a,b", "c"),
        texts=("x.txt",),
        times=4,
        aloud=True,
        n=SplitSizes(test=9, tuning=8),
        system_prompt="Be kind.",
        average_l0=70.0,
    )


def test_a_file_takes_the_same_values_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "toy.toml"
    file.write_text('weights = "0,-1"\nlayers = "0-2"\nn = "8,4,4,4"\nwords = ["a"]\naloud = true\ntimes = 3\n')
    config = read_config(ToyConfig, file, {"times": "5", "aloud": False, "words": ()})
    assert config == ToyConfig(
        weights=(0.0, -1.0),
        layers=(0, 1, 2),
        n=SplitSizes(direction=8, selection=4, tuning=4, test=4),
        words=("a",),
        aloud=False,
        times=5,
    )
