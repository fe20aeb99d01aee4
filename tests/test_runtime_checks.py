"""The checks that the tests put on the package do refuse what they should."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime_checks

SOURCE = '''
"""A module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jaxtyping import Float
from torch import Tensor


def dot(a: Float[Tensor, "d"], b: Float[Tensor, "d"]) -> float:
    return float((a * b).sum())


@dataclass
class Point:
    x: int

    def moved(self, by: int) -> Self:
        return type(self)(self.x + by)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "checked_module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(sys.modules, "checked_module", raising=False)
    runtime_checks.install("checked_module")
    return import_module("checked_module")


def test_types_axes_and_fields_are_checked(module: Any) -> None:
    assert module.dot(torch.ones(3), torch.ones(3)) == 3
    for wrong in (torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.int64), [1.0]):
        with pytest.raises(TypeError):
            module.dot(torch.ones(3), wrong)
    assert module.Point(1).moved(2) == module.Point(3)
    with pytest.raises(TypeError):
        module.Point("1")
    with pytest.raises(TypeError):
        module.Point(1).moved("2")


def test_the_first_calls_in_a_test_are_checked(module: Any) -> None:
    for _ in range(runtime_checks.CALLS):
        with pytest.raises(TypeError):
            module.dot(torch.ones(3), torch.ones(2, 3))
    assert module.dot(torch.ones(3), torch.ones(2, 3)) == 6
    runtime_checks.start_test()
    with pytest.raises(TypeError):
        module.dot(torch.ones(3), torch.ones(2, 3))
