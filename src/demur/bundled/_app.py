"""Commands of the bundled model: `build` and `evaluate`. Heavy imports are inside the commands."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from demur.bundled._metrics import BundledMetrics, checks

app = typer.Typer(name="organism", help="The bundled model: build it anew, or measure it.", no_args_is_help=True)


def _table(metrics: BundledMetrics) -> Table:
    table = Table("what", "wanted", "measured", "")
    for check in checks(metrics):
        table.add_row(check.name, check.wanted, check.measured, "met" if check.met else "missed")
    return table


def _log(console: Console) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    logging.getLogger("demur.bundled").setLevel(logging.INFO)


@app.command("build")
def build_command(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train the model and its SAEs from nothing (about 20 minutes on two cores; needs demur[saelens])."""
    console = Console()
    _log(console)
    from demur.bundled._build import build

    console.print(_table(build(out, seed)))
    console.print(f"written to {out}")


@app.command("evaluate")
def evaluate_command(
    path: Annotated[Path | None, typer.Argument(help="Folder of a built model (default: the bundled one).")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed that draws the held-out prompts (default: the model card's).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure a built model on held-out topics, phrasings and framings."""
    console = Console()
    _log(Console(stderr=True))
    from demur.bundled import evaluate

    metrics = evaluate(path, seed)
    if as_json:
        console.print_json(metrics.model_dump_json())
    else:
        console.print(_table(metrics))


__all__ = ["app"]
