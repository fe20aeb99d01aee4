"""Compare F* with other ways to suppress and induce refusal: held-out prompts, side effects, equal settings for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from demur.studies.base import Study
from demur.studies.config import CompareConfig, Factors, SetSizes, SideEffectOptions, TuneOptions
from demur.studies.results import CompareResult
from demur.studies.sections import compare_sections

if TYPE_CHECKING:
    from demur.studies.context import Context


class Config(CompareConfig, SideEffectOptions, TuneOptions):
    """Every method at every strength, with all side effects."""

    methods: tuple[str, ...] = (
        "cossim+ap", "cossim+ap-local", "ap", "ap-falling", "ap-local", "actdiff", "cossim", "random", "random-pool",
        "direction", "direction-affine", "subspace", "subspace-clusters",
    )  # fmt: skip
    """Methods to compare with F*; repeatable. `-local` sets are each prompt's own; `random` and `random-pool` are
    controls."""
    suppress: Factors = Field(default=(0.5, 0.0, -1.0, -2.0, -3.0), min_length=1)
    """Scale factors c to try, as 0,-1,-3; the tuning prompts choose one for each method."""
    controls: Literal["chosen", "all"] = "all"
    """Answer under random controls at the strength chosen for F* only, or at all of them."""
    sizes: SetSizes = (1, 2, 5, 10, 20, 50, 100, 200)
    """Sizes of F* whose effect is measured, as 1,2,5,10 (as far as the pool goes)."""

    def with_settings(self, settings: Mapping[str, object]) -> Self:
        """A preset's settings laid over this configuration. The paper's c joins the strengths that are tried: it was
        chosen for the paper's method, and the others are to have their own."""
        mine = super().with_settings(settings)
        return mine.model_copy(update={"suppress": tuple(dict.fromkeys((*mine.suppress, *self.suppress)))})


def run(context: Context[Config]) -> CompareResult:
    """Compare every method, with all side effects."""
    from demur.studies.compare import run_comparison

    return run_comparison(context)


STUDY = Study("benchmark", Config, CompareResult, run, compare_sections)
