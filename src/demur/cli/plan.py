"""Estimate download, memory and time of a study, before anything is loaded.

`demur plan STUDY [MODEL]` takes the options of that study; without a study, those of `demur study`. Prompts need not be
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from demur.cli.options import ConfigCommand
from demur.cli.show import print_pages
from demur.cli.studies import CONFIG_FILE, configured
from demur.cli.workers import WORKERS, fitting_workers
from demur.studies import STUDIES


def plan_command(name: str) -> ConfigCommand:
    """The command that plans a study, with the study's own options."""

    def run(config: Path | None, prompt_tokens: int | None, workers: int | None, gpu: str | None, **given: Any) -> None:
        from demur.plan import plan_study

        settings = configured(name, config, given, _with_some_prompts)
        several = workers or (1 if gpu else fitting_workers(settings))
        page = plan_study(STUDIES[name], settings, prompt_tokens=prompt_tokens, workers=several, gpu=gpu)
        print_pages([page], full=True)

    text = "Mean tokens of a prompt with its template (default: counted where prompts and tokenizer are at hand)."
    length = click.Option(["--prompt-tokens"], type=click.IntRange(min=1), metavar="INTEGER", help=text)
    other = "Plan for GPUs of this kind, as h100, by their data sheet; each worker has one (default: this machine)."
    gpu = click.Option(["--gpu"], help=other)
    own = [CONFIG_FILE, length, WORKERS, gpu]
    return ConfigCommand("plan", STUDIES[name].config, help=__doc__ or "", run=run, own=own)


def _with_some_prompts(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model with prompts named, which a plan does not read."""
    return {"harmful": ["any"], "harmless": ["any"]} | settings if settings.get("model") else settings


command = plan_command("study")
