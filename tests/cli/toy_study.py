"""Count prompts, as a study in one file.

It shows that a study needs nothing but its own file: command, help, TOML file, plan and report are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from demur.report.blocks import Section, Table, Text
from demur.studies.base import Study, StudyResult
from demur.studies.config import Numbers, Sources, StudyConfig

if TYPE_CHECKING:
    from demur.studies.context import Context


class ToyConfig(StudyConfig):
    """What is counted."""

    group: ClassVar[str] = "Counting"

    times: int = Field(default=2, ge=1)
    """How often to count."""
    weights: Numbers = (0.5, 1.0)
    """Weights of the counts."""
    words: tuple[str, ...] = ()
    """Words to count (default: none)."""
    side: Literal["harmful", "harmless"] = "harmful"
    """Which prompts to count."""
    aloud: bool = False
    """Count aloud."""
    texts: Sources = ()
    """Texts to read; repeatable."""


class ToyResult(StudyResult):
    """What was counted."""

    count: float
    words: tuple[str, ...]


def run(context: Context[ToyConfig]) -> ToyResult:
    """Count the test prompts of one side, and answer them."""
    config = context.config
    prompts = getattr(context.splits.test, config.side)
    with context.timed("answering"):
        for _ in range(config.times):
            context.answer("counting", prompts)
    return ToyResult(count=len(prompts) * sum(config.weights), words=config.words)


def sections(result: ToyResult) -> Sequence[Section]:
    """The count first, the words with `--full`."""
    return (
        Section("Count", (Text(f"There are {result.count:g}.", role="verdict"),), brief=True),
        Section("Words", (Table.of("The words", ["word"], [(word,) for word in result.words]),)),
    )


STUDY = Study("toy", ToyConfig, ToyResult, run, sections)
