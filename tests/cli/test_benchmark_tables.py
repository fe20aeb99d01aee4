"""A benchmark's tables in a terminal of 100 columns, and the commands that print and report it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from demur.cli import app
from demur.cli._benchmark_tables import benchmark_tables
from demur.studies.benchmark.results import BenchmarkResult
from demur.studies.results import FeaturesResult
from synthetic_benchmark import BENCHMARK_SESSION, HARMFUL_ANSWER, JUDGE, emptied, synthetic_benchmark, write_run
from synthetic_results import SESSION


def printed(result: BenchmarkResult, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False)
    for part in benchmark_tables(result):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_tables_hold_the_numbers() -> None:
    lines = words_of(printed(synthetic_benchmark()))
    for expected in (
        "warning: synthetic warning: 3 prompts of <file> were dropped",
        "F* (CosSim+AP), c = −3 100 8% [0–16] 90% [82–98] 2% 0.090 0.180 0.270",
        "F* per prompt, c = −3 100 6% [0–14] 92% [84–100] 2% – – –",
        f"AP, c = −3 {JUDGE} 100+3 40% [32–48]",
        "Damage up to 0.02 nats per token: complied with (outcome judge)",
        "AP c = −1 / c = −1 +30 [20 to 40] 0.010 / 0.010 <0.001 <0.001 F* more",
        "ActDiff c = −1 / – – 0.010 / – – – –",
        "ActDiff, 2 × peak 100 88% [80–96] 10% [2–18] 2%",
        "clean – 1% [0–9] 28% [20–36] 0.88 [0.81–0.94] 93% / 6%",
        "AP, c = −3 80% [72–88] 1% [0–9] 10% [2–18] 0.88 [0.81–0.94] 93% / 6%",
        "AP, c = −3 arc acc 0.500 −0.250 [−0.740 to 0.240] 4",
        "8 c = −3 20% [12–28] 72% [64–80] 0.0800 [0.0775–0.0825]",
        "answers: 1,234 written, 5 found; verdicts: 6 given, 0 found; passes: 7 made, 8 found",
    ):
        assert expected in lines, expected
    whole = " ".join(lines)
    assert "the knee of 4 trials is trial 1: direction of layer 4, position −2, K0 = 10, K* = 5, c = −3" in whole
    assert "More than under AP (+40 [30 to 50])" in whole


def test_tables_are_readable_at_100_columns_and_cut_nothing() -> None:
    text = printed(synthetic_benchmark())
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "…" not in text


def test_the_first_lines_are_the_headline() -> None:
    first = " ".join(words_of(printed(synthetic_benchmark()))[:2])
    assert first.startswith(
        "More harmful test prompts were complied with under F* (CosSim+AP) than under AP and random"
    )


def test_tables_show_no_harmful_text() -> None:
    text = " ".join(words_of(printed(synthetic_benchmark())))
    assert "Synthetic harmful prompt" not in text
    assert HARMFUL_ANSWER.format(number=1) not in text


def test_nothing_scored_is_shown_as_dashes() -> None:
    text = printed(emptied())
    assert "nan" not in text.lower()
    assert "F* (CosSim+AP), c = −3 0+100 – – – – – –" in words_of(text)
    assert "No other method could be compared with F* (CosSim+AP)." in text


def test_parts_that_were_not_measured_have_no_table() -> None:
    result = synthetic_benchmark().model_copy(
        update={"judges": (), "induction": (), "side_effects": (), "curve": (), "tuning": None, "comparisons": ()}
    )
    text = printed(result)
    for absent in ("Attack success", "induced", "Side effects", "Capability", "Sizes of F*", "search:", "F* against"):
        assert absent not in text


def test_show_and_report_work_on_a_benchmark(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", benchmark=synthetic_benchmark(), sessions=(BENCHMARK_SESSION,))
    code, out, error = run("show", str(folder))
    assert (code, error) == (0, "")
    assert "Harmful test prompts, each method at its chosen strength" in out
    assert "unfinished" not in out
    assert max(len(line) for line in out.splitlines()) <= 120
    assert run("report", str(folder)) == (0, f"report: {folder / 'report.html'}\n", "")


def test_show_prints_both_studies_of_a_folder(tmp_path: Path, result: FeaturesResult) -> None:
    folder = write_run(tmp_path / "run", features=result, benchmark=synthetic_benchmark())
    _, out, _ = run("show", str(folder))
    assert out.index("cut refusal from 95%") < out.index("More harmful test prompts were complied with")


def test_show_names_a_benchmark_that_has_not_finished(tmp_path: Path, result: FeaturesResult) -> None:
    folder = write_run(tmp_path / "run", sessions=(BENCHMARK_SESSION,))
    code, out, _ = run("show", str(folder))
    assert code == 0
    assert "has not finished; run the same `demur benchmark` command again" in out
    write_run(folder, features=result, sessions=(SESSION, BENCHMARK_SESSION))
    code, out, _ = run("show", str(folder))
    assert code == 0
    assert "cut refusal from 95%" in out
    assert out.splitlines()[-1] == (
        f"{folder} also holds an unfinished `demur benchmark`; run the same command again to resume it."
    )


@pytest.mark.parametrize("command", ["show", "report"])
def test_a_broken_benchmark_is_named(command: str, tmp_path: Path) -> None:
    (tmp_path / "benchmark.json").write_text("{}")
    code, out, error = run(command, str(tmp_path))
    assert (code, out) == (2, "")
    assert "benchmark.json does not hold a benchmark's results" in error
