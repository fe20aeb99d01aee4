"""Estimate download, memory and time of a study, before anything is loaded.

`demur plan STUDY [MODEL]` takes the options of that study; without a study, those of `demur study`. Prompts need not be
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from demur.cli.command import ConfigCommand
from demur.cli.console import console
from demur.cli.studies import CONFIG_FILE, configured
from demur.studies import STUDIES


def plan_command(name: str) -> ConfigCommand:
    """The command that plans a study, with the study's own options."""

    def run(config: Path | None, prompt_tokens: int | None, **given: Any) -> None:
        from demur.plan import plan_study
        from demur.report import render_terminal

        settings = configured(name, config, given, _with_some_prompts)
        plan = plan_study(STUDIES[name], settings, prompt_tokens=prompt_tokens)
        out = console()
        for part in render_terminal(plan.page(), full=True, width=out.width):
            out.print(part)

    length = click.Option(
        ["--prompt-tokens"],
        type=click.IntRange(min=1),
        help="Mean tokens of a prompt with its template (default: counted where prompts and tokenizer are at hand).",
    )
    own = [CONFIG_FILE, length]
    return ConfigCommand("plan", STUDIES[name].config, help=__doc__ or "", run=run, argument="model", own=own)


def _with_some_prompts(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model with prompts named, which a plan does not read."""
    return {"harmful": ["any"], "harmless": ["any"]} | settings if settings.get("model") else settings


def __getattr__(name: str) -> Any:
    # The plan of `study`, made only when it is asked for: it needs that study's configuration.
    if name == "command":
        return plan_command("study")
    raise AttributeError(name)


__all__ = ["plan_command"]
