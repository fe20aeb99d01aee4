"""`import demur`: light, and with the names that the documentation uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import demur


def test_importing_demur_loads_nothing() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport demur\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "demur"


def test_every_name_is_there() -> None:
    assert dir(demur) == sorted(demur.__all__)
    for name in demur.__all__:
        assert getattr(demur, name) is not None
    # The functions of the example in the README, and what they take and give.
    assert {"load_model", "load_saes", "load_prompts", "find_features", "compare", "judge", "run"} < set(dir(demur))


def test_a_study_is_a_function_of_its_name() -> None:
    assert demur.benchmark.func is demur.run  # type: ignore[attr-defined]
    assert demur.benchmark.args == ("benchmark",)  # type: ignore[attr-defined]
    with pytest.raises(demur.DemurError, match="methodz"):
        demur.benchmark(methodz=("cossim",))  # type: ignore[attr-defined]


def test_a_name_that_is_not_there_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"demur has no 'load_modle'; it has .*load_model"):
        _ = demur.load_modle  # type: ignore[attr-defined]


def test_prompts_without_a_source_are_those_of_the_bundled_model() -> None:
    from demur.bundled import bundled_prompts

    splits, bundled = demur.load_prompts(n="10,4,4,4", seed=3), bundled_prompts()
    assert {*splits.direction.harmful.texts} < {*bundled.harmful.texts}
    assert {*splits.test.harmless.texts} < {*bundled.test_harmless.texts}
    assert (len(splits.direction.harmful), len(splits.test.harmless)) == (10, 4)
    with pytest.raises(demur.DemurError, match="no harmless prompts are named"):
        demur.load_prompts(harmful="advbench")


def test_sizes_of_splits_are_written_as_on_the_command_line(tmp_path: Path) -> None:
    for name in ("harmful", "harmless"):
        lines = "\n".join(f"What about the {name} thing number {n} of {n * n}?" for n in range(40))
        (tmp_path / f"{name}.txt").write_text(lines, encoding="utf-8")
    splits = demur.load_prompts(tmp_path / "harmful.txt", tmp_path / "harmless.txt", n="10,4,4,2")
    assert (len(splits.direction.harmful), len(splits.test.harmless)) == (10, 2)
    with pytest.raises(demur.DemurError, match="few"):
        demur.load_prompts(tmp_path / "harmful.txt", tmp_path / "harmless.txt", n="few")
