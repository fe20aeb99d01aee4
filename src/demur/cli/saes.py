"""Train SAEs on a model's own chats, list those that others have trained, convert old checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from demur.cli.console import PATH, StageProgress, console, note, say
from demur.cli.options import ConfigCommand, read_config
from demur.cli.studies import CONFIG_FILE, check_model, resumable, run_folder
from demur.sae_training import SaeTraining, train

if TYPE_CHECKING:
    from demur.sae_training import Trained

_TRAIN: Final = """Train an SAE for each layer of a chat model, on its own conversations and on plain text.

Prompts are rendered in the model's template and answered by it. All layers are trained in the same passes over the model,
with SAELens (extra `saelens`). Interrupted or killed, the same command resumes where it stopped."""


@click.group(help=__doc__)
def command() -> None: ...


def _train(config: Path | None, out: Path | None, **given: Any) -> None:
    asked = read_config(SaeTraining, config, given)
    check_model(asked.model)
    folder = out or run_folder("saes-train", asked)
    note(f"run folder: {folder}")
    with resumable(folder), StageProgress(console(stderr=True)) as progress:
        made = train(asked, folder, progress)
    _print_trained(made)
    where = made.gemma_scope or made.saes
    say(f"SAEs: {folder / where}; use them with --saes {folder / where}")


def _print_trained(made: Trained) -> None:
    from rich.table import Table

    shares = ", ".join(f"{kind} {share:.0%} of {made.tokens[kind]} tokens" for kind, share in made.mix.items())
    say(f"mix: {shares}; measured on {sum(made.held_out.values())} conversations and texts that were not trained on")
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = list(dict.fromkeys(name for row in made.layers for name in row.fvu))
    for title in ("layer", *(f"FVU {name}" for name in names), "L0", "dead"):
        table.add_column(title, justify="right")
    for row in made.layers:
        fvu = (f"{row.fvu[name]:.3f}" if name in row.fvu else "-" for name in names)
        table.add_row(str(row.layer), *fvu, f"{row.l0:.1f}", f"{row.dead:.1%}")
    console().print(table)


_OUT: Final = click.Option(["--out"], **PATH, help="Folder (default: runs/MODEL-saes-train-HASH).")
command.add_command(ConfigCommand("train", SaeTraining, help=_TRAIN, run=_train, own=[CONFIG_FILE, _OUT]))
