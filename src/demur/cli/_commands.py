"""The short commands: show, report, judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from demur.cli import _console

if TYPE_CHECKING:
    from demur.judges import JudgeCounts
    from demur.runs import RunView
else:
    JudgeCounts = object  # Imported by `judge` alone.

T = TypeVar("T")

RunArgument = Annotated[
    Path, typer.Argument(help="Run folder, as `demur study` or `demur benchmark` printed it.", show_default=False)
]


def show(run: RunArgument) -> None:
    """Print the tables of a run, or how far an unfinished one is."""
    from demur.report import read_results, unfinished
    from demur.runs import read_run

    begun = unfinished(run)
    if begun and not any((run / name).is_file() for name in ("results.json", "benchmark.json")):
        _say_progress(run, read_run(run), begun)
        return
    from demur.cli._benchmark_tables import benchmark_tables
    from demur.cli._tables import summary_tables

    features, benchmark = read_results(run)
    parts = summary_tables(features) if features is not None else []
    parts += benchmark_tables(benchmark) if benchmark is not None else []
    _console.show(parts)
    for command in begun:
        _console.say(f"{run} also holds an unfinished `{command}`; run the same command again to resume it.")


def _say_progress(run: Path, view: RunView, commands: Sequence[str]) -> None:
    names = " or ".join(f"`{command}`" for command in commands)
    _console.say(f"{run} has not finished; run the same {names} command again to resume it.")
    for name, states in _stages(view).items():
        begun = len(states) - sum(states)
        _console.say(f"  {name}: {sum(states)} done" + (f", {begun} begun" if begun else ""))


def _stages(view: RunView) -> dict[str, list[bool]]:
    """Stage name → for each stage of that name, whether it is done; names in the order of their first use."""
    states: dict[str, list[bool]] = {}
    for stage in view.stages():
        states.setdefault(stage.name, []).append(stage.done)
    return states


def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Page to write (default: report.html in the run folder).")] = None,
) -> None:
    """Write a run's report: one HTML page that needs no network."""
    from demur.report import write_report

    _console.say(f"report: {write_report(run, out)}")


_ENDPOINT = "Judges behind an endpoint: strongreject=MODEL, refusal=MODEL"
_MODEL = "Judges that run here: harmbench, wildguard, llama-guard-3, llama-guard-4, each also =FOLDER or =HUB-ID"


def judge(
    file: Annotated[Path, typer.Argument(help="Answers: csv, tsv, json, jsonl, parquet.", show_default=False)],
    out: Annotated[Path, typer.Option(help="JSON Lines to write: one verdict a row, in order.", show_default=False)],
    judge: Annotated[
        str,
        typer.Option(help="patterns, harmbench, wildguard, llama-guard-3, llama-guard-4, strongreject=…, refusal=…"),
    ] = "patterns",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompts (default: found).", show_default=False)
    ] = None,
    response_column: Annotated[
        str | None, typer.Option(help="Column of the answers (default: found).", show_default=False)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda, cuda:N, mps or balanced.", show_default=False, rich_help_panel=_MODEL),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Number format of the judge's model.", show_default=False, rich_help_panel=_MODEL),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Revision of the judge's model on the hub.", show_default=False, rich_help_panel=_MODEL),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            help="Address (default: OPENAI_BASE_URL, or OpenAI's; the key comes from OPENAI_API_KEY).",
            show_default=False,
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="At most so many.", show_default=False, rich_help_panel=_ENDPOINT)
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Questions under way at once (default: 4).", show_default=False, rich_help_panel=_ENDPOINT),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for one request (default: 60).", show_default=False, rich_help_panel=_ENDPOINT),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            help="Of a million tokens in and out, to show the cost: 0.15,0.6",
            show_default=False,
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
) -> None:
    """Judge a file of answers: refused, complied, harmful; null where the judge cannot tell.

    Judges that cost time or money keep verdicts in OUT.cache: the same command asks only for missing ones.
    """
    from demur.cli._progress import StageProgress
    from demur.judges import Endpoint, Placement, get_judge, judge_file

    placement = {"device": device, "dtype": dtype, "revision": revision}
    endpoint: dict[str, Any] = {
        "url": judge_url,
        "requests_per_minute": requests_per_minute,
        "concurrency": concurrency,
        "timeout": timeout,
        **_prices(prices),
    }
    reader = get_judge(
        judge,
        placement=_given(Placement, placement),
        endpoint=_given(Endpoint, endpoint),
    )
    with StageProgress(_console.err()) as progress:
        counts = judge_file(
            file,
            judge=reader,
            prompt_column=prompt_column,
            answer_column=response_column,
            out=out,
            progress=progress,
        )
    _say_counts(counts, out)


def _given(cls: Callable[..., T], options: Mapping[str, Any]) -> T | None:
    """The options that were given, as a `cls`; None when there are none."""
    found = {name: value for name, value in options.items() if value is not None}
    return cls(**found) if found else None


def _prices(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    from demur.errors import InputError

    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--prices {text!r}: expected two numbers, for example 0.15,0.6") from error
    return {"price_in": read, "price_out": written}


def _say_counts(counts: JudgeCounts, out: Path) -> None:
    if "outcome" in counts.gives:
        for outcome, count in counts.outcomes.items():
            _console.say(f"{outcome.value.replace('_', ' ')}: {count} of {counts.rows}")
    if "harmful" in counts.gives:
        _console.say(f"harmful: {counts.harmful} of {counts.rows}")
        _console.say(f"not harmful: {counts.not_harmful} of {counts.rows}")
    _console.say(f"unscored: {counts.unscored} ({counts.without_answer} without an answer)")
    if counts.cached:
        _console.note(f"{counts.cached} answers were judged before, or are equal to another")
    if counts.usage:
        _console.note(f"used: {counts.usage}")
    if counts.failed:
        _console.complain(
            f"the judge failed on {counts.failed} of {counts.rows} answers; they are null. The same command asks only "
            f"for them again (the others are kept in {counts.cache})",
            "warning",
        )
    _console.say(f"verdicts: {out}")
