"""The toy study, known to the command line while a test runs."""

from __future__ import annotations

import pytest
import toy_study

from demur.studies import STUDIES
from demur.studies.base import Study


@pytest.fixture(autouse=True)
def toy() -> Study[toy_study.ToyConfig, toy_study.ToyResult]:
    """The study `toy` of toy_study.py."""
    return STUDIES.register("toy", toy_study.STUDY)
