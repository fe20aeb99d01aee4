"""The planted model with a guard whose probes are known."""

from __future__ import annotations

import pytest

from demur.guard import Guard
from planted_guard import Made, planted_guard, planted_model


@pytest.fixture(scope="session")
def made() -> Made:
    return planted_model()


@pytest.fixture(scope="session")
def guard(made: Made) -> Guard:
    return planted_guard(made)
