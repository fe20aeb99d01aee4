"""A command for each study, made from the study's configuration class."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from demur.cli.console import PATH, StageProgress, complain, console, note, say
from demur.cli.options import ConfigCommand, read_config
from demur.cli.show import FULL, pages, print_pages, write_pages
from demur.cli.workers import OPTIONS, Helpers, await_the_leader, fitting_workers, is_finished
from demur.errors import InputError
from demur.studies import STUDIES

if TYPE_CHECKING:
    from demur.sae_training import SaeTraining
    from demur.studies.config import StudyConfig

_SETTINGS: Final = "TOML file with settings, under the names of the options; options win over it."
_FOLDER: Final = "Run folder (default: runs/MODEL-STUDY-HASH, so that the same command resumes)."
CONFIG_FILE: Final = click.Option(["--config"], **PATH, help=_SETTINGS)
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_RESUME: Final = "Interrupted or killed, the same command resumes where it stopped."


def study_command(name: str, told: str) -> ConfigCommand:
    """The command that runs a study; `told` is what it does."""

    def run(config: Path | None, out: Path | None, full: bool, workers: int | None, join: bool, **given: Any) -> None:
        asked = configured(name, config, given)
        folder = out or run_folder(name, asked)
        note(f"run folder: {folder}")
        _run(name, asked, folder, workers or (1 if join else fitting_workers(asked)), join)
        if join and not is_finished(folder):
            note("this part is done; the process that leads the run writes the result")
        else:
            _show(name, folder, full)

    own = [CONFIG_FILE, click.Option(["--out"], **PATH, help=_FOLDER)]
    own += [click.Option(["--full"], is_flag=True, help=FULL), *OPTIONS]
    return ConfigCommand(name, STUDIES[name].config, help=f"{told}\n\n{_RESUME}", run=run, own=own)


def configured(
    name: str, file: Path | None, given: dict[str, Any], complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> StudyConfig:
    """A study's configuration from a TOML file and options; `complete` as in `read_config`. Raises InputError: a value
    does not fit, or the model's folder is not there."""
    config: StudyConfig = read_config(STUDIES[name].config, file, given, complete=complete)
    check_model(config.model)
    return config


def _run(name: str, config: StudyConfig, folder: Path, workers: int, join: bool) -> None:
    with Helpers(workers, config.device) as helpers, resumable(folder), StageProgress(console(stderr=True)) as progress:
        from demur.studies.context import run_study

        def told(stage: str, done: int, total: int) -> None:
            helpers.go()  # What is told first is told by a process that holds the run folder.
            progress(stage, done, total)

        await_the_leader()
        run_study(STUDIES[name], config, folder, progress=told, shared=workers > 1, join=join)


def _show(name: str, folder: Path, full: bool) -> None:
    print_pages([page for page in pages(folder) if page.title.startswith(f"demur {name}:")], full=full)
    try:
        say(f"report: {write_pages(folder)}")
    except MemoryError:
        complain(f"memory ran out while the report was drawn; `demur report {folder}` draws it again", "warning")


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Say of an interruption that what is done is kept in `folder`, and how to go on."""
    arguments: list[str] = click.get_current_context().find_root().obj
    try:
        yield
    except KeyboardInterrupt as stop:
        again = shlex.join(["demur", *arguments])
        raise type(stop)(f"what is done is kept in {folder}; to resume run again: {again}") from None


def run_folder(name: str, config: StudyConfig | SaeTraining) -> Path:
    """`runs/MODEL-STUDY-HASH`: the same configuration finds the same folder, so that the same command resumes."""
    parts = [part for part in Path(config.model or "bundled").parts if part not in {"/", ".", "..", "model"}]
    model = re.sub(r"[^\w.-]+", "-", parts[-1]) if parts else "model"
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    return Path("runs") / f"{model}-{name}-{digest[:8]}"


def check_model(model: str | None) -> None:
    """Refuse what is neither a model folder nor shaped like a hub id; the InputError names the nearest folder."""
    if model is None:
        return
    folder = Path(model).expanduser()
    expected = "expected a folder with config.json, or a Hugging Face id (owner/name)"
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f" (did you mean {inside[0]}?)" if inside else ""
        raise InputError(f"{folder} is not a model folder: there is no config.json in it{hint}")
    if folder.is_file():
        raise InputError(f"{folder} is a file; {expected}")
    if not folder.exists() and not _HUB_ID.fullmatch(model):
        raise InputError(f"no model folder {model!r} here{_nearest_folder(folder)}; {expected}")


def _nearest_folder(folder: Path) -> str:
    from difflib import get_close_matches

    for part in (folder, *folder.parents):
        if part.parent.is_dir():
            beside = [path.name for path in part.parent.iterdir() if path.is_dir()]
            near = get_close_matches(part.name, beside, n=1)
            return f" (did you mean {part.parent / near[0] / folder.relative_to(part)}?)" if near else ""
    return ""
