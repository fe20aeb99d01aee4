"""The page: results laid over the templates, everything escaped, nothing fetched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from demur import __version__
from demur.errors import RunError
from demur.report import _benchmark_words as benchmark_words
from demur.report import _words as words
from demur.report._benchmark_part import benchmark_part
from demur.report._features_part import features_part
from demur.report._read import read_results, sessions_of
from demur.runs import Session
from demur.runs._toml import as_toml
from demur.studies.benchmark.results import BenchmarkResult
from demur.studies.results import FeaturesResult

REPORT = "report.html"


class Repeat(NamedTuple):
    """What it takes to run a study again, and what it took."""

    name: str
    command: str
    file: str
    config: str | None
    session: Session | None
    seconds: Mapping[str, float]
    counters: str


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("demur.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "percent": words.percent,
        "interval": words.interval,
        "rate_text": words.rate_text,
        "is_known": words.is_known,
        "measure": words.measure,
        "p_text": words.p_text,
        "duration": words.duration,
        "token_text": words.token_text,
        "number": benchmark_words.number_text,
        "points": benchmark_words.points_text,
    }
    environment.filters.update(filters)
    return environment


def render(
    result: FeaturesResult | None = None,
    session: Session | None = None,
    *,
    benchmark: BenchmarkResult | None = None,
    benchmark_session: Session | None = None,
) -> str:
    """The report as one HTML page that needs no network and runs no script.

    Args:
        result: of a features study.
        session: the features study's own record; its configuration and versions are shown so that it can be repeated.
        benchmark: of a benchmark; either result is enough, and both share a page.
        benchmark_session: the benchmark's own record.

    Raises:
        ValueError: neither result is given.
    """
    main = result or benchmark
    if main is None:
        raise ValueError("nothing to report: give a result, a benchmark, or both")
    repeats: list[Repeat] = []
    if result is not None:
        repeats.append(_repeat("features study", "study", session, result.seconds))
    if benchmark is not None:
        counters = benchmark_words.counters_text(benchmark.counters)
        repeats.append(_repeat("benchmark", "benchmark", benchmark_session, benchmark.seconds, counters))
    warnings = (*(result.warnings if result else ()), *(benchmark.warnings if benchmark else ()))
    title = words.model_title(main.model.name)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=f"Refusal features of {title}" if result else f"Ways to suppress refusal in {title}, compared",
            # A study in the same folder warns of the same prompts.
            warnings=list(dict.fromkeys(warnings)),
            features=None if result is None else features_part(result),
            benchmark=None if benchmark is None else benchmark_part(benchmark),
            repeats=repeats,
            css=Markup(files("demur.report").joinpath("templates", "report.css").read_text(encoding="utf-8")),
            demur_version=__version__,
        )
    )


def _repeat(
    name: str, command: str, session: Session | None, seconds: Mapping[str, float], counters: str = ""
) -> Repeat:
    config = None if session is None else as_toml(session.config)
    return Repeat(name, f"demur {command}", f"{command}.toml", config, session, seconds, counters)


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run, by default as `report.html` in its folder; returns the page's path.

    A folder that holds a features study and a benchmark gets one page of both.

    Raises:
        RunError: the run has no readable results, or the page cannot be written.
    """
    features, benchmark = read_results(run_folder)
    session, benchmark_session = sessions_of(run_folder)
    page = render(features, session, benchmark=benchmark, benchmark_session=benchmark_session)
    path = run_folder / REPORT if out is None else out
    if path.is_dir():
        path = path / REPORT
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write the report to {path}: {error.strerror or error}; name another with --out"
        ) from error
    return path
