"""The registry: built-in entries by name, those of this process, and those of installed packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from demur.errors import DemurError, InputError
from demur.registry import Registry


def registry() -> Registry[object]:
    return Registry("demur.tests", "number", {"pi": "math:pi", "tau": "math:tau"})


def test_built_in_entries_are_imported_when_asked_for() -> None:
    numbers = registry()
    assert list(numbers) == ["pi", "tau"]
    assert "pi" in numbers
    assert numbers.where("pi") == "math:pi"
    assert numbers["pi"] == pytest.approx(3.14159, abs=1e-5)


def test_an_entry_is_registered_and_taken_back() -> None:
    numbers = registry()
    assert numbers.register("three", 3) == 3
    assert list(numbers) == ["pi", "tau", "three"]
    assert numbers["three"] == 3
    assert numbers.where("three") is None
    numbers.unregister("three")
    assert "three" not in numbers


def test_a_registered_entry_stands_before_a_built_in_one() -> None:
    numbers = registry()
    numbers.register("pi", 3)
    assert (numbers["pi"], numbers.where("pi")) == (3, None)
    numbers.unregister("pi")
    assert numbers.where("pi") == "math:pi"


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no number 'e'.*there are pi, tau"):
        registry()["e"]


def test_entries_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[demur.tests]\nseven = pack_of_numbers:SEVEN\nlost = nowhere_at_all:X\n")
    (tmp_path / "pack_of_numbers.py").write_text("SEVEN = 7\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    numbers = registry()
    assert numbers["seven"] == 7
    assert numbers.where("seven") == "pack_of_numbers:SEVEN"
    with pytest.raises(DemurError, match=r"the number 'lost' of pack cannot be loaded: No module named"):
        numbers["lost"]
