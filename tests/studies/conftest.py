"""Fixtures of the studies' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted_study import planted_files

from demur.runs import Run
from demur.testing import planted

__all__ = ["planted_files"]


@pytest.fixture(name="run")
def open_run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(tmp_path / "run", config={}) as run:
        yield run


@pytest.fixture(scope="module", name="truth")
def planted_model() -> Any:
    return planted()
