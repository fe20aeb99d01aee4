"""Estimate download, memory and time of a study, before anything is loaded.

`demur plan STUDY [MODEL]` takes the options of that study; without a study, those of `demur study`. Prompts need not be
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demur.cli.command import ConfigCommand
from demur.cli.console import console
from demur.cli.studies import CONFIG_FILE, configured
from demur.studies import STUDIES


def plan_command(name: str) -> ConfigCommand:
    """The command that plans a study, with the study's own options."""

    def run(config: Path | None, **given: Any) -> None:
        from demur.plan import plan_study
        from demur.report import render_terminal

        plan = plan_study(STUDIES[name], configured(name, config, given, _with_some_prompts))
        out = console()
        for part in render_terminal(plan.page(), full=True, width=out.width):
            out.print(part)

    return ConfigCommand("plan", STUDIES[name].config, help=__doc__ or "", run=run, argument="model", own=[CONFIG_FILE])


def _with_some_prompts(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model with prompts named, which a plan does not read."""
    return {"harmful": ["any"], "harmless": ["any"]} | settings if settings.get("model") else settings


def __getattr__(name: str) -> Any:
    # The plan of `study`, made only when it is asked for: it needs that study's configuration.
    if name == "command":
        return plan_command("study")
    raise AttributeError(name)


__all__ = ["plan_command"]
