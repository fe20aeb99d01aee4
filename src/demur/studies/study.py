"""Find the features that make a model refuse, prove it on held-out prompts, and write a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demur.studies.base import Study
from demur.studies.config import CompareConfig
from demur.studies.results import CompareResult
from demur.studies.sections import compare_sections

if TYPE_CHECKING:
    from demur.studies.context import Context


class Config(CompareConfig):
    """F*, random controls and the refusal direction, at strengths chosen on tuning prompts."""


def run(context: Context[Config]) -> CompareResult:
    """Find F* and compare it with its controls and the direction."""
    from demur.studies.compare import run_comparison

    return run_comparison(context)


STUDY = Study("study", Config, CompareResult, run, compare_sections)
