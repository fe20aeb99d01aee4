"""Train SAEs on a model's own chats, list those that others have trained, convert old checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from demur.cli.console import PATH, StageProgress, console, note, say
from demur.cli.options import ConfigCommand, read_config
from demur.cli.studies import CONFIG_FILE, check_model, resumable, run_folder
from demur.sae_training import SaeTraining, train

if TYPE_CHECKING:
    from demur.sae_training import Trained
    from demur.saes.listing import Release

_TRAIN: Final = """Train an SAE for each layer of a chat model, on its own conversations and on plain text.

Prompts are rendered in the model's template and answered by it. All layers are trained in the same passes over the
model, with SAELens (extra `saelens`). Interrupted or killed, the same command resumes where it stopped."""


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
    say(f"SAEs, for --saes: {folder / where}")


def _print_trained(made: Trained) -> None:
    shares = ", ".join(f"{kind} {share:.0%} of {made.tokens[kind]} tokens" for kind, share in made.mix.items())
    say(f"mix: {shares}; measured on {sum(made.held_out.values())} conversations and texts that were not trained on")
    names = list(made.layers[0].fvu)
    fvu = {row.layer: [f"{row.fvu.get(name, math.nan):.3f}" for name in names] for row in made.layers}
    rows = [(str(row.layer), *fvu[row.layer], f"{row.l0:.1f}", f"{row.dead:.1%}") for row in made.layers]
    _table(("layer", *(f"FVU {name}" for name in names), "L0", "dead"), rows)


_OUT: Final = click.Option(["--out"], **PATH, help="Folder (default: runs/MODEL-saes-train-HASH).")
command.add_command(ConfigCommand("train", SaeTraining, help=_TRAIN, run=_train, own=[CONFIG_FILE, _OUT]))


@command.command("list")
@click.option("--model", metavar="ID", help="Only SAEs of this model, and of the base or chat model of its name.")
@click.option("--all", "every", is_flag=True, help="Also those that demur cannot read, and why.")
def list_saes(model: str | None, every: bool) -> None:
    """List SAEs that others have trained, chat-trained ones first: demur's presets, and the registry of SAELens (extra
    `saelens`; its file is read, nothing is downloaded). What SAEs are is read from the names of releases."""
    from demur.saes.listing import list_presets, list_releases

    releases = list_releases(model)
    presets = list_presets(model)
    if presets:
        rows = [(each.name, _trained(each.chat_trained), each.width or "-", each.saes) for each in presets]
        _table(("preset", "trained on", "width", "SAEs"), rows)
        say("")
    if releases is None:
        note("what the registry of SAELens has besides is listed with the extra: pip install 'demur[saelens]'")
    else:
        shown = [each for each in releases if every or each.unreadable is None]
        titles = ("--saes", "model", "trained on", "layers", "widths", "L0", *(("demur reads it",) if every else ()))
        _table(titles, [_release(each, every) for each in shown])
        left = len(releases) - len(shown)
        if left:
            say(f"{left} more are of other activations or forms; --all lists them.")
    # Chat-trained first; presets before releases.
    known = [(not each.chat_trained, each.name, "") for each in presets]
    for each in releases or ():
        if each.unreadable is None:
            width = f" --sae-width {each.widths[0]}" if len(each.widths) > 1 else ""
            known.append((not each.chat_trained, each.source, width))
    if model and known:
        _, source, width = min(known, key=lambda each: each[0])
        say(f"demur study {model} --saes {source}{width} --harmful HARMFUL --harmless HARMLESS")


def _trained(chat: bool) -> str:
    return "chat model" if chat else "base model"


def _release(each: Release, every: bool) -> tuple[str, ...]:
    from demur.saes import spans

    l0 = f"{min(each.l0):g}" + (f" to {max(each.l0):g}" if len(each.l0) > 1 else "") if each.l0 else "-"
    told = (f"no: {each.unreadable}" if each.unreadable else "yes",) if every else ()
    widths = ", ".join(each.widths) or "-"
    return each.source, each.model, _trained(each.chat_trained), spans(each.layers) or "-", widths, l0, *told


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from demur.report import render_table
    from demur.report.blocks import Table

    to = console()
    for part in render_table(Table.of("", titles, rows), width=to.width):
        to.print(part)


@command.command("convert")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, **PATH, help="Folder of the suite; the SAE goes into layer_L below it.")
@click.option("--layer", type=int, metavar="LAYER", help="Whose output it reads (default: by file and folders).")
@click.option("--activation", type=click.Choice(["relu", "jumprelu", "topk"]), help="Default: by what the file holds.")
@click.option("--k", type=click.IntRange(min=1), metavar="K", help="Active features, for topk (default: as stored).")
@click.option("--centred/--no-centred", default=None, help="Input less decoder bias (default: as its library does).")
@click.option("--model-name", default="", metavar="ID", help="Model, for the configuration.")
@click.option("--seconds", default=600, show_default=True, type=click.IntRange(min=1), help="Time to read the file.")
@click.option("--gigabytes", type=float, metavar="GB", help="Memory to read it in (default: 3 + four times the file).")
def convert_file(file: Path, out: Path, **options: Any) -> None:
    """Turn an old pickled checkpoint (.pt, .pth, .pkl) into safetensors in SAELens' layout. It is read weights-only, in
    a process of its own, so that nothing in it is run."""
    from demur.saes.convert import convert

    made = convert(file, out, **options)
    d_model, d_sae = made.sae.w_enc.shape
    centred = "centred on the decoder's bias" if made.centred else "not centred"
    form = f"{made.layout}, layer {made.sae.layer}, {made.sae.activation}"
    say(f"{file}: {form}, {d_sae} features over {d_model}, input {centred}")
    say(f"SAEs, for --saes: {out}")
