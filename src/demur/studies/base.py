"""What every study is: a configuration, a function that runs it, a result, and the sections that show the result.

A study is one file with these four, joined in a `Study` and registered by name in `STUDIES`. The command line, the TOML
file, `demur plan`, `demur show`, the report and the reference page are all made from it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from pydantic import Field, ValidationError

from demur.errors import DemurError, InputError, RunError
from demur.report.blocks import Chart, Page, Section, Text
from demur.report.format import model_title
from demur.runs import Session, as_toml, read_run
from demur.stats import Estimate
from demur.studies import STUDIES
from demur.studies.config import StudyConfig
from demur.types import Value

if TYPE_CHECKING:
    import pandas

    from demur.saes import Suite
    from demur.studies.context import Context

ConfigT = TypeVar("ConfigT", bound=StudyConfig)


class StudyResult(Value):
    """Base of every study's result: what was studied, the doubts, and what it took.

    In a notebook a result shows its page. Its fields that are tuples of rows become data frames with `to_frame`.
    `study` and `model` are names for people.
    """

    study: str = ""
    model: str = ""
    facts: dict[str, str] = Field(default_factory=dict)
    """What was studied and with what, for people: model, SAEs, judge, prompts in each split."""
    warnings: tuple[str, ...] = ()
    """Reasons to doubt the result, most serious first."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall-clock seconds of each stage that this process ran."""

    def page(self) -> Page:
        """The result as sections, ready to be drawn."""
        return page_of(STUDIES[self.study], self)

    def save_report(self, path: str | Path) -> Path:
        """Write the result as a page: HTML, or Markdown where the name ends in `.md`; returns its path. Raises
        RunError: it cannot be written."""
        from demur.report import write_report

        return write_report([self.page()], Path(path))

    def chart(self, title: str | None = None) -> Any:
        """One of the result's charts as an altair chart: the first, or the one of that title. Raises InputError: there
        is no such chart; names those that exist."""
        charts = [b for section in self.page().sections for b in section.blocks if isinstance(b, Chart)]
        if found := [chart for chart in charts if title in (None, chart.title)]:
            return found[0].draw()
        raise InputError(f"there is no chart {title!r}; there are {', '.join(repr(c.title) for c in charts) or 'none'}")

    def to_frame(self, table: str | None = None) -> pandas.DataFrame:
        """One of the result's tables, the field `table` (default: `effects`, or the first field of rows), as a pandas
        data frame; an estimate becomes `NAME`, `NAME_low`, `NAME_high`, `NAME_n`. Raises InputError: there is no such
        table; names those that exist; DemurError: pandas is not installed."""
        tables = {name: rows for name in type(self).model_fields if (rows := _rows(getattr(self, name)))}
        name = table or ("effects" if "effects" in tables else next(iter(tables), ""))
        if name not in tables:
            raise InputError(f"there is no table {name!r}; there are {', '.join(tables) or 'none'}")
        return data_frame(_flat(row) for row in tables[name])

    def _repr_html_(self) -> str:
        from demur.report import notebook_html

        return notebook_html(self.page())


ResultT = TypeVar("ResultT", bound=StudyResult)


def data_frame(rows: Iterable[Mapping[str, object]]) -> pandas.DataFrame:
    """Rows as a pandas data frame. Raises DemurError: pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise DemurError("data frames need pandas; install it with: pip install pandas") from error
    return pandas.DataFrame(list(rows))


def _rows(value: object) -> tuple[Value, ...]:
    if not isinstance(value, tuple):
        return ()
    items = cast("tuple[object, ...]", value)
    return cast("tuple[Value, ...]", items) if items and all(isinstance(each, Value) for each in items) else ()


def _flat(value: Value, prefix: str = "") -> dict[str, object]:
    """A row's fields by name; nested values with the name of their field before theirs."""
    found: dict[str, object] = {}
    for name in type(value).model_fields:
        item = getattr(value, name)
        if isinstance(item, Estimate):
            found[prefix + name] = item.value
            found |= {f"{prefix}{name}_{part}": getattr(item, part) for part in ("low", "high", "n")}
        elif isinstance(item, Value):
            found |= _flat(item, f"{prefix}{name}_")
        else:
            found[prefix + name] = item
    return found


@dataclass(frozen=True)
class Study(Generic[ConfigT, ResultT]):
    """One study."""

    name: str
    """The command, the name of the function in `demur`, and of the file of results (`NAME.json`)."""
    config: type[ConfigT]
    """Its fields, with the docstring under each, are the options."""
    result: type[ResultT]
    run: Callable[[Context[ConfigT]], ResultT]
    """Does the work; everything slow goes through the context's stages, so that a run resumes."""
    sections: Callable[[ResultT], Sequence[Section]]
    """What is shown of a result, the verdict first."""
    residual: str = ""
    """Why it needs SAEs of the residual stream; "" where it takes transcoders as well."""

    def check(self, suite: Suite) -> None:
        """InputError where the study cannot work with such dictionaries."""
        if self.residual and suite.reads:
            raise InputError(
                f"`demur {self.name}` needs SAEs of the residual stream: {self.residual}. {suite.source} holds "
                "transcoders; name SAEs instead"
            )

    @property
    def file(self) -> str:
        """Name of the file of results in a run folder."""
        return f"{self.name}.json"


class Finished(NamedTuple):
    """A study's result in a run folder, and the session that made it."""

    study: Study[Any, Any]
    result: StudyResult
    session: Session | None


def read_results(folder: Path) -> tuple[Finished, ...]:
    """The results of every finished study in a run folder, in the order of the registry. Raises RunError: the folder is
    not there, holds no results yet, or holds some that this version cannot read."""
    if not folder.is_dir():
        raise RunError(f"no run folder {folder}; name the folder that a study wrote (its --out)")
    sessions = _sessions(folder)
    found = tuple(
        Finished(study, _read(folder / study.file, study), sessions.get(name))
        for name in STUDIES
        if (folder / f"{name}.json").is_file()
        for study in (STUDIES[name],)
    )
    if found:
        return found
    if begun := unfinished(folder):
        commands = " or ".join(f"`demur {name}`" for name in begun)
        raise RunError(f"the run {folder} has not finished; run the same {commands} command again to resume it")
    raise RunError(f"{folder} is not a run folder: it holds neither a study's results nor a manifest.json")


def unfinished(folder: Path) -> tuple[str, ...]:
    """Names of the studies that were begun in the folder and have left no results there."""
    return tuple(name for name in _sessions(folder) if name in STUDIES and not (folder / f"{name}.json").is_file())


def _sessions(folder: Path) -> dict[str, Session]:
    """Study → its latest session."""
    if not (folder / "manifest.json").is_file():
        return {}
    return {session.command: session for session in read_run(folder).manifest.sessions}


def _read(path: Path, study: Study[Any, ResultT]) -> ResultT:
    try:
        return study.result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunError(
            f"{path} does not hold the results of `demur {study.name}` as this version writes them ({where}: "
            f"{first['msg']}); run the command again, or use the version that its manifest names"
        ) from None


def page_of(study: Study[Any, ResultT], result: ResultT, session: Session | None = None) -> Page:
    """A result as a page: its sections, its warnings, its facts, and what it takes to run it again."""
    facts = dict(result.facts)
    if session is not None:
        versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
        facts |= {"started": session.started, "versions": versions, "platform": session.platform}
    if result.seconds:
        facts["seconds"] = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    doubts = Section("Doubts", tuple(Text(warning, "warning") for warning in result.warnings), brief=True)
    return Page(
        title=f"demur {study.name}: {model_title(result.model)}",
        sections=(*study.sections(result), *([doubts] if doubts.blocks else [])),
        command=f"demur {study.name} --config {study.name}.toml",
        config="" if session is None else as_toml(session.config),
        facts=tuple(facts.items()),
    )
