"""Fit, use and explain a guard: probes that score prompts, and answers while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from demur.cli.console import PATH, StageProgress, console, note, say
from demur.cli.serve import command as serve
from demur.cli.show import print_pages

if TYPE_CHECKING:
    from demur.guard import Explanation, Guard
    from demur.report.blocks import Page

_GUARD: Final = "Folder of the guard."
_MODEL: Final = "The model that the guard belongs to, folder or hub id (default: the one it names, or the bundled)."
_FPR: Final = "False-positive rate on validation prompts at which the threshold was set: 0.01 or 0.05."
_GUARD_OPTIONS: Final = (
    click.option("--guard", "folder", **PATH, required=True, help=_GUARD),
    click.option("--model", metavar="MODEL", help=_MODEL),
    click.option("--fpr", type=float, default=0.01, metavar="NUMBER", show_default=True, help=_FPR),
    click.option("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--dtype", default="auto", metavar="TEXT", help="auto, float32, bfloat16 or float16."),
    click.option("--system-prompt", metavar="TEXT", help="The system message that the guard was fitted with, if any."),
)


def guard_options(command: Any) -> Any:
    """The options of every command that loads a guard."""
    for option in reversed(_GUARD_OPTIONS):
        command = option(command)
    return command


def load_guard(folder: Path, model: str | None, fpr: float, **options: Any) -> Guard:
    """The guard, with its model loaded. Raises InputError, ModelError: it cannot be, or is another model's."""
    from demur.bundled import bundled_path
    from demur.guard import Guard, guard_model
    from demur.model import load_model

    named = guard_model(folder)
    if model is None and named.revision:
        loaded = load_model(named.name, revision=named.revision, **options)
    else:
        loaded = load_model(model or bundled_path().model, **options)
    return Guard.load(folder, loaded, fpr=fpr)


@click.group(help=__doc__)
def command() -> None:
    pass


command.add_command(serve)


@command.command("fit", short_help="Take the guard out of a finished run of `demur probes`.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", **PATH, required=True, help="Folder to write the guard to.")
def fit(run: Path, out: Path) -> None:
    """Take the guard out of the run folder RUN of a finished `demur probes`, checked, into a folder of its own.

    Its probes are those that the validation prompts of that run chose; README.md in the folder is its card.
    """
    from demur.guard import copy_guard

    model = copy_guard(run / "guard", out)
    say(f"guard of {model}: {out}")


@command.command("score", short_help="Score the prompts in a file, one line a row.")
@click.argument("file")
@guard_options
@click.option("--prompt-column", metavar="TEXT", help="Column of the prompts (default: found).")
@click.option("--out", **PATH, required=True, help="JSON Lines to write: one line a row, in order.")
def score(file: str, prompt_column: str | None, out: Path, **given: Any) -> None:
    """Score the prompts in FILE: csv, tsv, json, jsonl, txt or parquet.

    One line a row, in order: {"row": 0, "harmful": P, "refuse": P, "flagged": true, "verdict": "jailbreak"}; null where
    a row holds no prompt.
    """
    from demur.guard.tables import score_file

    with StageProgress(console(stderr=True)) as progress:
        guard = load_guard(**given)
        counts = score_file(
            guard, file, out=out, prompt_column=prompt_column, progress=lambda *done: progress("scoring", *done)
        )
    for verdict, number in counts.verdicts.items():
        say(f"{verdict}: {number} of {counts.rows}")
    say(f"flagged: {counts.flagged} of {counts.rows}")
    if counts.empty:
        note(f"{counts.empty} rows hold no prompt")
    say(f"scores: {out}")


@command.command("explain", short_help="Explain one prompt: score, tokens, features.")
@click.argument("prompt")
@guard_options
def explain(prompt: str, **given: Any) -> None:
    """Explain one PROMPT: its score, the activity of harm and refusal features on its tokens, and what each adds.

    The probes that score it and the features that explain it are two things: the features show what is in the prompt
    for them, not how the score came about.
    """
    with StageProgress(console(stderr=True)):
        guard = load_guard(**given)
        found = guard.explain(prompt)
    print_pages([explanation_page(found)], full=True)


def explanation_page(found: Explanation) -> Page:
    """An explanation as a page."""
    from demur.report.blocks import Page, Section, Table, Text, Token, Tokens
    from demur.report.format import measure, percent

    score = found.score
    verdict = (
        f"{score.verdict}: P(harmful) {percent(score.harmful)}, P(refuse) {percent(score.refuse)}"
        f"{', flagged' if score.flagged else ''}. The features alone say {percent(found.sparse[0])} and "
        f"{percent(found.sparse[1])}."
    )
    line = tuple(Token(t.text, min(t.harm, 1.0), min(t.refusal, 1.0)) for t in found.tokens)
    tokens = Tokens("Tokens", ("harm features", "refusal features"), (("prompt", line),), "1: as on refused prompts")
    rows = [[str(f.feature), f.role, measure(f.activation), measure(f.adds)] for f in found.features]
    table = Table.of("Features", "feature | role | > activation | > adds: log-odds of its explaining probe", rows)
    return Page("Explanation", (Section("Score", (Text(verdict, "verdict"), tokens, table), brief=True),))
