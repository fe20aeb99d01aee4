"""Judge a file of answers: refused, complied, harmful; null where the judge cannot tell.

Judges that cost time or money keep their verdicts in OUT.cache: the same command asks only for missing ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click
from pydantic import Field, model_validator

from demur.cli.console import PATH, StageProgress, complain, console, note, say
from demur.cli.options import ConfigCommand, read_config
from demur.studies.config import Options

if TYPE_CHECKING:
    from demur.judges import JudgeCounts


class JudgedOptions(Options):
    """What is judged, and by whom."""

    group: ClassVar[str] = "Judging"

    file: str
    """Answers: csv, tsv, json, jsonl or parquet."""
    judge: str = "patterns"
    """patterns, harmbench, wildguard, llama-guard-3, llama-guard-4, strongreject=MODEL, refusal=MODEL."""
    prompt_column: str | None = None
    """Column of the prompts (default: found)."""
    answer_column: str | None = None
    """Column of the answers (default: found)."""
    model: str | None = None
    """The model that wrote the answers, folder or hub id: what it would not write by itself is incoherent."""


class LocalOptions(Options):
    """Where a judge that is a model runs."""

    group: ClassVar[str] = "Judges that run here (harmbench, wildguard, llama-guard-…, each also =FOLDER or =HUB-ID)"

    device: str | None = None
    """auto, cpu, cuda, cuda:N, mps or balanced."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number format of the judge's model."""
    revision: str | None = None
    """Revision of the judge's model on the hub."""


class EndpointOptions(Options):
    """How a judge behind an endpoint is asked."""

    group: ClassVar[str] = "Judges behind an endpoint (strongreject=MODEL, refusal=MODEL)"

    judge_url: str | None = None
    """Address (default: OPENAI_BASE_URL, or OpenAI's; the key comes from OPENAI_API_KEY)."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Requests per minute at most."""
    concurrency: int | None = Field(default=None, ge=1)
    """Requests under way at once (default: 4)."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for one request (default: 60)."""
    prices: str | None = None
    """Prices of a million tokens in and out, to show the cost: 0.15,0.6."""

    @model_validator(mode="after")
    def _two_prices(self) -> EndpointOptions:
        self.price_of_tokens()
        return self

    def price_of_tokens(self) -> dict[str, float]:
        """The two prices by name; empty where none are given."""
        if self.prices is None:
            return {}
        try:
            read, written = map(float, self.prices.split(","))
        except ValueError as error:
            raise ValueError(f"--prices {self.prices!r}: expected two numbers, for example 0.15,0.6") from error
        return {"price_in": read, "price_out": written}


class JudgeOptions(JudgedOptions, LocalOptions, EndpointOptions):
    """All options of `demur judge`."""


def _judge(out: Path, **given: Any) -> None:
    from demur.judges import Endpoint, Placement, get_judge, judge_file
    from demur.model import load_model

    options = read_config(JudgeOptions, None, given, argument="file")
    placement = options.model_dump(include=set(LocalOptions.model_fields), exclude_none=True)
    endpoint = options.model_dump(include=set(EndpointOptions.model_fields) - {"prices"}, exclude_none=True)
    if "judge_url" in endpoint:
        endpoint["url"] = endpoint.pop("judge_url")
    endpoint |= options.price_of_tokens()
    where, asked = Placement(**placement) if placement else None, Endpoint(**endpoint) if endpoint else None
    reader = get_judge(options.judge, placement=where, endpoint=asked)
    columns: dict[str, Any] = {"prompt_column": options.prompt_column, "answer_column": options.answer_column}
    with StageProgress(console(stderr=True)) as progress:
        model = None if options.model is None else load_model(options.model)
        counts = judge_file(options.file, judge=reader, out=out, model=model, progress=progress, **columns)
    _say_counts(counts, out)


def _say_counts(counts: JudgeCounts, out: Path) -> None:
    if "outcome" in counts.gives:
        for outcome, count in counts.outcomes.items():
            say(f"{outcome.value.replace('_', ' ')}: {count} of {counts.rows}")
    if "harmful" in counts.gives:
        say(f"harmful: {counts.harmful} of {counts.rows}")
        say(f"not harmful: {counts.not_harmful} of {counts.rows}")
    say(f"unscored: {counts.unscored} ({counts.without_answer} without an answer)")
    if counts.coherence:
        wrong = counts.coherence.false_positives
        note(
            f"coherent text is told by {counts.coherence.n} answers of the model itself, of which {wrong.k} would have "
            f"been called incoherent (95 %: {wrong.low:.0%} to {wrong.high:.0%})"
        )
    if counts.cached:
        note(f"{counts.cached} answers were judged before, or equal another")
    if counts.usage:
        note(f"used: {counts.usage}")
    if counts.failed:
        complain(
            f"the judge failed on {counts.failed} of {counts.rows} answers; they are null. The same command asks only "
            f"for them again (the others are kept in {counts.cache})",
            "warning",
        )
    say(f"verdicts: {out}")


_OUT = click.Option(["--out"], **PATH, required=True, help="JSON Lines to write: one verdict a row, in order.")
command = ConfigCommand(
    "judge", JudgeOptions, help=__doc__ or "", run=_judge, argument="file", required=True, own=[_OUT]
)
