"""What every study is: a configuration, a function that runs it, a result, and the sections that show the result.

A study is one file with these four, joined in a `Study` and registered by name in `STUDIES`. The command line, the TOML
file, `demur plan`, `demur show`, the report and the reference page are all made from it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pydantic import Field, ValidationError

from demur.errors import RunError
from demur.report.blocks import Page, Section
from demur.runs import Session, as_toml, read_run
from demur.studies import STUDIES
from demur.studies.config import StudyConfig
from demur.types import Value

if TYPE_CHECKING:
    from demur.studies.context import Context

ConfigT = TypeVar("ConfigT", bound=StudyConfig)
ResultT = TypeVar("ResultT", bound="StudyResult")


class StudyResult(Value):
    """Base of every study's result: what was studied, the doubts, and what it took."""

    model: str = ""
    """The model's name, for people."""
    facts: dict[str, str] = Field(default_factory=dict)
    """What was studied and with what, for people: model, SAEs, judge, prompts in each split."""
    warnings: tuple[str, ...] = ()
    """Reasons to doubt the result, most serious first."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall-clock seconds of each stage that this process ran."""


@dataclass(frozen=True)
class Study(Generic[ConfigT, ResultT]):
    """One study.

    Attributes:
        name: the command, the name of the function in `demur`, and of the file of results (`NAME.json`).
        config: pydantic model whose fields, with the docstring under each, are the options.
        result: pydantic model of what `run` gives.
        run: does the work; everything slow goes through the context's stages, so that a run resumes.
        sections: what is shown of a result, the verdict first.
    """

    name: str
    config: type[ConfigT]
    result: type[ResultT]
    run: Callable[[Context[ConfigT]], ResultT]
    sections: Callable[[ResultT], Sequence[Section]]

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
    """The results of every finished study in a run folder, in the order of the registry.

    Raises:
        RunError: the folder is not there, holds no results yet, or holds some that this version cannot read.
    """
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
    return tuple(name for name in _sessions(folder) if not (folder / f"{name}.json").is_file())


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
    """A result as a page: its sections, its facts, and what it takes to run it again."""
    facts = dict(result.facts)
    if session is not None:
        versions = ", ".join(f"{name} {version}" for name, version in session.versions.items())
        facts |= {"started": session.started, "versions": versions, "platform": session.platform}
    if result.seconds:
        facts["seconds"] = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    return Page(
        title=f"demur {study.name}: {result.model}",
        sections=tuple(study.sections(result)),
        command=f"demur {study.name} --config {study.name}.toml",
        config="" if session is None else as_toml(session.config),
        facts=tuple(facts.items()),
    )


__all__ = ["STUDIES", "Finished", "Study", "StudyResult", "page_of", "read_results", "unfinished"]
